"""The entry point ``hyperopt-peft``: finds the subcommand, and prints errors as one line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import datasets
import transformers

from hyperopt_peft.cli import check, compare_estimators, compare_methods, merge, train
from hyperopt_peft.cli.options import summary
from hyperopt_peft.errors import NonFiniteError, ProblemError, did_you_mean

COMMANDS = {
    "train": train,
    "compare": compare_methods,
    "check": check,
    "compare-estimators": compare_estimators,
    "merge": merge,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that ``argv`` (by default the process's own) names.

    Returns:
        The exit status: 0, or 2 after an error of the user's, which is one line on stderr.
    """
    name, *options = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if not sys.stderr.isatty():  # a log file wants no bars
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    try:
        if name not in COMMANDS:
            raise ProblemError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}")
        with warnings.catch_warnings():
            # What PEFT and Transformers will rename is none of the user's affairs.
            warnings.simplefilter("ignore", FutureWarning)
            COMMANDS[name].run(options)
    except (ProblemError, NonFiniteError) as error:
        command = f"hyperopt-peft {name}" if name in COMMANDS else "hyperopt-peft"
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def usage() -> str:
    """The commands, each with the first line of its module."""
    lines = ["usage: hyperopt-peft COMMAND [config.yaml] [options]", ""]
    for name, module in COMMANDS.items():
        lines.append(f"  {name:20}{summary(module.__doc__)}")
    return "\n".join([*lines, "", "hyperopt-peft COMMAND --help lists the options of one."])
