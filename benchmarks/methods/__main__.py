"""What is each bilevel method worth? One call of `compare_methods` for each setting and task.

python benchmarks/methods run                          # all missing runs of all settings
python benchmarks/methods run --settings "wrong labels" --tasks trec --methods LoRA RowWeights
python benchmarks/methods run --heads                  # of heads, the limit of many passes
python benchmarks/methods run --dry_run                # the passes and minutes of missing runs
python benchmarks/methods run --quick                  # a minute of short runs, not stored
python benchmarks/methods report                       # writes the pages' tables from the stores
python benchmarks/methods report --check               # checks the committed tables
python benchmarks/methods calibration                  # are equal methods called different?
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "examples")]

from benchmarks.methods.runs import QUICK, compared, folder  # noqa: E402
from benchmarks.methods.settings import SETTINGS  # noqa: E402
from hyperopt_peft.comparison import Runs  # noqa: E402


def main() -> None:
    """Train, or report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("run", "calibration", "report"))
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS], choices=SETTINGS)
    parser.add_argument("--tasks", nargs="+", help="by default all of a setting")
    parser.add_argument("--methods", nargs="+", help="by default all; the first one is needed")
    parser.add_argument("--heads", action="store_true", help="heads in place of adapters")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--dry_run", action="store_true", help="passes and minutes, and no run")
    parser.add_argument("--quick", action="store_true", help="a few short runs, not stored")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page would change")
    options = parser.parse_args()
    if options.command == "report":
        from benchmarks.methods.report import report

        report(check=options.check)
    elif options.command == "calibration":
        from benchmarks.methods.calibration import calibration

        calibration(quick=options.quick)
    elif options.quick:
        names = ["LoRA", "loss correction", "RowWeights"]
        found = compared("wrong labels", "tweets", Runs(), names=names, **QUICK)
        print(*found.values(), sep="\n\n")
    else:
        for name in options.settings:
            for task in options.tasks or SETTINGS[name].tasks:
                if options.heads and SETTINGS[name].heads is None:
                    continue
                where = folder(name, task, options.heads)
                runs = Runs(where, options.jobs, dry_run=options.dry_run, progress=False)
                print(f"{name}, {task}", flush=True)
                found = compared(name, task, runs, heads=options.heads, names=options.methods)
                for comparison in () if options.dry_run else found.values():
                    print(f"{comparison}\n", flush=True)


if __name__ == "__main__":
    main()
