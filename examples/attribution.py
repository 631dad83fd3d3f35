"""Which training rows are harmful, how far can their scores be trusted, which labels are wrong?

    python examples/attribution.py            # MiniLM and tweets, no network
    python examples/attribution.py --estimator minres:damping=0.01

LoRA is trained on tweets, some with wrong labels. Every training tweet gets a score: the change of
the loss on other tweets if it counted more. A head gives the first scores, in seconds; the
adapter's own training the second ones, checked by retrainings. For wrong predictions the script
finds the training tweets behind them; out-of-fold confidence finds wrong labels. Each option of
`transformers.TrainingArguments` is a flag.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# Read when torch is imported: threads that spin while they wait take the core from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from hyperopt_peft import attribute, why
from hyperopt_peft.attribution import Reasons
from hyperopt_peft.method import option
from hyperopt_peft.utils.plots import row_groups
from peft import get_peft_model
from sklearn.metrics import roc_auc_score
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from text_data import CLASSES, adapter, load_model, quiet, split_tweets, spoilt


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
    estimator: str = option("unrolled", help="how rows are scored; see docs/attribution.md")
    retrainings: int = option(6, help="number of retrainings that check the scores")
    folds: int = option(5, help="number of folds in the search for wrong labels")


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
    quiet()
    sizes = {"train": arguments.train_size, "evaluation": arguments.evaluation_size}
    sizes["test"] = arguments.test_size
    parts, collate = split_tweets(sizes, training.seed, arguments.max_length, arguments.model)
    evaluation, test = parts["evaluation"], parts["test"]
    train, spoilt_rows = spoilt(parts["train"], arguments.wrong, training.seed)
    wrong = torch.tensor([row in spoilt_rows for row in range(len(train))])
    set_seed(training.seed)
    base = load_model(arguments.model, CLASSES)
    trainer = Trainer(
        get_peft_model(base, adapter()),
        training,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=collate,
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
        "wrong_labels": areas,
    }
    (output / "results.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
