"""Fine-tune a pretrained encoder with LoRA, DoRA and BiDoRA on the same few examples.

    python examples/bidora_text_classification.py            # MiniLM and tweets, no network
    python examples/bidora_text_classification.py --quick    # the same, smaller
    python examples/bidora_text_classification.py --model roberta-base --dataset glue/cola

Every method starts from the same head and the same A, and takes the same number of steps of the
adapter on batches of the same size; BiDoRA gives a part of the examples to its upper level. Each
option of `BiDoRATrainingArguments`, `transformers.TrainingArguments` among them, is a flag.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Read when torch is imported: threads that spin while they wait make a step ten times slower
# as soon as another program wants one of two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from figures import Curve, decomposition, estimators, learning_curves
from peft import LoraConfig, get_peft_model
from sklearn.metrics import accuracy_score, f1_score
from text_data import TextData, load_data, load_model, logits_of, quiet, reload
from transformers import HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

from hyperopt_peft import (
    BiDoRATrainer,
    BiDoRATrainingArguments,
    compare_hypergradients,
    split_dataset,
)
from hyperopt_peft.adapters import decompose
from hyperopt_peft.diagnostics import recommend, spectrum
from hyperopt_peft.diagnostics.compare import Comparison
from hyperopt_peft.problems import AdapterTrainer
from hyperopt_peft.problems.bidora import Direction, Magnitude


@dataclass
class Arguments:
    """What to train, on what, and where to write."""

    model: str = HfArg(
        default="minilm", help="minilm (from its package), a local folder, or a hub name"
    )
    dataset: str = HfArg(
        default="tweets", help="tweets (from its package), a local folder, or a hub name"
    )
    methods: list[str] = HfArg(
        default_factory=lambda: ["lora", "dora", "bidora"],
        help="which of lora, dora, bidora to train",
    )
    train_size: int = HfArg(default=1000, help="training examples, for both levels together")
    test_size: int = HfArg(default=3000, help="test examples at most")
    max_length: int = HfArg(default=64, help="tokens an example")
    rank: int = HfArg(default=8, help="rank r of B·A")
    alpha: int = HfArg(default=16, help="LoRA's alpha; the scale of B·A is alpha / r")
    dropout: float = HfArg(default=0.1, help="dropout on the adapter's input")
    target_modules: list[str] = HfArg(
        default_factory=lambda: ["query", "value"], help="modules to adapt, or all-linear"
    )
    modules_to_save: list[str] = HfArg(
        default_factory=lambda: ["pooler", "classifier"], help="modules trained in full"
    )
    estimators: bool = HfArg(
        default=False,
        help="compare all hypergradient estimators at the trained point with retrainings, too",
    )
    reference_steps: int = HfArg(
        default=5, help="steps of each retraining that estimators are compared with"
    )
    quick: bool = HfArg(
        default=False,
        help="a small run: 300 training and 400 test examples, 24 steps, whatever else is said",
    )


@dataclass
class Training(BiDoRATrainingArguments):
    """How to train: the defaults of this example."""

    output_dir: str | None = HfArg(
        default="outputs/bidora", help="where results, adapter and pictures are written"
    )
    max_steps: int = HfArg(default=120, help="steps of the search; the controls take both phases'")
    retrain_steps: int | None = HfArg(default=120, help="steps of the retraining")
    lower_steps: int = HfArg(default=2, help="lower steps from one upper step to the next")
    learning_rate: float = HfArg(
        default=2e-3, help="peak learning rate of the adapter, magnitudes of bidora apart"
    )
    warmup_steps: float = HfArg(default=0.1, help="share of the steps in which rates rise")
    per_device_train_batch_size: int = HfArg(default=16, help="examples a batch, at each level")
    logging_steps: float = HfArg(default=10, help="steps from one log to the next")
    save_strategy: str = HfArg(default="no", help="when to write checkpoints")
    report_to: str | None = HfArg(default="none", help="trackers, such as tensorboard")
    seed: int = HfArg(default=0, help="of data, head, A, order and dropout")
    dataloader_drop_last: bool = HfArg(default=True, help="leave out an epoch's smaller last batch")


@dataclass
class Result:
    """One row of the table; ``losses`` are those of training batches, by level."""

    method: str
    test_accuracy: float
    macro_f1: float
    trainable_parameters: int
    seconds: float
    implicit_ratio: float | None
    losses: dict[str, Curve]


def adapted(arguments: Arguments, data: TextData, seed: int, *, dora: bool) -> Any:
    """The pretrained model with a new head and adapter; the same ``seed``, the same start."""
    set_seed(seed)
    targets = arguments.target_modules
    model = load_model(arguments.model, data.label_names)
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=arguments.rank,
        lora_alpha=arguments.alpha,
        lora_dropout=arguments.dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=[name for name in arguments.modules_to_save if name in present] or None,
        use_dora=dora,
    )
    return get_peft_model(model, config).train()


def train(
    method: str, arguments: Arguments, training: Training, data: TextData
) -> tuple[Any, Result]:
    """The trained model, and its row without test scores."""
    model = adapted(arguments, data, training.seed, dora=method != "lora")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    training = copy.copy(training)
    training.output_dir = str(Path(training.output_dir or "") / method)
    searching = training.max_steps
    if method != "bidora" and training.retrain != "none":
        training.max_steps += training.retrain_steps or training.max_steps
    kind = BiDoRATrainer if method == "bidora" else AdapterTrainer
    trainer = kind(model, training, train_dataset=data.train, data_collator=data.collate)
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    logs, stride = trainer.state.log_history, int(training.logging_steps)

    def curve(records: list[dict[str, Any]], key: str, start: int = 0) -> Curve:
        return Curve([record[key] for record in records if key in record], start, stride)

    if method != "bidora":
        losses = {"": curve(logs, "loss")}
        return model, Result(method, 0.0, 0.0, trainable, seconds, None, losses)
    losses = {"lower level": curve(logs, "loss"), "upper level": curve(logs, "upper_loss")}
    if isinstance(trainer, BiDoRATrainer) and trainer.retrainer is not None:
        records = trainer.retrainer.state.log_history
        losses["retraining"] = curve(records, "loss", searching)
    ratio = statistics.median(r["implicit_ratio"] for r in logs if "implicit_ratio" in r)
    return model, Result(method, 0.0, 0.0, trainable, seconds, ratio, losses)


def compare(model: Any, arguments: Arguments, training: Training, data: TextData) -> Comparison:
    """Every estimator at the trained point, on one batch a level.

    The reference is how the loss of the upper batch changes when the lower level is trained
    again with the magnitudes moved. Solvers get the damping of the measured spectrum.
    """
    sets = split_dataset(data.train, training.upper_fraction, training.seed)
    size = training.per_device_train_batch_size
    lower_data, upper_data = (data.batches(rows, size, shuffle=True) for rows in sets)
    lower, upper = Direction(model, data=lower_data), Magnitude(model, data=upper_data)
    model.train()
    measured = spectrum(upper, lower)
    damping = f"damping={measured.damping():.2g}"
    methods = [
        "direct",
        "darts:scheme=forward",
        f"darts:scheme=forward,xi={training.learning_rate:g}",
        f"cg:steps=5,{damping}",
        f"minres:steps=5,{damping}",
        f"minres:steps=5,{damping},product=difference",
        f"minres:steps=20,{damping}",
        "neumann:terms=5",
    ]
    steps = f"steps={arguments.reference_steps},directions=4"
    reference = f"retraining:{steps},lr={1 / measured.radius:.2g}"
    return compare_hypergradients(upper, lower, methods, reference, repeats=1)


def table(results: list[Result]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| method | test accuracy | macro-F1 | trainable parameters | seconds | implicit/direct |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in results:
        ratio = "–" if row.implicit_ratio is None else f"{row.implicit_ratio:.2f}"
        lines.append(
            f"| {row.method} | {row.test_accuracy:.4f} | {row.macro_f1:.4f} "
            f"| {row.trainable_parameters:,} | {row.seconds:.0f} | {ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train, compare, write."""
    arguments, training = HfArgumentParser((Arguments, Training)).parse_args_into_dataclasses()
    unknown = set(arguments.methods) - {"lora", "dora", "bidora"}
    if unknown:
        raise SystemExit(f"unknown methods {sorted(unknown)}; known are lora, dora, bidora")
    if arguments.quick:
        arguments = replace(arguments, train_size=300, test_size=400, reference_steps=2)
        training.max_steps = 12 if training.retrain != "none" else 24
        training.retrain_steps, training.logging_steps = 12, 4
    quiet()
    output = Path(training.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    sizes = arguments.train_size, arguments.test_size, arguments.max_length
    data = load_data(arguments.dataset, arguments.model, *sizes, training.seed)
    print(f"{len(data.train)} training and {len(data.test)} test examples, {data.label_names}")

    results, curves, changes, records = [], {}, {}, []
    for method in arguments.methods:
        model, result = train(method, arguments, training, data)
        predicted, true = logits_of(model, data).argmax(1), data.test["labels"]
        result.test_accuracy = float(accuracy_score(true, predicted))
        result.macro_f1 = float(f1_score(true, predicted, average="macro"))
        results.append(result)
        curves |= {f"{method} {level}".strip(): loss for level, loss in result.losses.items()}
        changes[method] = decompose(model)
        if method == "bidora":
            reload(model, arguments.model, data, output / "adapter")
            if arguments.estimators:
                comparison = compare(model, arguments, training, data)
                print(f"{comparison}\n{recommend(comparison)}")
                estimators(comparison, output / "estimators.png")
                records = comparison.records()
    learning_curves(curves, output / "learning_curves.png")
    decomposition(changes, output / "decomposition.png")
    record = {
        "arguments": asdict(arguments),
        "training": training.bilevel_settings() | {"learning_rate": training.learning_rate},
        "results": [asdict(result) for result in results],
        "estimators": records,
    }
    (output / "results.json").write_text(json.dumps(record, indent=1))
    print(f"\n{table(results)}\n\nresults, pictures and adapter are in {output}")


if __name__ == "__main__":
    main()
