"""What is each bilevel method worth? One call of `compare_methods` for each setting and task.

python benchmarks/methods run                          # all incomplete settings
python benchmarks/methods run --settings "few rows"    # one setting
python benchmarks/methods run --quick                  # a minute of short runs, not stored
python benchmarks/methods report                       # writes the pages' tables from the stores
python benchmarks/methods report --check               # checks the committed tables
python benchmarks/methods calibration                  # are equal methods called different?
python benchmarks/methods offsets                      # is a known difference found, and when?
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "examples")]

from benchmarks.methods.runs import QUICK, compared, folder, stored  # noqa: E402
from benchmarks.methods.settings import SETTINGS  # noqa: E402


def main() -> None:
    """Train, or report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("run", "report", "calibration", "offsets"))
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS], choices=SETTINGS)
    parser.add_argument("--quick", action="store_true", help="a few short runs, not stored")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page would change")
    options = parser.parse_args()
    if options.command == "report":
        from benchmarks.methods.report import report

        report(check=options.check)
    elif options.command == "calibration":
        from benchmarks.methods.calibration import calibration

        calibration(quick=options.quick)
    elif options.command == "offsets":
        from benchmarks.methods.offsets import offsets

        print(offsets())
    elif options.quick:
        for task in ("tweets", "tags"):
            print(compared("magnitudes", task, None, **QUICK))
    else:
        for name in options.settings:
            for task in SETTINGS[name].tasks:
                if not stored(name, task):
                    found = compared(name, task, folder(name, task))
                    print(f"{name}, {task}\n{found}\n", flush=True)


if __name__ == "__main__":
    main()
