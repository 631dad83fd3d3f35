"""``options.json`` of the command line, from the classes: ``python -m tests.support.listing``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import MISSING, fields
from importlib import import_module
from typing import Any, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from hyperopt_peft.cli import COMMANDS
from hyperopt_peft.cli.listing import FILE

#: Arguments of `transformers.TrainingArguments` that every training needs, with a short help.
COMMON = {
    "output_dir": "the folder of the results",
    "learning_rate": "peak learning rate; 1e-3 is a first choice for an adapter",
    "num_train_epochs": "passes over the training examples",
    "max_steps": "optimizer steps, in place of epochs",
    "per_device_train_batch_size": "examples a micro-batch",
    "gradient_accumulation_steps": "micro-batches a step",
    "seed": "of the start, the split and the order of examples",
    "bf16": "mixed precision in bfloat16",
    "use_cpu": "leave accelerators alone",
    "logging_steps": "steps between two lines of the log; below 1 a share of all steps",
    "resume_from_checkpoint": "of train: a checkpoint's folder, or true for the last one, or a "
    "new run where there is none",
    "report_to": "tensorboard, wandb or another logger of Transformers",
}


def collected() -> dict[str, Any]:
    """The contents of ``options.json``, from the classes of the commands' modules.

    A row of an earlier group is its name alone.
    """
    commands, groups, seen = dict[str, list[str]](), dict[str, list[Any]](), dict[str, list[str]]()
    for command in COMMANDS:
        module = vars(import_module(f"hyperopt_peft.cli.{command}"))
        commands[command] = [kind.__name__ for kind in module["TYPES"]]
        for kind in module["TYPES"]:
            if kind.__name__ not in groups:
                groups[kind.__name__] = [getattr(kind, "_argument_group_name", "training")]
                for row in own_rows(kind):
                    groups[kind.__name__].append(row[0] if seen.get(row[0]) == row else row)
                    seen[row[0]] = row
    return {"commands": commands, "groups": groups}


def own_rows(kind: type) -> list[list[str]]:
    """The options of the class ``kind``; of `transformers.TrainingArguments` those of `COMMON`."""
    rows = {row[0]: row for row in rows_of(kind)}
    if not issubclass(kind, TrainingArguments):
        return [*rows.values()]
    inherited = TrainingArguments.__dataclass_fields__
    common = [[name, *rows[name][1:3], text] for name, text in COMMON.items()]
    for row in common:
        if row[0] in ("output_dir", "report_to"):  # their defaults change with versions
            row[1:3] = ["TEXT", ""]
    return [*common, *(row for name, row in rows.items() if name not in inherited)]


def rows_of(kind: Any) -> Iterable[list[str]]:
    """Name, type, default and help of each field of the dataclass ``kind``."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        if not field.init:
            continue
        value = field.default
        if field.default_factory is not MISSING:
            value = field.default_factory()
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        if isinstance(value, bool):
            text = str(value).lower()
        if value is MISSING:
            text = "required"
        elif value in (None, False, ""):
            text = ""
        yield [field.name, _kind(hints[field.name], value), text, field.metadata.get("help", "")]


def _kind(hint: Any, value: Any) -> str:
    """A word for the values of a type, "" for a flag."""
    names = {bool: "" if value is False else "{true,false}", int: "INT", float: "NUMBER"}
    if hint in names:
        return names[hint]
    if get_origin(hint) is list:
        return f"{_kind(get_args(hint)[0], value)} ..."
    choices = [arg for arg in get_args(hint) if arg is not type(None)]
    if choices and all(isinstance(choice, str) for choice in choices):
        return f"{{{','.join(choices)}}}"
    return _kind(choices[0], value) if len(choices) == 1 else "TEXT"


def written(record: dict[str, Any]) -> str:
    """``record`` as JSON with a line for each option."""
    text = json.dumps(record, ensure_ascii=False)
    return text.replace(", [", ",\n [").replace("], ", "],\n ").replace("}, ", "},\n") + "\n"


if __name__ == "__main__":
    FILE.write_text(written(collected()), encoding="utf-8")
