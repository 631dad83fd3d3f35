"""Fine-tune a pretrained encoder with LoRA, DoRA and BiDoRA on the same few examples.

    python examples/bidora_text_classification.py            # MiniLM and tweets, no network
    python examples/bidora_text_classification.py --quick    # the same, smaller
    python examples/bidora_text_classification.py --model roberta-base --dataset glue/cola

Every method starts from the same head and the same A, and takes the same number of steps of the
adapter on batches of the same size; BiDoRA gives a part of the examples to its upper level.
"""

from __future__ import annotations

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

import datasets
import torch
import transformers
from figures import Curve, estimators, learning_curves
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.metrics import accuracy_score, f1_score
from text_data import TextData, load_data, load_model
from tqdm.auto import tqdm
from transformers import HfArgumentParser, get_linear_schedule_with_warmup, set_seed
from transformers.hf_argparser import HfArg

from hyperopt_peft import Problem, compare_hypergradients, fit
from hyperopt_peft.adapters import decompose, plot_decomposition
from hyperopt_peft.hypergradients import Comparison
from hyperopt_peft.problems.bidora import BiDoRAConfig, bidora, search, split_dataset


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
    batch_size: int = HfArg(default=16, help="examples a batch, at each level")
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
    reference_steps: int = HfArg(
        default=40, help="MINRES steps of the reference in the comparison of estimators"
    )
    quick: bool = HfArg(
        default=False,
        help="a small run: 300 training and 400 test examples, 24 steps, whatever else is said",
    )
    output_dir: str = HfArg(
        default="outputs/bidora", help="where results, adapter and pictures are written"
    )


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


class Supervised(Problem):
    """A single level: all trainable parameters on the whole training set (LoRA, DoRA)."""

    def __init__(self, model: Any, **level: Any) -> None:
        self.model = model
        super().__init__([(n, p) for n, p in model.named_parameters() if p.requires_grad], **level)

    def loss(self, batch: Any) -> torch.Tensor:
        """The model's own loss."""
        loss: torch.Tensor = self.model(**batch).loss
        return loss


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
    method: str, arguments: Arguments, config: BiDoRAConfig, data: TextData
) -> tuple[Any, Result]:
    """The trained model, and its row without test scores."""
    model = adapted(arguments, data, config.seed, dora=method != "lora")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size, begin = arguments.batch_size, time.perf_counter()
    everything = data.batches(data.train, size, shuffle=True)
    ratio = None
    if method == "bidora":
        lower, upper = split_dataset(data.train, config.upper_fraction, config.seed, label="labels")
        history = bidora(
            model,
            lower_data=data.batches(lower, size, shuffle=True),
            upper_data=data.batches(upper, size, shuffle=True),
            all_data=everything,
            config=config,
        )
        ratio = statistics.median(record["implicit_ratio"] for record in history["search"])
        losses = {
            f"{level} level": Curve(
                [record[f"{level}_loss"] for record in history["search"]], 0, config.lower_steps
            )
            for level in ("lower", "upper")
        }
        if history["retrain"]:
            retrained = [record["loss"] for record in history["retrain"]]
            losses["retraining"] = Curve(retrained, config.search_steps)
    else:
        steps = config.search_steps + (config.retrain_steps if config.retrain != "none" else 0)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=config.lower_learning_rate, weight_decay=config.lower_weight_decay
        )
        warmup = int(config.warmup_ratio * steps)
        level = Supervised(
            model,
            data=everything,
            optimizer=optimizer,
            scheduler=get_linear_schedule_with_warmup(optimizer, warmup, steps),
            max_grad_norm=config.max_grad_norm,
        )
        losses = {"": Curve([record["loss"] for record in fit(level, steps)])}
    seconds = time.perf_counter() - begin
    return model, Result(method, 0.0, 0.0, trainable, seconds, ratio, losses)


@torch.no_grad()
def logits_of(model: Any, data: TextData, limit: int | None = None) -> torch.Tensor:
    """Logits ``(n, classes)`` of the (first ``limit``) test examples, in order."""
    part = data.test if limit is None else data.test.select(range(min(limit, len(data.test))))
    was_training = model.training
    model.eval()
    batches = tqdm(data.batches(part, 64, shuffle=False), desc="test", leave=False)
    logits = torch.cat([model(**batch).logits for batch in batches])
    model.train(was_training)
    return logits


def reloads(model: Any, arguments: Arguments, data: TextData, folder: Path) -> float:
    """Save the adapter, load it with stock PEFT, return the largest difference of logits."""
    model.save_pretrained(folder)
    base = load_model(arguments.model, data.label_names)
    again = PeftModel.from_pretrained(base, folder)
    return float((logits_of(model, data, 64) - logits_of(again, data, 64)).abs().max())


def compare(model: Any, arguments: Arguments, config: BiDoRAConfig, data: TextData) -> Comparison:
    """Every estimator at the trained point, on one batch a level.

    The lower Hessian has tens of thousands of rows and is indefinite, so the reference is a long
    damped MINRES instead of a dense solve, and every solver gets the same damping.
    """
    lower, upper = split_dataset(data.train, config.upper_fraction, config.seed, label="labels")
    engine = search(
        model,
        data.batches(lower, arguments.batch_size, shuffle=True),
        data.batches(upper, arguments.batch_size, shuffle=True),
        config,
    )
    damping = "damping=1.0"
    methods = [
        "direct",
        "darts:sides=1",
        "darts:sides=2",
        f"cg:steps=5,{damping}",
        f"minres:steps=5,{damping}",
        f"minres:steps=5,{damping},product=difference",
        "neumann:terms=5",
    ]
    reference = f"minres:steps={arguments.reference_steps},{damping}"
    return compare_hypergradients(engine.upper, engine.lower, methods, reference, repeats=1)


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
    arguments, config = HfArgumentParser((Arguments, BiDoRAConfig)).parse_args_into_dataclasses()
    unknown = set(arguments.methods) - {"lora", "dora", "bidora"}
    if unknown:
        raise SystemExit(f"unknown methods {sorted(unknown)}; known are lora, dora, bidora")
    if arguments.quick:
        arguments = replace(arguments, train_size=300, test_size=400, reference_steps=6)
        steps = 12 if config.retrain != "none" else 24
        config = replace(config, search_steps=steps, retrain_steps=12)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    sizes = arguments.train_size, arguments.test_size, arguments.max_length
    data = load_data(arguments.dataset, arguments.model, *sizes, config.seed)
    print(f"{len(data.train)} training and {len(data.test)} test examples, {data.label_names}")

    results, curves, changes = [], {}, {}
    for method in arguments.methods:
        model, result = train(method, arguments, config, data)
        predicted, true = logits_of(model, data).argmax(1), data.test["labels"]
        result.test_accuracy = float(accuracy_score(true, predicted))
        result.macro_f1 = float(f1_score(true, predicted, average="macro"))
        results.append(result)
        curves |= {f"{method} {level}".strip(): loss for level, loss in result.losses.items()}
        changes[method] = decompose(model)
        if method == "bidora":
            difference = reloads(model, arguments, data, output / "adapter")
            if not difference < 1e-4:
                raise SystemExit(f"the reloaded adapter's logits differ by {difference}")
            print(f"stock PEFT loads {output / 'adapter'}: logits agree to {difference:.1e}")
            comparison = compare(model, arguments, config, data)
            print(comparison)
            estimators(comparison, output / "estimators.png")
    learning_curves(curves, output / "learning_curves.png")
    plot_decomposition(changes, output / "decomposition.png")
    record = {
        "arguments": asdict(arguments),
        "bidora": asdict(config),
        "results": [asdict(result) for result in results],
        "estimators": comparison.records() if "bidora" in arguments.methods else [],
    }
    (output / "results.json").write_text(json.dumps(record, indent=1))
    print(f"\n{table(results)}\n\nresults, pictures and adapter are in {output}")


if __name__ == "__main__":
    main()
