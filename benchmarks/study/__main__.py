"""What is BiDoRA good for? Tasks × methods × sizes × seeds, from one YAML.

python benchmarks/study run               # all that has no result yet
python benchmarks/study run --share 1/2   # one half, beside another process
python benchmarks/study report            # tables and figures, from the results alone
python benchmarks/study report --check    # do they differ from those that are committed?
python benchmarks/study smoke             # a tiny study in a temporary folder, in a minute
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[0] = str(HERE.parents[1])

import torch  # noqa: E402

from benchmarks.store import Store  # noqa: E402
from benchmarks.study.plan import Study  # noqa: E402

PARTS = ("variants", "rates", "table", "shift")


def train(study: Study, store: Store, share: tuple[int, int], parts: tuple[str, ...]) -> None:
    """Every run of the share without a result, each saved when it ends.

    The plan is gone through until nothing is left of which the rate is known: start again where the
    other share was slower.
    """
    from text_data import quiet

    from benchmarks.study.training import measure

    quiet()
    torch.set_num_threads(1)
    number, of = share
    trained = True
    while trained:
        trained = False
        store.reload()
        for run in study.runs(store):
            mine = run.number % of == number - 1
            if run.part not in parts or not mine or store.get(run.key):
                continue
            result, trained = measure(run), True
            names = ("part", "task", "size", "method", "seed", "rate", "options")
            store.save({"key": run.key, **{k: getattr(run, k) for k in names}, **result})
            print(run.part, run.task, run.size, run.method, run.seed, run.rate, end=" ")
            print(f"score {result['score']:.3f} in {result['seconds']:.0f} s", flush=True)


def share(text: str) -> tuple[int, int]:
    """The number of a share and the number of shares, of ``1/2``."""
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give 1/2 and 2/2, or 1/1")
    return int(number), int(of)


def smoke() -> None:
    """Run the small study, and print its tables."""
    from benchmarks.study.report import sections

    study = Study.read(HERE / "smoke.yaml")
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "study.jsonl")
        train(study, store, (1, 1), PARTS)
        for name, text in sections(study, store).items():
            print(f"\n{name}\n\n{text}")


def main() -> None:
    """Train, or report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("run", "report", "smoke"))
    parser.add_argument("--study", type=Path, default=HERE / "study.yaml")
    parser.add_argument("--results", type=Path, default=HERE.parent / "results/study.jsonl")
    parser.add_argument(
        "--share", type=share, default="1/1", help="1/2: every second run; 2/2: the others"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 where the page would change"
    )
    options = parser.parse_args()
    if options.command == "smoke":
        smoke()
        return
    study, store = Study.read(options.study), Store(options.results)
    if options.command == "run":
        train(study, store, options.share, options.parts)
    else:
        from benchmarks.study.report import report

        report(study, store, check=options.check)


if __name__ == "__main__":
    main()
