"""The entry point ``hyperopt-peft``: runs the subcommand, and prints an error as one line."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from importlib import import_module
from typing import Any

from hyperopt_peft import __version__
from hyperopt_peft.cli import COMMANDS
from hyperopt_peft.errors import NonFiniteError, ProblemError, did_you_mean
from hyperopt_peft.utils.tables import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv``, by default the process's arguments; returns the exit status.

    The status is 0; 1 if a training diverged, 2 after a wrong option or bad data, and 130 after
    Ctrl-C, each with one line on stderr.
    """
    name, *options = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "--version"):
        print(f"hyperopt-peft {__version__}" if name == "--version" else usage())
        return 0
    try:
        if name not in COMMANDS:
            raise ProblemError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}")
        with suppress(SystemExit):  # after --help
            _run(name, options)
        return 0
    except (ProblemError, NonFiniteError, OSError) as error:
        message, status = " ".join(str(error).split()), 2 - isinstance(error, NonFiniteError)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        message, status = "out of memory; lower per_device_train_batch_size, max_length or rank", 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130  # 128 + SIGINT, as a shell has it
    # This deletes the trainer, whose progress bar then ends its line.
    gc.collect()
    command = f"hyperopt-peft {name}" if name in COMMANDS else "hyperopt-peft"
    print(printable(f"{command}: {message}"), file=sys.stderr)
    return status


def _run(name: str, options: Sequence[str]) -> None:
    """Import the command, which takes seconds, and run it."""
    if sys.stderr.isatty():
        print("loading PyTorch and Transformers …", file=sys.stderr)
    module = import_module(f"hyperopt_peft.cli.{name}")
    no_bars = import_module("hyperopt_peft.trainer.quiet").no_bars
    bars = nullcontext() if sys.stderr.isatty() else no_bars()  # a log file wants none
    # Rows and names come from files that others wrote, and may have escape sequences.
    with bars, warnings.catch_warnings(), redirect_stdout(_Printable(sys.stdout)):
        # A user of the command line cannot act on renamings in PEFT and Transformers.
        warnings.simplefilter("ignore", FutureWarning)
        module.run(options)


class _Printable:
    """``stream``, to which `printable` text is written."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return int(self.stream.write(printable(text)))


def usage() -> str:
    """The commands and their summaries."""
    commands = "\n".join(f"  {name:11}{summary}" for name, summary in COMMANDS.items())
    last = "hyperopt-peft COMMAND --help lists the options; --version prints the version."
    return f"usage: hyperopt-peft COMMAND [config.yaml] [options]\n\n{commands}\n\n{last}"
