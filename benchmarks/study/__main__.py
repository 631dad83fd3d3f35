"""What is BiDoRA good for? Tasks × methods × training rows × passes × seeds.

python benchmarks/study run               # all that has no result yet; goes on from the file
python benchmarks/study run --quick       # a tiny study that is printed and not kept, in a minute
python benchmarks/study report            # tables and figure, from the results alone
python benchmarks/study report --check    # do they differ from those that are committed?
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[0] = str(HERE.parents[1])

from benchmarks.store import Store, opened  # noqa: E402
from benchmarks.study.plan import Study, quick  # noqa: E402


def train(study: Study, store: Store) -> None:
    """Every run without a result, each saved when it ends."""
    from benchmarks.study.training import measure

    for run in study.runs(store):
        if store.get(run.key):
            continue
        result = measure(run, test=run.seed in study.seeds)
        names = ("task", "size", "method", "seed", "rate", "options", "passes")
        store.save({"key": run.key, **result})
        score = result.get("test", result["held_out"])["score"]
        print(
            *(getattr(run, name) for name in names),
            f"score {score:.3f} in {result['seconds']:.0f} s",
            flush=True,
        )


def main() -> None:
    """Train, or report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--results", type=Path, default=HERE.parent / "results/study.jsonl")
    parser.add_argument("--quick", action="store_true", help="a few short runs, printed, not kept")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 where the page would change"
    )
    options = parser.parse_args()
    from benchmarks.study.report import report, sections

    study = quick() if options.quick else Study()
    if options.command == "report":
        report(study, Store(options.results), check=options.check)
        return
    store = opened(options)
    train(study, store)
    store.finish()
    print(sections(study, store))


if __name__ == "__main__":
    main()
