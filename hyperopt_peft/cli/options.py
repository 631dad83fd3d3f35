"""Options from a YAML file, from flags, or from both: flags override the file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hyperopt_peft.errors import ProblemError, did_you_mean


class Parser(HfArgumentParser):
    """An HfArgumentParser whose errors are raised, and that knows its options by name."""

    def error(self, message: str) -> NoReturn:
        """Raise ``message`` as a ProblemError."""
        raise ProblemError(message)

    @property
    def by_name(self) -> dict[str, argparse.Action]:
        """The options by field; of a switch and its ``--no_…`` the switch."""
        options: dict[str, argparse.Action] = {}
        for action in self._actions:
            options.setdefault(action.dest, action)
        return options


def summary(documentation: str | None) -> str:
    """What a command does, from the first line of its module: ``"hyperopt-peft …: what"``."""
    return (documentation or "").partition("\n")[0].partition(": ")[2]


def parse(
    command: str, documentation: str | None, types: Sequence[type], argv: Sequence[str]
) -> Any:
    """One instance of each dataclass in ``types``.

    Args:
        command: the subcommand, for messages.
        documentation: the command's module's.
        types: dataclasses whose fields are the options.
        argv: a YAML file (optional, first), then flags.

    Raises:
        ProblemError: an unknown option (with the nearest known one), a bad value, or a file
            that is no mapping of options.
    """
    parser = Parser(
        types,
        prog=f"hyperopt-peft {command}",
        usage="%(prog)s [config.yaml] [options]",
        description=summary(documentation),
        allow_abbrev=False,
    )
    _order_help(parser, types)
    flags = list(argv)
    if flags and not flags[0].startswith("-"):
        flags = [*flags_of(Path(flags.pop(0)), parser), *flags]
    known = {flag for action in parser._actions for flag in action.option_strings}
    switches = {f for a in parser._actions if a.nargs == "?" for f in a.option_strings}
    late = "unexpected argument {!r}; a YAML file comes before the options"
    for before, flag in zip(["", *flags], flags):
        if before in switches and flag.endswith((".yaml", ".yml")):
            raise ProblemError(late.format(flag))
        name = flag.partition("=")[0]
        if name.startswith("--") and name not in known:
            raise ProblemError(f"unknown option {name}{_near(name, known)}")
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
    except ProblemError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # from the dataclasses' own checks
        raise ProblemError(str(error)) from error
    if rest:
        raise ProblemError(late.format(rest[0]))
    return parsed


def _order_help(parser: Parser, types: Sequence[type]) -> None:
    """Give the two levels a group of their own; the Trainer's hundred arguments come last."""
    trainers = [own for own in types if issubclass(own, TrainingArguments)]
    names = {field.name for own in trainers for field in fields(own)}
    names -= {field.name for field in fields(TrainingArguments)}
    levels, rest = parser.add_argument_group("two levels"), parser._optionals
    levels._group_actions += [action for action in rest._group_actions if action.dest in names]
    rest._group_actions = [action for action in rest._group_actions if action.dest not in names]
    parser._action_groups.sort(key=lambda group: group is rest)


def flags_of(path: Path, parser: Parser) -> list[str]:
    """The options in the YAML file ``path`` as flags, so that both are read by the same rules.

    A value of null leaves the option at its default.

    Raises:
        ProblemError: no such file, no mapping, an unknown option, or a list for one value.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProblemError(f"cannot read {path} ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProblemError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ProblemError(f"{path} must hold options as `name: value`")
    flags = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in parser.by_name or name == "help":
            raise ProblemError(f"{path}: unknown option {name!r}{_near(name, parser.by_name)}")
        if value is None:
            continue
        many = parser.by_name[name].nargs == "+"
        if isinstance(value, list) and not many:
            raise ProblemError(f"{path}: {name} takes one value, got the list {value}")
        if many:
            flags += [f"--{name}", *map(_text, value if isinstance(value, list) else [value])]
        else:
            flags.append(f"--{name}={_text(value)}")
    return flags


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)


def _near(name: str, known: Iterable[str]) -> str:
    """The nearest option; not all hundred of them where none is near."""
    hint = did_you_mean(name, known)
    return hint if hint.startswith("; did") else "; --help lists the options"
