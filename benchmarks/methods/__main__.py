"""What is BiDoRA good for? Tasks × budgets, each a call of `compare_methods`.

python benchmarks/study run                    # all cells; goes on from their stores
python benchmarks/study run --cells 300x300    # training rows x passes
python benchmarks/study run --quick            # a tiny study that is not kept, in a minute
python benchmarks/study report                 # the page's table, from the stores alone
python benchmarks/study report --check         # does it differ from the one that is committed?
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[0] = str(HERE.parents[1])

from benchmarks.methods.cells import CELLS, QUICK, TASKS, compared, folder  # noqa: E402
from hyperopt_peft.comparison import AcrossTasks  # noqa: E402


def main() -> None:
    """Train, or report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--cells", nargs="+", default=CELLS, help="training rows x passes")
    parser.add_argument("--quick", action="store_true", help="a few short runs, not kept")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 where the page would change"
    )
    options = parser.parse_args()
    if options.command == "report":
        from benchmarks.methods.report import report

        report(check=options.check)
    elif options.quick:
        names = ("tweets", "tags")
        print(AcrossTasks({name: compared(name, "40x60", **QUICK) for name in names}))
    else:
        for cell in options.cells:
            for name in TASKS:
                print(f"{name}, {cell}\n{compared(name, cell, folder(name, cell))}\n", flush=True)


if __name__ == "__main__":
    main()
