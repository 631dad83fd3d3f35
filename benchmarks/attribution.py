"""How well do scores of training rows predict retraining, what do they cost, what do they find?

    python benchmarks/attribution.py --json benchmarks/results/attribution.json

Tweets and movie sentences, LoRA in the last two layers of MiniLM on cached states of the layers
below (`attribution_runs`). Parts: ``smooth``, on development seeds and rows alone, which change
makes a run smooth; ``methods``, every method against the same retrainings; ``cost``; ``suspects``.
A run is an entry of the JSON file, which is written after every few retrainings: an interrupted
benchmark goes on from it, and a method that is added later needs no new retrainings.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import keep_memory
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from attribution_runs import (
    DEVELOPMENT_SEEDS,
    TRAIN,
    Recipe,
    Rows,
    actual,
    draw,
    level,
    random_rows,
    trained,
)
from text_data import quiet

from hyperopt_peft.attribution import Check
from hyperopt_peft.attribution.methods import Method, Setting, scores

Row = dict[str, Any]
SHARE = 0.05
ROUGH = Recipe()
SMOOTH = Recipe(batch=32, rate=1e-3, warm_up=0.2, epsilon=1e-4)
#: One change of the rough run each, then all of them.
CHANGES = {
    "rough": ROUGH,
    "batches of 32": replace(ROUGH, batch=SMOOTH.batch),
    "lower rate": replace(ROUGH, rate=SMOOTH.rate),
    "warm-up and decay": replace(ROUGH, warm_up=SMOOTH.warm_up),
    "larger epsilon": replace(ROUGH, epsilon=SMOOTH.epsilon),
    "smooth": SMOOTH,
}


class Runs:
    """The entries of a JSON file, one a run; `save` writes them."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        known = path is not None and path.exists()
        self.rows: list[Row] = json.loads(path.read_text())["runs"] if path and known else []

    def entry(self, **key: Any) -> Row:
        """The entry with ``key``, which is made if there is none."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        self.rows.append(dict(key))
        return self.rows[-1]

    def save(self, **more: Any) -> None:
        """Write the entries, one a line, and ``more``."""
        if self.path is None:
            return
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        rest = "".join(f",\n{json.dumps(k)}: {json.dumps(v, indent=1)}" for k, v in more.items())
        self.path.write_text(f'{{"runs": [\n{lines}\n]{rest}\n}}\n')


class Trained:
    """A run that is trained when it is first asked for."""

    def __init__(self, rows: Callable[[], Rows], recipe: Recipe, seed: int) -> None:
        self.make = lambda: trained(level(rows(), recipe, seed), recipe)
        self.known: Setting | None = None

    @property
    def setting(self) -> Setting:
        """The run and Φ."""
        if self.known is None:
            self.known = self.make()
        return self.known


def retrain(runs: Runs, row: Row, run: Trained, seed: int, retrainings: int) -> list[Tensor]:
    """Fill up the entry's changes of Φ in retrainings; the rows that each leaves out."""
    masks = random_rows(TRAIN, SHARE, retrainings, seed)
    known = row.setdefault("actual", [])
    while len(known) < retrainings:
        known += actual(run.setting, masks[len(known) : len(known) + 2]).tolist()
        runs.save()
    return masks


def predicted(values: Tensor, masks: Sequence[Tensor]) -> list[float]:
    """The changes of Φ that scores predict: minus the sum over the rows left out."""
    return [-float(values[out].sum()) for out in masks]


def smoothness(setting: Setting, method: Method, here: Tensor, seed: int) -> float:
    """The cosine between the scores and those at weights 1 ± 0.1; see `Check`."""
    source = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (TRAIN,), generator=source) * 2 - 1
    with setting.run.repeated(1 + 0.1 * signs.float(), keep=True) as checkpoints:
        there = scores(setting, method, checkpoints)[0]["all"]
    return float(torch.cosine_similarity(here, there, dim=0))


def whole_run(runs: Runs, row: Row, run: Trained, seed: int) -> None:
    """Scores of the whole run, and its metasmoothness."""
    if "metasmoothness" in row:
        return
    setting, method = run.setting, Method.of("unrolled")
    values = scores(setting, method, setting.run.checkpoints)[0]["all"]
    row["whole run"] = values.tolist()
    row["metasmoothness"] = smoothness(setting, method, values, seed)
    row["loss"] = setting.value()["all"]
    runs.save()


def smooth(runs: Runs, retrainings: int) -> None:
    """Which change makes a run smooth, on development seeds."""
    for task, seed in zip(("tweets", "movies"), DEVELOPMENT_SEEDS):
        for name, recipe in CHANGES.items():
            row = runs.entry(part="smooth", task=task, seed=seed, recipe=repr(recipe))
            row["name"] = name
            run = Trained(lambda task=task, seed=seed: draw(task, seed), recipe, seed)
            whole_run(runs, row, run, seed)
            masks = retrain(runs, row, run, seed, retrainings)
            check = Check(
                torch.tensor(predicted(torch.tensor(row["whole run"]), masks)),
                torch.tensor(row["actual"]),
                row["metasmoothness"],
                SHARE,
            )
            print(task, name, check, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--retrainings", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    quiet()
    runs = Runs(given.json)
    smooth(runs, given.retrainings)


if __name__ == "__main__":
    main()
