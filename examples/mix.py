"""Whose labels should count, and how much?

    python examples/mix.py            # MiniLM and tweets, no network
    python examples/mix.py --quick    # the same, smaller
    python examples/mix.py --folds 2  # simple baselines too, by two folds of the trusted tweets

Twelve simulated annotators label tweets: four are right nine times of ten, four half of the time,
and four mistake one class for the next. Some tweets have labels that are known to be right. The
weight of each annotator is learned on these; an adapter is then trained on everything with the
weights, beside equal weights and the trusted tweets alone. Each option of
`transformers.TrainingArguments` is a flag.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Read when torch is imported: threads that spin while they wait take the core from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from sklearn.metrics import roc_auc_score
from text_data import load_model, model_path, quiet, tweets
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    set_seed,
)
from transformers.hf_argparser import HfArg

from hyperopt_peft import MixTrainer, MixTrainingArguments, compare_baselines

#: How often an annotator of each kind is right; an adversarial one is wrong in one way.
KINDS = {"good": 0.9, "mediocre": 0.5, "adversarial": 0.1}


@dataclass
class Arguments:
    """The annotators, and the model."""

    model: str = HfArg(default="minilm", help="minilm (its package), a folder, or a hub name")
    annotators: int = HfArg(default=4, help="annotators of each kind")
    rows: int = HfArg(default=150, help="tweets of each annotator")
    trusted: int = HfArg(default=40, help="tweets with right labels")
    test_size: int = HfArg(default=600, help="test tweets")
    max_length: int = HfArg(default=20, help="tokens a tweet")
    rank: int = HfArg(default=8, help="rank r of B·A")
    layers: int = HfArg(default=2, help="how many of the last layers have an adapter")
    folds: int = HfArg(default=0, help="of a comparison with baselines, a search each; 0 for none")
    quick: bool = HfArg(default=False, help="one annotator of each kind, a few steps")


@dataclass
class Training(MixTrainingArguments):
    """How to train: the defaults of this example."""

    output_dir: str | None = HfArg(default="outputs/mix", help="where results are written")
    max_steps: int = HfArg(default=36, help="steps of the search")
    retrain_steps: int | None = HfArg(default=100, help="steps of each training")
    learning_rate: float = HfArg(default=2e-3, help="peak learning rate of the adapter")
    per_device_train_batch_size: int = HfArg(default=32, help="tweets a micro-batch")
    # 128 tweets, ten of each annotator.
    gradient_accumulation_steps: int = HfArg(default=4, help="micro-batches a step of the search")
    per_device_eval_batch_size: int = HfArg(default=64, help="tweets a batch of the evaluation")
    logging_steps: float = HfArg(default=12, help="steps from one log to the next")
    save_strategy: str = HfArg(default="no", help="when to write checkpoints")
    report_to: str | None = HfArg(default="none", help="trackers, such as tensorboard")


def parts_of(arguments: Arguments, seed: int) -> tuple[dict[str, Dataset], Dataset, Dataset]:
    """The tweets of each annotator with its labels, the trusted and the test tweets, as tokens."""
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
    train, test = parts["train"], parts["test"]
    draw, sources = random.Random(seed), {}
    for number, name in enumerate(names):
        begin, kind = first + number * each, name.split()[0]
        rows = train.select(range(begin, begin + each))
        labels = [
            label if draw.random() < KINDS[kind] else wrong(label, kind, draw)
            for label in rows["label"]
        ]
        feature = rows.features["label"]
        sources[name] = rows.remove_columns("label").add_column("label", labels, feature=feature)
    return sources, train.select(range(first)), test


def wrong(label: int, kind: str, draw: random.Random) -> int:
    """Another of the three classes: of an adversarial annotator the next one, of others any."""
    return (label + (1 if kind == "adversarial" else draw.choice((1, 2)))) % 3


def main() -> None:
    """Learn the weights, train with them and without; print what came out."""
    arguments, training = HfArgumentParser((Arguments, Training)).parse_args_into_dataclasses()
    if arguments.quick:
        small = {"annotators": 1, "rows": 24, "trusted": 18, "test_size": 60}
        arguments = replace(arguments, **small)
        training.max_steps, training.retrain_steps = 6, 4
    quiet()
    sources, trusted, test = parts_of(arguments, training.seed)
    adapter = LoraConfig(
        task_type="SEQ_CLS",
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules=["query", "value"],
        layers_to_transform=list(range(6))[-arguments.layers :],
        modules_to_save=["classifier"],
    )
    common = {
        "eval_dataset": test,
        "compute_metrics": accuracy,
        "data_collator": DataCollatorWithPadding(
            AutoTokenizer.from_pretrained(model_path(arguments.model))
        ),
    }

    def model() -> Any:
        set_seed(training.seed)
        base = load_model(arguments.model, trusted.features["label"].names)
        return get_peft_model(base, adapter)

    def measured(trainer: Any) -> float:
        trainer.train()
        return float(trainer.evaluate()["eval_accuracy"])

    plain = training.for_retraining()
    everything = concatenate_datasets([*sources.values(), trusted])
    results = {
        name: measured(Trainer(model(), plain, train_dataset=rows, **common))
        for name, rows in (("trusted tweets", trusted), ("everything, equal weights", everything))
    }
    mix = MixTrainer(model(), training, sources=sources, trusted=trusted, **common)
    results["everything, learned weights"] = measured(mix)
    weights = mix.row_weights()
    print("\n| annotator | weight of a label |\n| --- | --- |")
    for name in sorted(weights, key=lambda each: -weights[each]):
        print(f"| {name} | {weights[name]:.2f} |")
    good = [name.startswith("good") for name in sources]
    if any(good) and not all(good):
        area = roc_auc_score(good, [weights[name] for name in sources])
        print(f"\nthe good annotators have the largest weights: area under the curve {area:.2f}")
    print(f"\n| trained on | accuracy on {len(test)} test tweets |\n| --- | --- |")
    for name, value in results.items():
        print(f"| {name} | {value:.4f} |")
    if arguments.folds:
        print(f"\n{compare_baselines(mix, folds=arguments.folds, equal_passes=False)}")
    output = Path(training.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    record = {"arguments": asdict(arguments), "weights": weights, "accuracy": results}
    (output / "results.json").write_text(json.dumps(record, indent=1))
    mix.save_model()


def accuracy(prediction: Any) -> dict[str, float]:
    """The share of right classes."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


if __name__ == "__main__":
    main()
