"""What is BiDoRA good for? Tasks × methods × sizes × seeds, from one YAML.

python benchmarks/study run               # all that has no result yet
python benchmarks/study run --share 1/2   # one half, beside another process
python benchmarks/study report            # tables and figures, from the results alone
python benchmarks/study report --check    # do they differ from those that are committed?
python benchmarks/study --smoke           # a tiny study in a temporary folder, in a minute
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "examples"), str(HERE.parent)]

import torch  # noqa: E402
from plan import Study  # noqa: E402

RESULTS = HERE.parent / "results/study"
PARTS = ("variants", "rates", "table", "shift")


def train(study: Study, given: argparse.Namespace) -> None:
    """Every run of the share without a result, each written when it ends.

    The plan is gone through until nothing is left of which the rate is known: start again where the
    other share was slower.
    """
    from text_data import quiet
    from training import measure

    quiet()
    torch.set_num_threads(1)
    number, of = given.share
    trained = True
    while trained:
        trained = False
        for run in study.runs(given.results):
            mine = run.number % of == number - 1
            if run.part not in given.parts or not mine or run.path(given.results).exists():
                continue
            found, trained = measure(run), True
            record = {key: getattr(run, key) for key in ("part", "task", "size", "method", "seed")}
            run.write(given.results, record | {"rate": run.rate, "options": run.options, **found})
            print(run.part, run.task, run.size, run.method, run.seed, run.rate, end=" ")
            print(f"score {found['score']:.3f} in {found['seconds']:.0f} s", flush=True)


def share(text: str) -> tuple[int, int]:
    """The number of a share and the number of shares, of ``1/2``."""
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give 1/2 and 2/2, or 1/1")
    return int(number), int(of)


def smoke(given: argparse.Namespace) -> None:
    """Run the small study, and print its tables."""
    from report import sections

    study = Study.read(HERE / "smoke.yaml")
    with tempfile.TemporaryDirectory() as folder:
        given.results = Path(folder)
        train(study, given)
        for name, text in sections(study, given.results).items():
            print(f"\n{name}\n\n{text}")


def main() -> None:
    """Train, or report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("run", "report"), nargs="?")
    parser.add_argument("--smoke", action="store_true", help="run smoke.yaml, print its tables")
    parser.add_argument("--study", type=Path, default=HERE / "study.yaml")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a JSON file a run")
    parser.add_argument(
        "--share", type=share, default="1/1", help="1/2: every second run; 2/2: the others"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 where the page would change"
    )
    given = parser.parse_args()
    if given.smoke:
        smoke(given)
        return
    study = Study.read(given.study)
    if given.command == "run":
        train(study, given)
    elif given.command == "report":
        from report import report

        report(study, given.results, check=given.check)
    else:
        parser.error("give run or report, or --smoke")


if __name__ == "__main__":
    main()
