"""Which adapter is better, and which rows are harmful? Two minutes on two cores, with real text.

    python examples/quickstart.py           # MiniLM and tweets, no network

First `compare_methods` says whether DoRA or BiDoRA is better than LoRA, with equal passes over
batches and three seeds. Then a fifth of the labels is made wrong. `attribute` says which rows
harm a hundred trusted tweets, and an adapter trained without them is tested on tweets that
nothing has seen.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from types import SimpleNamespace
from typing import Any

# Read when torch is imported: threads that spin while they wait take the core from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from datasets import Dataset, concatenate_datasets
from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, attribute, compare_methods
from hyperopt_peft.comparison import Choice
from hyperopt_peft.heads import compute_once
from hyperopt_peft.method import option
from hyperopt_peft.problems import BiDoRA, DoRA, LoRA
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import HfArgumentParser, set_seed

from text_data import TRAINING, adapter, base_model, quiet, split_tweets, spoilt

METHODS = {"LoRA": LoRA(), "DoRA": DoRA(), "BiDoRA": BiDoRA()}
#: The share of the training labels that are made wrong, and the share of the rows left out.
WRONG, LEFT_OUT = 0.2, 0.2
RATE, UPPER_RATE = 6e-3, 1e-2
#: Only the last of six layers has an adapter. The layers below it are computed once per tweet.
ADAPTER = adapter(5)


@dataclass
class Arguments:
    """The amount of training, and the folder for results."""

    output_dir: str = option("outputs/quickstart", help="where results are written")
    rows: int = option(300, help="training tweets")
    test_rows: int = option(1000, help="test tweets")
    passes: int = option(160, help="passes, forward and backward, over 16 rows per training")
    seeds: int = option(3, help="trainings of each method")
    seed: int = option(0, help="seed of the data and of the second part")


def arguments_of(arguments: Arguments) -> BilevelTrainingArguments:
    """The arguments of all trainings."""
    return BilevelTrainingArguments(
        str(Path(arguments.output_dir) / "adapter"),
        max_steps=arguments.passes,
        learning_rate=RATE,
        seed=arguments.seed,
        disable_tqdm=False,
        **TRAINING,
    )


def right(prediction: Any) -> np.ndarray[Any, Any]:
    """1 for each row that is classified right, else 0, ``(n,)``."""
    hits: np.ndarray[Any, Any] = prediction.predictions.argmax(1) == prediction.label_ids
    return hits.astype(float)


def adapters(arguments: Arguments, data: Any, output: Path) -> dict[str, float]:
    """Compare the three adapters on right labels, and print the result."""
    comparison = compare_methods(
        METHODS,
        base_model,
        ADAPTER,
        arguments_of(arguments),
        train_dataset=data.train,
        test_dataset=data.test,
        passes=arguments.passes,
        seeds=range(arguments.seeds),
        metric="accuracy",
        choice=Choice([RATE], [UPPER_RATE]),  # without one, ten runs and more would choose a rate
        ablations={},  # by default each method is trained with its upper level frozen too
        data_collator=data.collate,
        compute_metrics=lambda prediction: {"accuracy": right(prediction).mean()},
    )
    say(f"1. {comparison.heading()}")
    scores = comparison.tables()["Scores"].drop(columns=["rate", "upper rate"])
    say(scores.to_string(index=False))
    for sentence in comparison.sentences():
        if sentence not in comparison.remarks():  # about rates, rows and frozen layers
            say(sentence)
    comparison.plot(output / "adapters.png")
    means: dict[str, float] = comparison.scores().mean().to_dict()
    return means


def trainer_of(arguments: Arguments, data: Any, rows: Dataset) -> BilevelTrainer:
    """The trainer of LoRA on ``rows``."""
    set_seed(arguments.seed)
    trainer = BilevelTrainer(
        get_peft_model(base_model(), ADAPTER),
        arguments_of(arguments),
        method=LoRA(),
        train_dataset=rows,
        eval_dataset=data.trusted,
        data_collator=data.collate,
    )
    compute_once(trainer, dropout=False)
    return trainer


def say(text: str) -> None:
    """Print above the bars, in lines that fit."""
    for line in text.split("\n"):
        tqdm.write(fill(line, 110, subsequent_indent="  "))


def difference(hits: np.ndarray[Any, Any], others: np.ndarray[Any, Any]) -> str:
    """The paired difference of two accuracies, and half of its 95 % interval over test rows."""
    gap = hits - others
    return f"{gap.mean():+.3f} ± {1.96 * gap.std() / math.sqrt(len(gap)):.3f}"


def harmful_rows(arguments: Arguments, data: Any, output: Path) -> dict[str, float]:
    """Score training rows, some of which have wrong labels; train without the most harmful."""
    train, wrong = spoilt(data.train, WRONG, arguments.seed)
    say(
        f"\n2. {len(wrong)} of the {len(train)} labels are made wrong. Which rows harm "
        f"{len(data.trusted)} trusted tweets?"
    )
    begin = time.perf_counter()
    result = attribute(trainer_of(arguments, data, train), model="head")
    lds = result.check(20).lds
    seconds = time.perf_counter() - begin
    say(f'   attribute(trainer, model="head"), {seconds:.0f} s; its scores predict retrainings of')
    say(f"   the head without some rows: rank correlation (LDS) {lds:.2f}")
    rest = result.without(LEFT_OUT)
    out = set(range(len(train))) - set(rest)
    share = len(out & wrong) / len(out)
    say(f"   of the {len(out)} most harmful rows, {share:.0%} have wrong labels; the first three:")
    for row in result.ends(3)[0]:
        say(f"      {result.line(row, 60)}")
    result.plot(output / "rows.png", 8)
    trusted = data.trusted.cast(train.features)
    # Without trusted rows one can leave out the labels that models of the other rows doubt.
    sure = result.suspects(5, seed=arguments.seed).confidence.argsort()[len(out) :]
    training_sets = {
        "all rows": [train],
        "all rows, and the trusted ones too": [train, trusted],
        f"without {len(out)} doubtful labels": [train.select(sorted(sure.tolist()))],
        f"without the {len(out)} most harmful rows": [train.select(rest)],
    }
    hits = {}
    say(f"   LoRA on each, accuracy on {len(data.test)} tweets that nothing has seen:")
    for name, parts in training_sets.items():
        trainer = trainer_of(arguments, data, concatenate_datasets(parts))
        trainer.train()
        hits[name] = right(trainer.predict(data.test))
        gap = difference(hits[name], hits["all rows"])
        say(f"   {name:40} {hits[name].mean():.3f}" + f"  to all rows {gap}" * (len(hits) > 1))
    trainer.model.save_pretrained(output / "adapter")
    return {name: each.mean() for name, each in hits.items()}


def main() -> None:
    """Run both parts, and say what to do next."""
    (arguments,) = HfArgumentParser((Arguments,)).parse_args_into_dataclasses()
    quiet()
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    sizes = {"train": arguments.rows, "trusted": 100, "test": arguments.test_rows}
    parts, collate = split_tweets(sizes, arguments.seed, max_length=32)
    data = SimpleNamespace(**parts, collate=collate)
    record = {
        "arguments": asdict(arguments),
        "adapters": adapters(arguments, data, output),
        "most harmful rows": harmful_rows(arguments, data, output),
    }
    (output / "results.json").write_text(json.dumps(record, indent=1))
    say(
        "\nPart 2 has one seed; ± is half of a 95 % interval over the test tweets. Train on the "
        "trusted\nrows too, if you may (docs/attribution.md). Pictures, numbers, the last adapter: "
        f"{output}\n"
        "next: is my method better? (docs/is-my-method-better.md); your CSV (docs/command-line.md)"
    )


if __name__ == "__main__":
    main()
