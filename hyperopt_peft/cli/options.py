"""Options from a YAML file, from flags, or from both: flags override the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from hyperopt_peft.cli import COMMANDS
from hyperopt_peft.errors import ProblemError, did_you_mean

YAML = (".yaml", ".yml")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ProblemError(message)


def parse(command: str, types: Sequence[type], argv: Sequence[str]) -> Any:
    """One instance of each dataclass in ``types``.

    The options in a YAML file are read by the rules of flags.

    Args:
        command: the subcommand, a key of `COMMANDS`.
        types: dataclasses whose fields are the options.
        argv: a YAML file (optional), then flags.

    Raises:
        ProblemError: an unknown option (the message has the nearest known one), a bad value, or a
            file that is no mapping of options or gives one twice.
    """
    hints = {
        field.name: get_type_hints(own)[field.name]
        for own in types
        for field in fields(own)
        if field.init
    }
    parser = _Parser(
        types,
        prog=f"hyperopt-peft {command}",
        usage="%(prog)s [config.yaml] [options]",
        description=COMMANDS[command].summary,
        allow_abbrev=False,
    )
    flags = list(argv)
    if flags and not flags[0].startswith("-"):
        flags = [*flags_of(Path(flags.pop(0)), hints), *flags]
    for flag in flags:
        name = flag.partition("=")[0].removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name.removeprefix("no_") not in {*hints, "help"}:
            raise ProblemError(f"unknown option --{name}{_near(name, hints)}")
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
        if rest:
            raise ProblemError(f"{rest[0]!r}: unexpected argument; give options as --name value")
    except (ValueError, TypeError, ImportError) as error:  # of argparse and of the dataclasses
        if late := next((flag for flag in argv[1:] if flag.endswith(YAML)), None):
            raise ProblemError(
                f"{late}: a YAML file comes before the options; put it first"
            ) from error
        raise ProblemError(str(error)) from error
    return parsed


def flags_of(path: Path, hints: Mapping[str, Any]) -> list[str]:
    """The options in the YAML file ``path`` as flags; null leaves an option at its default.

    Args:
        path: the file.
        hints: the type of each option.

    Raises:
        ProblemError: no such file, no mapping, an unknown option, an option that is given
            twice, or a list for one value.
    """
    try:
        with path.open(encoding="utf-8") as file:
            values = yaml.load(file, _Loader)
    except OSError as error:
        raise ProblemError(
            f"{path}: cannot be read ({error.strerror}); correct the path"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProblemError(f"{path}: no valid YAML ({error}); correct the file") from error
    if not isinstance(values, dict):
        raise ProblemError(f"{path}: no mapping; write options as `name: value`")
    flags = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            raise ProblemError(f"{path}: unknown option {name!r}{_near(name, hints)}")
        if isinstance(value, list) and not _takes_many(hints[name]):
            raise ProblemError(f"{path}: {name} takes one value, got {value}; give one of them")
        if isinstance(value, list):
            flags += [f"--{name}", *map(_text, value)]
        elif value is not None:
            flags.append(f"--{name}={_text(value)}")
    return flags


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently use the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if lines.setdefault(key.value, line) != line:
                raise ProblemError(
                    f"{key.start_mark.name}: {key.value} is given twice, in line "
                    f"{lines[key.value]} and in line {line}; take one out"
                )
        result: dict[Any, Any] = super().construct_mapping(node, deep)
        return result


def require_folder(path: str) -> None:
    """Raise ProblemError unless ``path``, the ``output_dir``, is writable; nothing is created."""
    folder = Path(path)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise ProblemError(f"output_dir: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK):
        raise ProblemError(f"output_dir: {existing} cannot be written to; name another folder")


def _takes_many(hint: Any) -> bool:
    """Whether an option of the type ``hint`` takes several values."""
    choices = get_args(hint)
    several = any(get_origin(choice) is list for choice in (hint, *choices))
    return several and (get_origin(hint) is list or str not in choices)


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)


def _near(name: str, known: Iterable[str]) -> str:
    """The most similar option, or --help instead of a list of all options."""
    hint = did_you_mean(name, known)
    return hint if hint.startswith("; did") else "; --help lists the options"
