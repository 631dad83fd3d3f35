"""Options of the command line before they are parsed: a YAML file, flags, or both.

One file may serve all commands: a mapping under a command's name has options of that command alone.
This module and `listing` load neither PyTorch nor Transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hyperopt_peft.cli import COMMANDS
from hyperopt_peft.errors import ProblemError


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

    Example:
        >>> option("attribute", "task", ["--seed", "3", "--task", "sft"])
        'sft'
    """
    options, flags = divided(command, argv)
    value = options.get(name)
    for flag, following in zip(flags, [*flags[1:], None]):
        if flag.startswith(f"--{name}="):
            value = flag.partition("=")[2]
        elif flag == f"--{name}":
            value = following
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
    except FileNotFoundError as error:
        raise ProblemError(f"{path}: there is no such file; write one by init") from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProblemError(f"{path}: no readable YAML ({error}); correct the file") from error
    if not isinstance(options, dict):
        raise ProblemError(f"{path}: no mapping; write options as `name: value`")
    sections = {name: options.pop(name) for name in COMMANDS if isinstance(options.get(name), dict)}
    return {str(k): v for k, v in {**options, **sections.get(command, {})}.items()}
