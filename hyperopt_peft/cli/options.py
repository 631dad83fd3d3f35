"""Options from a YAML file, from flags, or from both: flags override the file.

One file may serve all commands: options that another command has are not read, and a mapping under
a command's name has options of that command alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import SaveStrategy

from hyperopt_peft.cli import COMMANDS
from hyperopt_peft.errors import ProblemError, did_you_mean

#: Files and folders in ``output_dir`` that are the results of a run.
RESULTS = (
    "adapter_config.json",
    "comparison.json",
    "verdict.json",
    "checkpoint-*",
    "retrain/checkpoint-*",
)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ProblemError(message)


@dataclass
class OutputArguments:
    """The options of every command that trains into ``output_dir``."""

    _argument_group_name = "command"

    overwrite_output_dir: bool = HfArg(default=False, help="replace the results of an earlier run")

    def require_output(self, args: TrainingArguments, *, resumes: bool = False) -> None:
        """Raise ProblemError unless results can be written to ``output_dir``; nothing is created.

        Args:
            args: the settings of the run.
            resumes: whether the command goes on from ``args.resume_from_checkpoint``.
        """
        if args.save_strategy == SaveStrategy.STEPS and not args.save_steps > 0:
            raise ProblemError(f"save_steps: must be positive, got {args.save_steps}")
        folder = Path(args.output_dir or "")
        parents = (folder, *folder.absolute().parents)
        existing = next(parent for parent in parents if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ProblemError(f"output_dir: {existing} is no folder to write to; name another")
        checkpoint = resume_from(args) if resumes else None
        inside = checkpoint is True or (
            checkpoint and folder.resolve() in Path(checkpoint).resolve().parents
        )
        result = next((path for name in RESULTS for path in folder.glob(name)), None)
        if result and not inside and not self.overwrite_output_dir:
            raise ProblemError(
                f"output_dir: {folder} has {result.name} of an earlier run; name another folder, "
                "resume that run, or replace its results with --overwrite_output_dir"
            )


def resume_from(args: TrainingArguments) -> str | bool | None:
    """The folder of a checkpoint, or whether to resume from the last complete one."""
    checkpoint: str | None = args.resume_from_checkpoint
    return {"true": True, "false": None}.get(str(checkpoint).lower(), checkpoint)


def parse(command: str, types: Sequence[type], argv: Sequence[str]) -> Any:
    """One instance of each dataclass in ``types``.

    Args:
        command: the subcommand, a key of `COMMANDS`.
        types: dataclasses whose fields are the options, each with its help.
        argv: a YAML file (optional), then flags.

    Raises:
        ProblemError: an unknown option (the message has the nearest one) or a flag of another
            command, a bad value, or a file that is no mapping of options.
    """
    options, flags = _divided(command, argv)
    names = {*_names(types), "help"}
    foreign = [name for name in options if _others(command, name, names)]
    for flag in flags:
        name = flag.partition("=")[0].removeprefix("--")
        if flag.startswith("--") and (others := _others(command, name, names)):
            raise ProblemError(
                f"--{name}: an option of {others}, which this run does not read; leave it out"
            )
    if foreign:
        text = f"{', '.join(foreign)}: of other commands or tasks, and not read"
        print(f"hyperopt-peft {command}: {text}", file=sys.stderr)
    options = {name: value for name, value in options.items() if name not in foreign}
    flags = [*_flags_of(options), *flags]
    parser = _Parser(
        types,
        prog=f"hyperopt-peft {command}",
        usage="%(prog)s [config.yaml] [options]",
        description=COMMANDS[command],
        allow_abbrev=False,
    )
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:  # of argparse and of the dataclasses
        raise ProblemError(str(error)) from error
    if rest:
        raise ProblemError(
            f"{rest[0]!r}: unexpected argument; give a YAML file first, then --name value"
        )
    return parsed


def _names(types: Sequence[type]) -> set[str]:
    return {field.name for options in types for field in fields(options) if field.init}


def _others(command: str, name: str, names: set[str]) -> str:
    """The other commands or tasks with the option ``name``; "" where it is one of ``names``.

    Raises:
        ProblemError: no command has it.
    """
    name = name.replace("-", "_")
    plain = name.removeprefix("no_")
    if {name, plain} & names:
        return ""
    if plain in names_of(command):
        return "other tasks"
    if others := [other for other in COMMANDS if plain in names_of(other)]:
        return ", ".join(others)
    near = did_you_mean(name, names)
    near = near if near.startswith("; did") else "; --help lists the options"
    raise ProblemError(f"unknown option --{name}{near}")


@cache
def names_of(command: str) -> frozenset[str]:
    """The options of ``command``: those of the dataclasses in its module."""
    module = vars(import_module(f"hyperopt_peft.cli.{command}"))
    types = [x for x in module.values() if isinstance(x, type) and is_dataclass(x)]
    of_options = [x for x in types if hasattr(x, "_argument_group_name")]
    of_training = [x for x in types if issubclass(x, TrainingArguments)]
    return frozenset(_names([*of_options, *of_training, *module.get("TYPES", ())]))


def option(command: str, name: str, argv: Sequence[str]) -> str | None:
    """The value of the option ``name`` in ``argv``, on which the other options depend; or None.

    Raises:
        ProblemError: the option has no value, or the file of options cannot be read.

    Example:
        >>> option("mix", "task", ["--seed", "3", "--task", "sft"])
        'sft'
    """
    parser = _Parser((), add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}")
    value: str | None = getattr(parser.parse_known_args(expanded(command, argv))[0], name)
    return value


def expanded(command: str, argv: Sequence[str]) -> list[str]:
    """``argv`` as flags alone: those of the YAML file come first."""
    options, flags = _divided(command, argv)
    return [*_flags_of(options), *flags]


def _divided(command: str, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The options of the YAML file, if ``argv`` begins with one, and the flags."""
    if argv and not argv[0].startswith("-"):
        return _options_in(Path(argv[0]), command), list(argv[1:])
    return {}, list(argv)


def _options_in(path: Path, command: str) -> dict[str, Any]:
    """The options in the YAML file ``path`` for ``command``.

    Raises:
        ProblemError: no such file, or no mapping.
    """
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProblemError(f"{path}: no readable YAML ({error}); correct the file") from error
    if not isinstance(options, dict):
        raise ProblemError(f"{path}: no mapping; write options as `name: value`")
    sections = {name: options.pop(name) for name in COMMANDS if isinstance(options.get(name), dict)}
    return {str(k): v for k, v in {**options, **sections.get(command, {})}.items()}


def _flags_of(options: Mapping[str, Any]) -> list[str]:
    """``options`` as flags; null leaves an option at its default."""
    flags: list[str] = []
    for name, value in options.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            flags.append(f"--{name}={text}")
    return flags
