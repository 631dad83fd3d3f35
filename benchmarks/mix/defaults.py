"""The defaults of a search on a head, one changed at a time, on development rows.

    python benchmarks/mix defaults

The accuracy of the learned weights' head on four development seeds of five tasks, whose test rows
are none of a reported seed. An interrupted benchmark goes on from its file.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from benchmarks.measure import mean_and_half, show
from benchmarks.mix import tasks
from benchmarks.mix.cells import Cell
from benchmarks.pages import RESULTS
from benchmarks.store import Row, Store, opened, run_parser
from hyperopt_peft.problems import head_mix
from hyperopt_peft.problems.data_sources import default_prior
from hyperopt_peft.problems.head_mix import HeadMix

CELLS = (("trec", 30), ("raters", 30), ("domains", 32), ("annotators", 60), ("copies", 32))
DEFAULT, TIGHT = "default", "cg:steps=100,tolerance=0.0001"
#: What is changed: factors of the prior τ, fields of `HeadMix`, or the solver.
CHANGES: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "τ = K/(80n)": {"factor": 0.1},
    "τ = 10K/(8n)": {"factor": 10.0},
    "rate 0.2": {"rate": 0.2},
    "rate 1.5": {"rate": 1.5},
    "5 steps": {"steps": 5},
    "45 steps": {"steps": 45},
    "λ = 0.03": {"l2": 0.03},
    "λ = 0.3": {"l2": 0.3},
    "up to 100 conjugate gradients, residual 1e-4": {"solver": TIGHT},
}


def changed(mix: HeadMix, factor: float = 1.0, **fields: Any) -> HeadMix:
    """A `HeadMix` of the same rows, ``fields`` of which and the prior's ``factor`` differ."""
    prior = factor * default_prior(len(mix.rows.names), mix.rows.n)
    return replace(mix, prior=prior, passes=0, history=[], **fields)


def measure(runs: Store, key: Row, quick: bool) -> None:
    """The changes of one task and seed."""
    if all("accuracy" in runs.entry(part="defaults", **key, change=name) for name in CHANGES):
        return
    with TemporaryDirectory(prefix="mix-") as folder:
        cell = Cell(key, folder, quick)
        x, labels = cell.test
        for name, change in CHANGES.items():
            row = runs.entry(part="defaults", **key, change=name)
            if "accuracy" in row:
                continue
            fields = dict(change)
            solver = fields.pop("solver", head_mix.SOLVER)
            mix = changed(cell.trainer.head_mix, **fields)
            begin = time.process_time()
            with patch.object(head_mix, "SOLVER", solver):
                plan = mix.learned
            row["seconds"] = time.process_time() - begin
            row["residual"] = max(step["residual"] for step in mix.history)
            row["accuracy"] = float((mix.predicted(mix.fit(plan), x) == labels).double().mean())
            runs.save(row)
            print(*key.values(), f"{row['accuracy']:.3f}", name, flush=True)


def tables_of(runs: Store) -> dict[str, list[Row]]:
    """Of each change the mean accuracy by task, and the difference to the defaults."""
    found: dict[str, dict[tuple[str, int], Row]] = {}
    for row in runs.of("defaults"):
        if "accuracy" in row:
            found.setdefault(row["change"], {})[row["task"], row["seed"]] = row
    base, lines = found.get(DEFAULT, {}), []
    for name, results in found.items():
        line: Row = {"changed": name}
        for task in dict.fromkeys(task for task, _ in base):
            scores = [r["accuracy"] for (each, _), r in results.items() if each == task]
            line[task] = f"{statistics.fmean(scores):.3f}"[1:] if scores else None
        gaps = [results[at]["accuracy"] - base[at]["accuracy"] for at in results if at in base]
        middle, half = mean_and_half(gaps)
        line["− default"] = None if name == DEFAULT else f"{middle:+.3f} ± {half:.3f}"
        line["residual"] = f"{statistics.median(r['residual'] for r in results.values()):.1g}"
        line["s"] = f"{statistics.fmean(r['seconds'] for r in results.values()):.1f}"
        lines.append(line)
    return {"Learned weights on the head, development rows": lines} if lines else {}


def main() -> None:
    """Run what is missing in the file, and print the table."""
    title = (__doc__ or "").partition("\n")[0]
    parser = run_parser(title, RESULTS / "mix_defaults.jsonl")
    parser.add_argument("--trec", type=Path, help="the folder with train.jsonl and gold.jsonl")
    options = parser.parse_args()
    if options.trec:
        tasks.TREC = options.trec
    runs = opened(options)
    cells, seeds = CELLS, tasks.DEVELOPMENT_SEEDS
    if options.quick:
        cells, seeds = CELLS[2:3], seeds[:1]
    for seed in seeds:
        for name, trusted in cells:
            measure(runs, {"task": name, "trusted": trusted, "seed": seed}, options.quick)
    show(tables_of(runs))
    runs.finish()
