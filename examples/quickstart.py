"""What holds, on a pretrained encoder and real text, in about 90 seconds on two cores.

    python examples/quickstart.py           # MiniLM and tweets, no network
    python examples/quickstart.py --full    # more tweets, longer trainings

First LoRA, DoRA and BiDoRA are trained on the same tweets, with equal passes over batches. Then a
fifth of the labels is made wrong. `attribute` says which rows hurt on a hundred trusted tweets, and
an adapter that is trained without them is judged on tweets that nothing has seen.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Read when torch is imported: threads that spin while they wait take the core from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from cached_layers import States, states_of, without_lower_layers
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from text_data import load_model, model_path, quiet, tweets
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)
from transformers.hf_argparser import HfArg

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, attribute
from hyperopt_peft.problems import BiDoRA, DoRA, LoRA
from hyperopt_peft.utils import plots

METHODS = {"LoRA": LoRA, "DoRA": DoRA, "BiDoRA": BiDoRA}
#: A folder that trainers make and, without checkpoints, leave empty.
RUNS = "runs"
#: The share of the training labels that are made wrong, and the share of the rows left out.
WRONG, LEFT_OUT = 0.2, 0.2


@dataclass
class Arguments:
    """How much is trained, and where results go."""

    output_dir: str = HfArg(default="outputs/quickstart", help="where results are written")
    rows: int = HfArg(default=300, help="training tweets")
    test_rows: int = HfArg(default=1000, help="tweets that only judge")
    passes: int = HfArg(default=120, help="batches of 16 that go forward and backward, a method")
    layers: int = HfArg(default=2, help="how many of the model's last layers have an adapter")
    seed: int = HfArg(default=0, help="of data, head, A, order and dropout")
    full: bool = HfArg(default=False, help="1,000 tweets, 3,000 to judge, 1,000 passes, 4 layers")


@dataclass(frozen=True)
class Tweets:
    """Tokenized tweets: to train on, with right labels and with some wrong; trusted; to judge.

    ``states`` are those below the adapter's layers, of each text.
    """

    train: Dataset
    spoilt: Dataset
    trusted: Dataset
    test: Dataset
    collate: DataCollatorWithPadding
    classes: list[str]
    states: States


def data_of(arguments: Arguments) -> Tweets:
    """The tweets, no two alike, drawn by the seed."""
    tokenizer, seed = AutoTokenizer.from_pretrained(model_path("minilm")), arguments.seed
    split = {"seed": seed, "stratify_by_column": "label"}
    parts = tweets().train_test_split(100 + arguments.test_rows, arguments.rows, **split)
    others = parts["test"].train_test_split(arguments.test_rows, 100, **split)
    train, draw = parts["train"], random.Random(seed)
    labels, classes = train["label"][:], train.features["label"].names
    for row in draw.sample(range(len(labels)), round(WRONG * len(labels))):
        labels[row] = draw.choice([k for k in range(len(classes)) if k != labels[row]])
    feature = train.features["label"]
    spoilt = train.remove_columns("label").add_column("label", labels, feature=feature)

    def tokens(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return dict(tokenizer(rows["text"], truncation=True, max_length=32))

    of_parts = (
        rows.map(tokens, batched=True) for rows in (train, spoilt, others["train"], others["test"])
    )
    train, spoilt, trusted, test = of_parts
    collate, model = DataCollatorWithPadding(tokenizer), load_model("minilm", classes)
    states = states_of(model, 6 - arguments.layers, (train, trusted, test), collate)
    return Tweets(train, spoilt, trusted, test, collate, classes, states)


def model_of(arguments: Arguments, data: Tweets, *, dora: bool = False) -> Any:
    """The encoder with a new head and adapter; with one seed, from the same values."""
    set_seed(arguments.seed)
    frozen = 6 - arguments.layers
    base = without_lower_layers(load_model("minilm", data.classes), frozen, data.states)
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=8,
        lora_alpha=16,
        target_modules=["query", "value"],
        layers_to_transform=list(range(frozen, 6)),
        modules_to_save=["pooler", "classifier"],
        use_dora=dora,
    )
    return get_peft_model(base, config)


def trainer_of(method: str, arguments: Arguments, data: Tweets, rows: Dataset) -> Any:
    """The trainer of a method on ``rows``; each method has the same passes over batches."""
    args = BilevelTrainingArguments(
        str(Path(arguments.output_dir) / RUNS),
        max_steps=arguments.passes,
        learning_rate=2e-3,
        warmup_steps=0.1,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=100,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
        dataloader_pin_memory=False,
        disable_tqdm=False,
    )
    chosen = METHODS[method]
    if chosen is BiDoRA:  # the search, with an upper step after some lower ones, and the retraining
        of_a_step = 2 + 1 / BiDoRA.defaults["lower_steps"]
        args.max_steps = round(arguments.passes / of_a_step)
    return BilevelTrainer(
        model_of(arguments, data, dora=chosen is not LoRA),
        args,
        method=chosen(),
        train_dataset=rows,
        eval_dataset=data.trusted,
        data_collator=data.collate,
    )


def say(text: str) -> None:
    """Print a line above the bars."""
    tqdm.write(text)


def right(trainer: Any, test: Dataset) -> np.ndarray[Any, Any]:
    """Which rows of ``test`` the trainer's model classifies right, 0 or 1, ``(n,)``."""
    found = trainer.predict(test)
    return (found.predictions.argmax(1) == found.label_ids).astype(float)


def difference(hits: np.ndarray[Any, Any], others: np.ndarray[Any, Any]) -> str:
    """The paired difference of two accuracies, and half of its 95 % interval over test rows."""
    gap = hits - others
    return f"{gap.mean():+.3f} ± {1.96 * gap.std() / math.sqrt(len(gap)):.3f}"


def adapters(arguments: Arguments, data: Tweets, output: Path) -> dict[str, float]:
    """Train the three adapters on right labels, and print what they get right."""
    count = len(data.train)
    say(f"1. Three adapters on the same {count} tweets, {arguments.passes} batches each")
    hits, curves = {}, {}
    for method in METHODS:
        trainer = trainer_of(method, arguments, data, data.train)
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
        hits[method] = right(trainer, data.test)
        gap = f"to LoRA {difference(hits[method], hits['LoRA'])}" if method != "LoRA" else ""
        say(f"   {method:8} accuracy {hits[method].mean():.3f}  {seconds:3.0f} s  {gap}")
        curves |= losses(method, trainer)
    plots.lines({"": curves}, output / "adapters.png", xlabel="step", ylabel="training loss")
    trainer.model.save_pretrained(output / "adapter")  # BiDoRA's; stock PEFT loads it
    return {method: hits[method].mean() for method in METHODS}


def losses(method: str, trainer: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The losses of training batches by level, smoothed, against the step."""
    again, of_search = trainer.args.max_steps, trainer.state.log_history
    named = [(method, of_search, "loss", 0)]
    if method == "BiDoRA":
        named = [
            ("BiDoRA, lower level", of_search, "loss", 0),
            ("BiDoRA, upper level", of_search, "upper_loss", 0),
            ("BiDoRA, retraining", trainer.retrainer.state.log_history, "loss", again),
        ]
    for name, logs, key, begin in named:
        records = [record for record in logs if key in record]
        steps = [begin + record["step"] for record in records]
        yield name, plots.smooth(steps, [record[key] for record in records], 0.2)


def rows_that_hurt(arguments: Arguments, data: Tweets, output: Path) -> dict[str, float]:
    """Score the rows of which some labels are wrong, and train without those that hurt most."""
    train, labels = data.spoilt, zip(data.train["label"], data.spoilt["label"], strict=True)
    wrong = {row for row, (right, given) in enumerate(labels) if right != given}
    say(
        f"\n2. {len(wrong)} of the {len(train)} labels are made wrong. Which rows hurt on "
        f"{len(data.trusted)} trusted tweets?"
    )
    begin = time.perf_counter()
    result = attribute(trainer_of("LoRA", arguments, data, train), model="head")
    lds = result.check(20).lds
    seconds = time.perf_counter() - begin
    say(f'   attribute(trainer, model="head"), {seconds:.0f} s; its scores predict retrainings of')
    say(f"   the head without some rows: rank correlation (LDS) {lds:.2f}")
    kept = result.without(LEFT_OUT)
    out = set(range(len(train))) - set(kept)
    found = len(out & wrong) / len(out)
    say(
        f"   of the {len(out)} rows that hurt most, {found:.0%} have wrong labels; the first three:"
    )
    for row in result.ends(3)[0]:
        say(f"      {result.line(row, 60)}")
    result.plot(output / "rows.png", 8)
    trusted = data.trusted.cast(train.features)
    # The simple way without trusted rows: labels that models of the other rows doubt.
    sure = result.suspects(5, seed=arguments.seed).confidence.argsort()[len(out) :]
    ways = {
        "all rows": [train],
        "all rows, and the trusted ones too": [train, trusted],
        f"without the {len(out)} rows that hurt": [train.select(kept)],
        f"without {len(out)} doubtful labels": [train.select(sorted(sure.tolist()))],
    }
    hits = {}
    say(f"   LoRA on each, accuracy on {len(data.test)} tweets that nothing has seen:")
    for way, parts in ways.items():
        trainer = trainer_of("LoRA", arguments, data, concatenate_datasets(parts))
        trainer.train()
        hits[way] = right(trainer, data.test)
        gap = f"to all rows {difference(hits[way], hits['all rows'])}" if way != "all rows" else ""
        say(f"   {way:40} {hits[way].mean():.3f}  {gap}")
    return {way: each.mean() for way, each in hits.items()}


def main() -> None:
    """Both parts, and what to do next."""
    (arguments,) = HfArgumentParser((Arguments,)).parse_args_into_dataclasses()
    if arguments.full:
        arguments = replace(arguments, rows=1000, test_rows=3000, passes=1000, layers=4)
    quiet()
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    data = data_of(arguments)
    record = {
        "arguments": asdict(arguments),
        "adapters": adapters(arguments, data, output),
        "rows that hurt": rows_that_hurt(arguments, data, output),
    }
    shutil.rmtree(output / RUNS)
    (output / "results.json").write_text(json.dumps(record, indent=1))
    say(
        "\nOne seed; ± is half of a 95 % interval over the test tweets. On right labels no adapter "
        "is better\n(docs/results.md). Among wrong ones, rows that hurt can be found. Training on "
        "the trusted rows too is\nthe simple way, where it is allowed (docs/attribution.md).\n"
        f"Pictures, numbers and BiDoRA's adapter, which stock PEFT loads, are in {output}\n"
        "next: your own CSV (docs/command-line.md), your own Trainer (docs/start.md)"
    )


if __name__ == "__main__":
    main()
