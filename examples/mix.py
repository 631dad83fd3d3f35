"""Whose labels should count, and how much?

    python examples/mix.py            # MiniLM and tweets, no network, a minute on two cores
    python examples/mix.py --quick    # the same, smaller

Twelve simulated annotators label tweets: four are right nine times of ten, four half of the time,
and four mistake one class for the next. Some tweets have labels that are known to be right. The
weight of each annotator is learned on a head of the frozen model's features, beside all simple
ways to use the same labels; an adapter is then trained by the best of them, and one by equal
weights. Each option of `transformers.TrainingArguments` is a flag.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Read when torch is imported: threads that spin while they wait take the core from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from text_data import load_model, model_path, quiet, tweets
from transformers import AutoTokenizer, DataCollatorWithPadding, HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

from hyperopt_peft import MixTrainer, MixTrainingArguments, compare_baselines
from hyperopt_peft.problems.mix_plans import EQUAL, plan_of
from hyperopt_peft.utils.plots import intervals

#: How often an annotator of each kind is right; an adversarial one is wrong in one way.
KINDS = {"good": 0.9, "mediocre": 0.5, "adversarial": 0.1}


@dataclass
class Arguments:
    """The annotators, and the model."""

    model: str = HfArg(default="minilm", help="minilm (its package), a folder, or a hub name")
    annotators: int = HfArg(default=4, help="annotators of each kind")
    rows: int = HfArg(default=100, help="tweets of each annotator")
    trusted: int = HfArg(default=40, help="tweets with right labels")
    test_size: int = HfArg(default=400, help="test tweets")
    max_length: int = HfArg(default=20, help="tokens a tweet")
    rank: int = HfArg(default=8, help="rank r of B·A")
    layers: int = HfArg(default=2, help="how many of the last layers have an adapter")
    folds: int = HfArg(default=3, help="of the trusted tweets, to compare methods by")
    quick: bool = HfArg(default=False, help="one annotator of each kind, a few steps")


@dataclass
class Training(MixTrainingArguments):
    """How to train: the defaults of this example."""

    output_dir: str | None = HfArg(default="outputs/mix", help="where results are written")
    retrain_steps: int | None = HfArg(default=50, help="steps of each training of an adapter")
    learning_rate: float = HfArg(default=2e-3, help="peak learning rate of the adapter")
    per_device_train_batch_size: int = HfArg(default=32, help="tweets a step")
    per_device_eval_batch_size: int = HfArg(default=64, help="tweets a batch of the evaluation")
    logging_steps: float = HfArg(default=50, help="steps from one log to the next")
    save_strategy: str = HfArg(default="no", help="when to write checkpoints")
    report_to: str | None = HfArg(default="none", help="trackers, such as tensorboard")


@dataclass(frozen=True)
class Labelled:
    """Tweets as tokens: of each annotator, trusted and for the test.

    Attributes:
        sources: those of each annotator with its labels, by name.
        accuracy: how many of an annotator's labels are right, by name.
        trusted, test: tweets with right labels.
    """

    sources: dict[str, Dataset]
    accuracy: dict[str, float]
    trusted: Dataset
    test: Dataset


def labelled(arguments: Arguments, seed: int) -> Labelled:
    """The tweets, no two alike, with the labels of annotators drawn by ``seed``."""
    tokenizer = AutoTokenizer.from_pretrained(model_path(arguments.model))

    def tokens(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return dict(tokenizer(rows["text"], truncation=True, max_length=arguments.max_length))

    rows = tweets().map(tokens, batched=True, remove_columns=["text"])
    # Tweets that begin alike are equal once they are cut.
    first_of = {tuple(ids): number for number, ids in reversed([*enumerate(rows["input_ids"])])}
    names = [f"{kind} {k + 1}" for kind in KINDS for k in range(arguments.annotators)]
    each, first = arguments.rows, arguments.trusted
    parts = rows.select(sorted(first_of.values())).train_test_split(
        arguments.test_size, first + each * len(names), seed=seed, stratify_by_column="label"
    )
    train, draw, sources, accuracy = parts["train"], random.Random(seed), {}, {}
    for number, name in enumerate(names):
        begin, kind = first + number * each, name.split()[0]
        rows = train.select(range(begin, begin + each))
        truth = rows["label"][:]
        labels = [x if draw.random() < KINDS[kind] else wrong(x, kind, draw) for x in truth]
        accuracy[name] = sum(map(int.__eq__, labels, truth)) / each
        feature = rows.features["label"]
        sources[name] = rows.remove_columns("label").add_column("label", labels, feature=feature)
    return Labelled(sources, accuracy, train.select(range(first)), parts["test"])


def wrong(label: int, kind: str, draw: random.Random) -> int:
    """Another of the three classes: of an adversarial annotator the next one, of others any."""
    return (label + (1 if kind == "adversarial" else draw.choice((1, 2)))) % 3


def main() -> None:
    """Learn the weights, compare, train by the best method and by equal weights."""
    arguments, training = HfArgumentParser((Arguments, Training)).parse_args_into_dataclasses()
    if arguments.quick:
        small = {"annotators": 1, "rows": 24, "trusted": 18, "test_size": 60, "folds": 2}
        arguments = replace(arguments, **small)
        training.retrain_steps = 4
    quiet()
    data, output = labelled(arguments, training.seed), Path(training.output_dir)
    set_seed(training.seed)
    adapter = LoraConfig(
        task_type="SEQ_CLS",
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules=["query", "value"],
        layers_to_transform=list(range(6))[-arguments.layers :],
        modules_to_save=["classifier"],
    )
    names = data.test.features["label"].names
    mix = MixTrainer(
        get_peft_model(load_model(arguments.model, names), adapter),
        training,
        sources=data.sources,
        trusted=data.trusted,
        eval_dataset=data.test,
        compute_metrics=accuracy,
        data_collator=DataCollatorWithPadding(
            AutoTokenizer.from_pretrained(model_path(arguments.model))
        ),
    )
    mix.search(None)  # in seconds; train() would train the adapter by the learned weights too
    weights = mix.row_weights()
    comparison = compare_baselines(mix, folds=arguments.folds)
    right = {**data.accuracy, "trusted": 1.0}
    print(f"\n{'annotator':16}{'weight of a label':>18}{'over the folds':>16}{'labels right':>14}")
    for name, share in right.items():
        between = "{:.2f} to {:.2f}".format(*ends(name, comparison.row_weights))
        print(f"{name:16}{weights[name]:18.2f}{between:>16}{share:14.2f}")
    between = {name: (weights[name], *ends(name, comparison.row_weights)) for name in right}
    panels = {
        "learned weight (bar: over the folds)": between,
        "right labels, which no method knows": {name: (x, x, x) for name, x in right.items()},
    }
    intervals(panels, output / "weights.png")
    print(f"\n{comparison}\n")

    results, best = {}, comparison.recommended
    for method, setting in {EQUAL: 1.0, best.method: best.setting}.items():
        mix.retrain(plan_of(mix.head_mix, method, setting))
        results[method] = float(mix.evaluate()["eval_accuracy"])
    print(f"\n| the adapter, by | accuracy on {len(data.test)} test tweets |\n| --- | --- |")
    for method, value in results.items():
        print(f"| {method} | {value:.4f} |")
    record = {"arguments": asdict(arguments), "weights": weights, "accuracy": results}
    (output / "results.json").write_text(json.dumps(record, indent=1))
    mix.save_model()


def ends(name: str, folds: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """The least and the largest weight of a source over the folds."""
    return min(fold[name] for fold in folds), max(fold[name] for fold in folds)


def accuracy(prediction: Any) -> dict[str, float]:
    """The share of right classes."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


if __name__ == "__main__":
    main()
