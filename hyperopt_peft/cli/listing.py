"""The options of every command, for ``--help`` and for errors in a name, without their classes.

The classes load PyTorch, which takes seconds. ``options.json`` has their names, types, defaults and
help: ``python -m tests.support.listing`` writes the file, and a test compares it with the classes.
"""

from __future__ import annotations

import ast
import json
import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import MISSING, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, get_args, get_origin, get_type_hints

from hyperopt_peft.cli import COMMANDS
from hyperopt_peft.cli.config import divided, option
from hyperopt_peft.errors import ProblemError, did_you_mean

#: A group's options: name, type, default and help.
Options = Sequence[Sequence[str]]
FILE = Path(__file__).with_name("options.json")
#: Columns of the names in a page of help.
INDENT = 30


@cache
def listing() -> dict[str, dict[str, Options]]:
    """The groups of options of each command, by title."""
    record = json.loads(FILE.read_text(encoding="utf-8"))
    rows: dict[str, Sequence[str]] = {}
    groups: dict[str, tuple[str, Options]] = {}
    for kind, (title, *options) in record["groups"].items():
        rows |= {row[0]: row for row in options if not isinstance(row, str)}
        # A name alone is the row of an earlier group.
        groups[kind] = title, [rows[row] if isinstance(row, str) else row for row in options]
    commands = record["commands"].items()
    return {command: dict(groups[kind] for kind in kinds) for command, kinds in commands}


@cache
def names_of(command: str) -> frozenset[str]:
    """The options of ``command``, those of Transformers included."""
    own = {name for options in listing()[command].values() for name, *_ in options}
    return frozenset(own | (training_names() if "learning_rate" in own else set()))


@cache
def training_names() -> frozenset[str]:
    """The fields of `transformers.TrainingArguments`, from its source."""
    spec = find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0], "training_args.py")
    (body,) = (
        node.body
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    )
    fields = [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return frozenset(target.id for target in fields if isinstance(target, ast.Name))


def others(command: str, name: str, names: Collection[str]) -> str:
    """The other commands or tasks with the option ``name``; "" where it is one of ``names``.

    Raises:
        ProblemError: no command has it.
    """
    name = name.replace("-", "_")
    plain = name.removeprefix("no_")
    if {name, plain} & {*names}:
        return ""
    if plain in names_of(command):
        return "other tasks"
    if found := [other for other in COMMANDS if other != "init" and plain in names_of(other)]:
        return ", ".join(found)
    near = did_you_mean(name, names)
    near = near if near.startswith("; did") else "; --help lists the options"
    raise ProblemError(f"unknown option --{name}{near}")


def require_names(command: str, argv: Sequence[str]) -> None:
    """Raise ProblemError if ``argv``, or its YAML file, has an option that no command has.

    The task sft has TRL's options too, and is left to the parser.
    """
    if command == "init" or option(command, "task", argv) == "sft":
        return
    options, flags = divided(command, argv)
    given = [flag.removeprefix("--").partition("=")[0] for flag in flags if flag[:2] == "--"]
    for name in [*options, *given]:
        others(command, name, names_of(command))


def page(command: str, *, everything: bool = False) -> str:
    """The help of ``command``: its own options, then, with ``everything``, those of Transformers.

    Example:
        >>> print(page("merge").partition("\\n\\n")[0])
        usage: hyperopt-peft merge [config.yaml] [options]
    """
    usage = "FILE [FILE ...] [options]" if command == "init" else "[config.yaml] [options]"
    lines = [f"usage: hyperopt-peft {command} {usage}", "", f"{COMMANDS[command]}."]
    groups = dict(listing()[command])
    known = {name for options in groups.values() for name, *_ in options}
    if everything and "learning_rate" in known:
        from transformers import TrainingArguments

        rest = (row for row in rows_of(TrainingArguments) if row[0] not in known)
        groups["all other arguments of transformers.TrainingArguments"] = [*rest]
    for title, options in groups.items():
        lines += ["", f"{title}:", *(line for row in options for line in _entry(*row))]
    if not everything and "learning_rate" in known:
        lines += ["", "--help_all adds the other arguments of transformers.TrainingArguments."]
    return "\n".join(lines)


def _entry(name: str, kind: str, default: str, text: str) -> Iterable[str]:
    head, width = f"  --{name} {kind}".rstrip(), min(get_terminal_size().columns, 100)
    text = f"{text} ({default})" if default else text
    body = textwrap.wrap(" ".join(text.split()), max(width - INDENT, 30))
    if len(head) > INDENT - 2:
        yield head
        head = ""
    for part in body:
        yield f"{head:{INDENT}}{part}"
        head = ""


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
