"""Which training rows help or hurt, how far that can be trusted, and which labels are wrong?

    python examples/attribution.py            # MiniLM and tweets, no network
    python examples/attribution.py --quick    # the same, smaller
    python examples/attribution.py --estimator minres:damping=0.01

LoRA is trained on tweets, some with wrong labels. Every training tweet gets a score: the change of
the loss on other tweets if it counted more. A head gives the first scores, in seconds; the
adapter's own training the second ones, checked by retrainings. For wrong predictions the script
finds the training tweets behind them; out-of-fold confidence finds wrong labels. At the end the
adapter is trained without the tweets that hurt most, and judged on unseen tweets. Each option of
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

import torch
from datasets import Dataset
from hyperopt_peft import attribute, why
from hyperopt_peft.attribution import Reasons
from hyperopt_peft.method import option
from hyperopt_peft.utils.plots import row_groups
from peft import LoraConfig, get_peft_model
from sklearn.metrics import roc_auc_score
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from text_data import load_model, model_path, quiet, tweets


@dataclass
class Arguments:
    """The data, the scores and their use."""

    model: str = option("minilm", help="minilm (its package), a folder, or a hub name")
    train_size: int = option(128, help="training tweets")
    evaluation_size: int = option(96, help="tweets whose loss is explained")
    test_size: int = option(400, help="tweets whose first ones are explained")
    explained: int = option(40, help="test tweets whose wrong predictions are explained")
    wrong: float = option(0.2, help="share of the training labels that are made wrong")
    max_length: int = option(20, help="tokens a tweet")
    rank: int = option(8, help="rank r of B·A")
    estimator: str = option("unrolled", help="how rows are scored; see docs/attribution.md")
    retrainings: int = option(6, help="number of retrainings that check the scores")
    folds: int = option(5, help="number of folds in the search for wrong labels")
    quick: bool = option(False, help="48 training tweets, 6 steps, 5 retrainings, 2 folds")


@dataclass
class Training(TrainingArguments):
    """How to train: the defaults of this example, a smooth run."""

    output_dir: str | None = option("outputs/attribution", help="where results are written")
    max_steps: int = option(30, help="steps of the adapter")
    learning_rate: float = option(1e-3, help="peak learning rate of the adapter")
    per_device_train_batch_size: int = option(32, help="tweets a batch")
    per_device_eval_batch_size: int = option(64, help="tweets a batch of the evaluation")
    warmup_steps: float = option(0.2, help="share of the steps in which the rate rises")
    save_strategy: str = option("no", help="when to write checkpoints")
    report_to: str | None = option("none", help="trackers, such as tensorboard")


def parts_of(arguments: Arguments, seed: int) -> tuple[Dataset, Dataset, Dataset, torch.Tensor]:
    """Training, evaluation and test tweets as tokens, and which training labels are wrong."""
    tokenizer = AutoTokenizer.from_pretrained(model_path(arguments.model))
    rest = arguments.evaluation_size + arguments.test_size
    split = {"seed": seed, "stratify_by_column": "label"}
    parts = tweets().train_test_split(rest, arguments.train_size, **split)
    others = parts["test"].train_test_split(arguments.test_size, **split)
    draw, train = random.Random(seed), parts["train"]
    wrong = torch.zeros(len(train), dtype=torch.bool)
    wrong[draw.sample(range(len(train)), round(arguments.wrong * len(train)))] = True
    names = train.features["label"].names

    def spoilt(row: dict[str, Any], number: int) -> dict[str, Any]:
        other = draw.choice([k for k in range(len(names)) if k != row["label"]])
        return {"label": other if wrong[number] else row["label"]}

    def tokens(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return dict(tokenizer(rows["text"], truncation=True, max_length=arguments.max_length))

    train = train.map(spoilt, with_indices=True, load_from_cache_file=False)
    train, evaluation, test = (
        rows.map(tokens, batched=True) for rows in (train, others["train"], others["test"])
    )
    return train, evaluation, test, wrong


def explain(reasons: Reasons, labels: list[int], wrong: torch.Tensor, output: Path) -> None:
    """Print and draw the fewest tweets behind each wrong prediction, short sets first."""
    errors = [each for each in reasons if each.predicted != labels[each.row] and each.rows]
    errors = sorted(errors, key=lambda each: len(each.rows))
    behind = [row for each in errors for row in each.rows]
    print(replace(reasons, reasons=errors[:3]))
    if behind:
        share = float(wrong[behind].double().mean())
        print(f"{len(errors)} wrong predictions; wrong labels: {share:.0%} of the tweets behind,")
        print(f"{float(wrong.double().mean()):.0%} of all training tweets\n")
    output.mkdir(parents=True, exist_ok=True)
    replace(reasons, reasons=errors[:3]).plot(output / "why.png")


def main() -> None:
    """Train, score, check and search; print the results."""
    arguments, training = HfArgumentParser((Arguments, Training)).parse_args_into_dataclasses()
    if arguments.quick:
        small = {"train_size": 48, "evaluation_size": 32, "test_size": 48}
        arguments = replace(arguments, **small, retrainings=5, folds=2, explained=16)
        training.max_steps = 6
    quiet()
    train, evaluation, test, wrong = parts_of(arguments, training.seed)
    set_seed(training.seed)
    adapter = LoraConfig(
        task_type="SEQ_CLS",
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules=["query", "value"],
        modules_to_save=["pooler", "classifier"],
    )
    base = load_model(arguments.model, train.features["label"].names)
    trainer = Trainer(
        get_peft_model(base, adapter),
        training,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=DataCollatorWithPadding(
            AutoTokenizer.from_pretrained(model_path(arguments.model))
        ),
    )
    quick = attribute(trainer, model="head")
    print(f"scores on a head, λ = {quick.settings['l2']:g}: {quick.check(20)}\n")
    output = Path(training.output_dir)
    explained = test.select(range(min(arguments.explained, len(test))))
    explain(why(trainer, explained), explained["label"][:], wrong, output)
    result = attribute(trainer, estimator=arguments.estimator)
    print(f"{len(train)} tweets, {int(wrong.sum())} wrong labels; Φ = {result.value:.4f}")
    print(result.table(5))

    suspects = quick.suspects(arguments.folds, seed=training.seed)
    flagged = [int(row in suspects.flagged) for row in range(len(train))]
    doubts = {result.line(row, 70): float(1 - suspects.confidence[row]) for row in suspects.flagged}
    worst, label = dict([*doubts.items()][:8]), "1 − confidence in the given label"
    row_groups({"the most doubtful labels": worst}, output / "suspects.png", label)
    result.to_csv(output / "attribution.csv", {"suspect": flagged, "wrong": wrong.int().tolist()})
    checked = result.check(arguments.retrainings, seed=training.seed)
    result.plot(output / "attribution.png", 8)
    seen = ~result.scores.isnan()
    measures = {
        "out-of-fold confidence": -suspects.confidence,
        "mean training loss": result.losses,
        "score": result.scores,
    }
    areas = {
        name: float(roc_auc_score(wrong[seen], values[seen])) for name, values in measures.items()
    }
    print(f"\n{suspects}\n\n| wrong labels are found by | area under the curve |\n| --- | --- |")
    for name, area in areas.items():
        print(f"| {name} | {area:.3f} |")

    print(f"\n{checked}")
    record = {
        "arguments": asdict(arguments),
        "lds": checked.lds,
        "slope": checked.slope,
        "metasmoothness": checked.metasmoothness,
        "wrong_labels": areas,
        "head_lds": quick.checked.lds if quick.checked else None,
    }
    (output / "results.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
