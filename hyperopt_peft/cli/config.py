"""Options of the command line before they are parsed: a YAML file, flags, or both.

One file may serve all commands: a mapping under a command's name has options of that command alone.
This module and `listing` load neither PyTorch nor Transformers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from hyperopt_peft.cli import COMMANDS
from hyperopt_peft.errors import ProblemError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ProblemError(message)


def divided(command: str, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The options of the YAML file, if ``argv`` begins with one, and the flags.

    Raises:
        ProblemError: the file cannot be read, or is no mapping.
    """
    if argv and not argv[0].startswith("-"):
        return _options_in(Path(argv[0]), command), list(argv[1:])
    return {}, list(argv)


def option(command: str, name: str, argv: Sequence[str]) -> str | None:
    """The value of the option ``name`` in ``argv``, on which the other options depend; or None.

    Raises:
        ProblemError: the option has no value, or the file of options cannot be read.

    Example:
        >>> option("mix", "task", ["--seed", "3", "--task", "sft"])
        'sft'
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}")
    options, flags = divided(command, argv)
    value: str | None = getattr(parser.parse_known_args([*flags_of(options), *flags])[0], name)
    return value


def flags_of(options: Mapping[str, Any]) -> list[str]:
    """``options`` as flags; null leaves an option at its default.

    Example:
        >>> flags_of({"rank": 8, "text_columns": ["a", "b"], "seed": None})
        ['--rank=8', '--text_columns', 'a', 'b']
    """
    flags: list[str] = []
    for name, value in options.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            flags.append(f"--{name}={text}")
    return flags


def _options_in(path: Path, command: str) -> dict[str, Any]:
    """The options in the YAML file ``path`` for ``command``."""
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProblemError(f"{path}: no readable YAML ({error}); correct the file") from error
    if not isinstance(options, dict):
        raise ProblemError(f"{path}: no mapping; write options as `name: value`")
    sections = {name: options.pop(name) for name in COMMANDS if isinstance(options.get(name), dict)}
    return {str(k): v for k, v in {**options, **sections.get(command, {})}.items()}
