"""The parser of options, and those of every command that trains.

Flags override a YAML file, of which options that other commands have are not read.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from transformers.hf_argparser import HfArg, HfArgumentParser

from hyperopt_peft.cli.config import divided, flags_of
from hyperopt_peft.cli.listing import others
from hyperopt_peft.cli.text.data import cache_folder
from hyperopt_peft.engine.checkpoint import valid_checkpoints
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.validation import require_writable

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: Files and folders in ``output_dir`` that are the results of a run.
RESULTS = (
    "adapter_config.json",
    "comparison.json",
    "report.html",
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
    dry_run: bool = HfArg(
        default=False, help="print rows, steps, trainings and minutes; train and write nothing"
    )

    def require_output(
        self, args: TrainingArguments, *, resumes: bool = False
    ) -> str | bool | None:
        """The checkpoint to resume, True for the last complete one, or None; nothing is created.

        So a script that is started again and again may always give ``true``. A dry run gets an
        ``output_dir`` of its own, since a Trainer makes the folder.

        Args:
            args: the settings of the run.
            resumes: whether the command can resume.

        Raises:
            ProblemError: results cannot be written to ``output_dir``, or would replace others.
        """
        asked = str(args.resume_from_checkpoint)
        if asked.lower() in ("none", "false"):
            asked = ""
        elif not resumes:
            raise ProblemError("resume_from_checkpoint: this command does not resume; leave it out")
        if self.dry_run:
            args.output_dir = cache_folder()
            return None
        folder = Path(args.output_dir or "")
        require_writable(folder)
        last = asked.lower() == "true"
        if last and next(valid_checkpoints(folder, folder / "retrain"), None) is not None:
            return True
        if asked and not last and folder.resolve() in Path(asked).resolve().parents:
            return asked
        results = (path for name in RESULTS for path in folder.glob(name))
        result = next((path for path in results if not (last and "checkpoint" in path.name)), None)
        if result and not self.overwrite_output_dir:
            raise ProblemError(
                f"output_dir: {folder} has {result.name} of an earlier run; name another folder, "
                "resume that run, or replace its results with --overwrite_output_dir"
            )
        if last:
            print(f"{folder} has no complete checkpoint: a new run")
        return None if last else asked or None


def parse(command: str, types: Sequence[type], argv: Sequence[str]) -> tuple[list[Any], list[str]]:
    """One instance of each dataclass in ``types``, and the flags by which they can be had again.

    Args:
        command: the subcommand, a key of `COMMANDS`.
        types: dataclasses whose fields are the options, each with its help.
        argv: a YAML file (optional), then flags. Options of the file that are of other commands or
            tasks are not read.

    Raises:
        ProblemError: an unknown option (the message has the nearest one) or a flag of another
            command, a bad value, or a file that is no mapping of options.
    """
    options, flags = divided(command, argv)
    names = {field.name for kind in types for field in fields(kind) if field.init}
    for flag in flags:
        name = flag.partition("=")[0].removeprefix("--")
        if flag.startswith("--") and (owners := others(command, name, names)):
            raise ProblemError(
                f"--{name}: an option of {owners}, which this run does not read; leave it out"
            )
    if foreign := [name for name in options if others(command, name, names)]:
        text = f"{', '.join(foreign)}: of other commands or tasks, and not read"
        print(f"hyperopt-peft {command}: {text}", file=sys.stderr)
    read = [*flags_of({k: v for k, v in options.items() if k not in foreign}), *flags]
    parser = _Parser(types, add_help=False, allow_abbrev=False)
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            [*_defaults_here(names), *read], return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:  # of argparse and of the dataclasses
        raise ProblemError(str(error)) from error
    if rest:
        raise ProblemError(
            f"{rest[0]!r}: unexpected argument; give a YAML file first, then --name value"
        )
    return parsed, read


def _defaults_here(names: Collection[str]) -> list[str]:
    """Flags of the options ``names`` that suit terminal and device; the user's follow them."""
    flags = []
    if "disable_tqdm" in names and not sys.stderr.isatty():  # a log file wants no bars
        flags.append("--disable_tqdm=true")
    if "dataloader_pin_memory" in names:
        import torch

        if not torch.accelerator.is_available():  # where PyTorch warns of each loader
            flags.append("--dataloader_pin_memory=false")
    return flags
