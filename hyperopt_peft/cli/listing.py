"""The options of every command, for ``--help`` and for errors in a name, without their classes.

The classes load PyTorch, which takes seconds. ``options.json`` has their names, types, defaults and
help: ``python -m tests.support.listing`` writes the file, and a test compares it with the classes.
"""

from __future__ import annotations

import ast
import json
import textwrap
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from shutil import get_terminal_size

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
    """The help of ``command``; with ``everything`` the names of all options of Transformers too.

    Example:
        >>> print(page("merge").partition("\\n\\n")[0])
        usage: hyperopt-peft merge [config.yaml] [options]
    """
    usage = "FILE [FILE ...] [options]" if command == "init" else "[config.yaml] [options]"
    lines = [f"usage: hyperopt-peft {command} {usage}", "", f"{COMMANDS[command]}."]
    for title, options in listing()[command].items():
        lines += ["", f"{title}:", *(line for row in options for line in _entry(*row))]
    own = {name for options in listing()[command].values() for name, *_ in options}
    if "learning_rate" in own:
        rest = "--help_all names them"
        if everything:
            rest = ", ".join(sorted(training_names() - own))
        text = f"All other fields of transformers.TrainingArguments are options too: {rest}."
        lines += ["", *textwrap.wrap(text, _width())]
    return "\n".join(lines)


def _width() -> int:
    return min(get_terminal_size().columns, 100)


def _entry(name: str, kind: str, default: str, text: str) -> Iterable[str]:
    head = f"  --{name} {kind}".rstrip()
    text = f"{text} ({default})" if default else text
    body = textwrap.wrap(" ".join(text.split()), max(_width() - INDENT, 30))
    if len(head) > INDENT - 2:
        yield head
        head = ""
    for part in body:
        yield f"{head:{INDENT}}{part}"
        head = ""
