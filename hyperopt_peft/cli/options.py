"""Options from flags and from a YAML file for all commands, and their parser.

A mapping under a command's name has options for that command alone.
"""

from __future__ import annotations

import json
import os
import re
import sys
import weakref
from argparse import SUPPRESS, Action, ArgumentError, HelpFormatter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import TrainingArguments
from transformers.hf_argparser import HfArgumentParser

from hyperopt_peft.cli import COMMANDS
from hyperopt_peft.cli.text.data import cache_folder
from hyperopt_peft.comparison.find import METHODS, find_method
from hyperopt_peft.engine.checkpoint import valid_checkpoints
from hyperopt_peft.errors import ProblemError, did_you_mean
from hyperopt_peft.trainer.arguments import DEFAULTS
from hyperopt_peft.trainer.method import Method
from hyperopt_peft.utils.validation import option, require_writable

#: The values of each option by its name.
Options = dict[str, list[str]]
UNEXPECTED = "unexpected argument; give a YAML file first, then --name value"
#: Files and folders in ``output_dir`` that are the results of a run.
RESULTS = ("adapter_config.json", "report.html", "checkpoint-*", "retrain/checkpoint-*")
#: The fields of `transformers.TrainingArguments` in a page of help; ``--help_all`` has the rest.
COMMON = {
    "output_dir": "the folder of the results",
    "learning_rate": "peak learning rate, with linear decay",
    "num_train_epochs": "passes over the training examples",
    "max_steps": "optimizer steps, in place of num_train_epochs if positive",
    "per_device_train_batch_size": "examples in a batch on each device",
    "gradient_accumulation_steps": "batches in an optimizer step",
    "seed": "seed of the start, the split and the order of examples",
    "bf16": "compute in bfloat16 where float32 is not needed",
    "use_cpu": "use no accelerator",
    "logging_steps": "steps from log line to log line, or their share of all steps",
    "report_to": "loggers such as tensorboard or wandb; all, or none",
    "resume_from_checkpoint": "a checkpoint of an earlier run; true: the last one in output_dir",
}


@dataclass
class OutputArguments:
    """The options of every command that trains into ``output_dir``."""

    _argument_group_name = "command"

    dry_run: bool = option(False, help="print rows and steps; train nothing")
    details: bool = option(False, help="print the numbers for experts too")
    overwrite_output_dir: bool = option(False, help="replace the results of an earlier run")

    def require_output(self, args: TrainingArguments, *, shared: bool = False) -> str | bool | None:
        """Lock ``output_dir``; the checkpoint to resume, True for the last complete one, or None.

        The processes of a comparison hold a ``shared`` lock, and go on with its runs.
        """
        if self.dry_run:  # a Trainer makes the folder
            args.output_dir = cache_folder()
            return None
        if not args.output_dir:
            raise ProblemError("output_dir: is empty; name a folder")
        folder, asked = Path(args.output_dir), checkpoint_of(args)
        require_writable(folder)
        if args.process_index == 0:
            held = lock(folder, shared=shared)
            weakref.finalize(self, os.close, held)  # not later than the process ends
        last = asked.lower() == "true"
        if last and next(valid_checkpoints(folder, folder / "retrain"), None) is not None:
            return True
        if asked and not last and folder.resolve() in Path(asked).resolve().parents:
            return asked
        results = (path for name in RESULTS for path in folder.glob(name))
        result = next((path for path in results if not (last and "checkpoint" in path.name)), None)
        goes_on = shared and any(folder.glob("runs*.jsonl"))
        if result and not (self.overwrite_output_dir or goes_on):
            raise ProblemError(
                f"output_dir: {folder} has {result.name} of an earlier run; name another folder, "
                "resume that run, or replace its results with --overwrite_output_dir"
            )
        if last:
            print(f"{folder} has no complete checkpoint: a new run")
        return None if last else asked or None


def lock(folder: Path, *, shared: bool = False) -> int:
    """Lock ``folder`` against other processes until the file of this descriptor is closed.

    Forked processes, such as those of a data loader, do not hold the lock; the end of this process,
    SIGKILL included, drops it.

    Raises:
        ProblemError: another process has the lock, and one of the two is not ``shared``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        import fcntl

        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        os.close(file)
        text = f"output_dir: another run is writing to {folder}; wait for its end, or name another"
        raise ProblemError(text) from error
    except (ImportError, OSError):  # Windows, and file systems without locks
        pass
    return file


def checkpoint_of(args: TrainingArguments) -> str:
    """The checkpoint to resume, "" for none."""
    asked = str(args.resume_from_checkpoint)
    return "" if asked.lower() in ("none", "false") else asked


def divided(command: str, argv: Sequence[str]) -> tuple[Options, Options]:
    """All options in ``argv``, which may begin with a YAML file, and those in the flags alone."""
    of_file, flags, values = Options(), Options(), list[str]()
    if argv and not argv[0].startswith("-"):
        of_file, argv = _options_in(Path(argv[0]), command), argv[1:]
    for word in argv:
        if word.startswith("--") or word == "-h":
            name, equals, value = word.lstrip("-").partition("=")
            name = {"h": "help"}.get(name, name).replace("-", "_")
            flags.pop(name, None)  # the last one counts, also against --no_name
            values = flags[name] = [value] if equals else []
        elif flags:
            values.append(word)
        else:
            raise ProblemError(f"{word!r}: {UNEXPECTED}")
    return {**of_file, **flags}, flags


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        """The mapping of ``node``, of whose equal names YAML would keep the last."""
        keys = dict[str, Any]()
        for key, _ in node.value:
            name = str(key.value).replace("-", "_")
            if keys.setdefault(name, key) is not key:
                where = f"{self.name}: line {key.start_mark.line + 1}"
                raise ProblemError(f"{where}: {name} is given twice; remove one")
        return super().construct_mapping(node, deep)


def _options_in(path: Path, command: str) -> Options:
    """The options in the YAML file ``path`` for ``command``; null is the default."""
    try:
        with path.open(encoding="utf-8") as file:
            options = yaml.load(file, _Loader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProblemError(f"{path}: no readable YAML ({error}); init writes one") from error
    if not isinstance(options, dict):
        raise ProblemError(f"{path}: no mapping; write options as `name: value`")
    sections = {name: options.pop(name) for name in COMMANDS if isinstance(options.get(name), dict)}
    options |= sections.get(command, {})
    return {str(k).replace("-", "_"): _words(v) for k, v in options.items() if v is not None}


def _words(value: Any) -> list[str]:
    value = json.dumps(value) if isinstance(value, dict) else value
    return [*map(str, value)] if isinstance(value, list) else [str(value)]


def flags_of(options: Mapping[str, Sequence[str]]) -> list[str]:
    """``options`` as flags."""
    flags: list[str] = []
    for name, values in options.items():
        flags += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]
    return flags


def names_of(kinds: Iterable[Any]) -> set[str]:
    """The names of the fields of the dataclasses among ``kinds``."""
    return {x.name for kind in kinds if is_dataclass(kind) for x in fields(kind) if x.init}


def parse(
    command: str,
    types: Sequence[Any],
    argv: Sequence[str],
    *,
    method: type[Method] | None = None,
    besides: Collection[str] = (),
) -> tuple[list[Any], Options]:
    """One instance of each dataclass in ``types``, then of ``method``, and the given options.

    Args:
        argv: a YAML file (optional), then flags. Options in the file for other commands, tasks or
            methods are ignored; such a flag is an error.
        method: a class whose fields are options too; the help has its defaults.
        besides: further names, which are ignored.
    """
    given, flags = divided(command, argv)
    parser = _parser(types, method)
    if {"help", "help_all"} & {*flags}:
        parser.set_defaults(**{**DEFAULTS, **({} if method is None else method.defaults)})
        print(_page(command, parser, everything="help_all" in flags))
        raise SystemExit(0)
    names = names_of(parser.dataclass_types)
    read = {k: v for k, v in given.items() if {k, k.removeprefix("no_")} & names}
    for name in [name for name in given if name not in {*read, *besides}]:
        owners = _owners(command, name, names)
        if name in flags:
            raise ProblemError(f"--{name}: is for {owners}, not for this run; leave it out")
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            flags_of(read), return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:  # of argparse and of the dataclasses
        raise ProblemError(str(error)) from error
    if rest:
        raise ProblemError(f"{rest[0]!r}: {UNEXPECTED}")
    if method is not None and not is_dataclass(method):
        parsed.append(method())
    return parsed, given


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ProblemError(message)


class _Format(HelpFormatter):
    """One name for each option, with the default unless it is empty."""

    def _format_action_invocation(self, action: Action) -> str:
        values = "" if action.nargs == 0 else self._format_args(action, "VALUE")
        return f"{action.option_strings[0]} {values}".rstrip()

    def _get_help_string(self, action: Action) -> str | None:
        shown = action.default not in (None, False, "")
        return f"{action.help} (%(default)s)" if shown else action.help


def _parser(types: Sequence[Any], method: type[Method] | None) -> _Parser:
    """The parser of ``types`` and of ``method``."""
    names, kinds = names_of(types), [*types]
    if method is not None:
        for name in {*method.defaults} - names:
            raise ProblemError(f"{method.__name__}: {name} in defaults is no option; leave it out")
        kinds += [method] if is_dataclass(method) else []
    try:
        parser = _Parser(kinds, add_help=False, allow_abbrev=False, formatter_class=_Format)
    except (ArgumentError, ValueError, TypeError, RuntimeError) as error:
        name = kinds[-1].__name__
        raise ProblemError(f"{name}: a field of it cannot be an option: {error}") from error
    if "learning_rate" in names:
        parser.set_defaults(logging_steps=0.05, disable_tqdm=not sys.stderr.isatty())
    return parser


@cache
def _names(owner: str) -> set[str]:
    """The options of a command, or of a method."""
    if owner in METHODS:
        return names_of([find_method(owner)])
    return names_of(import_module(f"hyperopt_peft.cli.{owner}").TYPES)


def _owners(command: str, name: str, names: Collection[str]) -> str:
    """The commands, tasks or methods with the option ``name``, which is none of ``names``."""
    plain = name.removeprefix("no_")
    if plain in _names(command):
        return "other tasks"
    owners = (owner for owner in (*COMMANDS, *METHODS) if owner != "init")
    if found := ", ".join(owner for owner in owners if plain in _names(owner)):
        return found
    near = did_you_mean(name, names)
    near = near if near.startswith("; did") else "; --help lists the options"
    raise ProblemError(f"unknown option --{name}{near}")


def _page(command: str, parser: _Parser, *, everything: bool) -> str:
    """The help of ``command``; with ``everything`` all arguments of Transformers too."""
    hidden = set() if everything else names_of([TrainingArguments]) - {*COMMON}
    for action in parser._actions:
        if action.dest in hidden or action.option_strings[0].startswith("--no_"):
            action.help = SUPPRESS
        elif action.dest in COMMON:
            action.help = COMMON[action.dest]
        else:
            text = action.help or "an option of the method"
            action.help = re.sub(r"(?<!%)%(?![%(])", "%%", text.replace("``", ""))
    usage = "FILE [FILE ...] [options]" if command == "init" else "[config.yaml] [options]"
    parser._action_groups = [*parser._action_groups[2:], parser._action_groups[1]]
    parser._action_groups[-1].title = "training"
    parser.usage, parser.description = f"hyperopt-peft {command} {usage}", f"{COMMANDS[command]}."
    if hidden & names_of(parser.dataclass_types):
        parser.epilog = "--help_all lists the other fields of transformers.TrainingArguments too."
    return str(parser.format_help())
