"""How well do scores of training rows predict retraining, what do they cost, what do they find?

    python benchmarks/attribution.py --json benchmarks/results/attribution.json

Tweets and movie sentences, LoRA in the last two layers of MiniLM on cached states of the layers
below (`attribution_runs`). Parts: ``smooth``, on development seeds and rows alone, which change
makes a run smooth; ``methods``, every method against the same retrainings; ``cost``; ``suspects``.
A run is an entry of the JSON file, which is written after every few retrainings: an interrupted
benchmark goes on from it, and a method that is added later needs no new retrainings.
Seconds are those of one thread's processor time, which other processes do not lengthen.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import Target, contents, keep_memory, table
from sklearn.metrics import roc_auc_score
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from attribution_peers import peers
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
from hyperopt_peft.attribution.suspects import suspects
from hyperopt_peft.diagnostics.memory import peak_memory
from hyperopt_peft.hypergradients import registered
from hyperopt_peft.utils.random_state import RandomState

Row = dict[str, Any]
TASKS, SEEDS = ("tweets", "movies"), (0, 1, 2)
SHARE, RETRAININGS, DEVELOPMENT_RETRAININGS = 0.05, 50, 20
SHARES = (0.1, 0.2, 0.4)
PARTS = ("smooth", "methods", "cost", "memory", "suspects")

ROUGH = Recipe()
#: Chosen by the part ``smooth``.
SMOOTH = Recipe(batch=32, rate=2e-3, warm_up=0.2, epsilon=1e-3)
#: With a large epsilon the rate of the smooth run is no lower: its steps are shorter at any rate.
LOWER_RATE = 5e-4
#: The rough run, the smooth one, and each change of the rough one alone.
CHANGES = {
    "rough": ROUGH,
    "smooth": SMOOTH,
    "larger batches": replace(ROUGH, batch=SMOOTH.batch),
    "lower rate": replace(ROUGH, rate=LOWER_RATE),
    "warm-up and decay": replace(ROUGH, warm_up=SMOOTH.warm_up),
    "larger epsilon": replace(ROUGH, epsilon=SMOOTH.epsilon),
    "smooth, with dropout": replace(SMOOTH, dropout=0.1),
}
SETTINGS = {"rough": ROUGH, "smooth": SMOOTH}
#: Of the solvers: chosen on the development seeds among these, by the LDS of ``minres``.
DAMPINGS = (0.01, 0.1, 1.0)
DAMPING = 0.1
WHOLE = "unrolled"
LONG, BATCH_OF_LONG = 1000, 4


def methods() -> list[str]:
    """The names of all methods and of the peers that are installed."""
    return [
        WHOLE,
        *(f"{name}:steps=5,damping={DAMPING:g}" for name in ("minres", "cg")),
        f"nystrom:rank=5,steps=5,damping={DAMPING:g}",
        *(["kfac:steps=0", f"kfac:steps=5,damping={DAMPING:g}"] if "kfac" in registered() else []),
        "gradient",
        "gradient:cosine=true",
        "gradient:checkpoints=5",
        *peers(),
    ]


def by_name(setting: Setting, name: str) -> tuple[Tensor, Mapping[str, float]]:
    """The scores of a method or a peer, and of a method its passes in trainings."""
    if name in peers():
        return peers()[name](setting), {}
    method = Method.of(name)
    if "cosine" in name:  # a backward pass for each row, through the graph of its part
        setting = replace(setting, rows=lambda: _single(setting))
    found, report = scores(setting, method, setting.run.checkpoints)
    passes = report.passes.gradients + report.passes.products
    run = setting.run
    visits = float(run.visits.sum()) / len(run.visits)
    unit = len(run.steps) if method.whole_run else visits
    return found["all"], {"trainings": passes / unit}


def _single(setting: Setting) -> Sequence[Any]:
    """All rows, a row a part."""
    from hyperopt_peft.trainer.accumulation import MicroBatch

    state = RandomState.capture()
    return [MicroBatch(row, state) for row in torch.arange(len(setting.run.center)).split(1)]


class Runs:
    """The entries of a JSON file, one a run."""

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

    def of(self, part: str) -> list[Row]:
        """The entries of a part."""
        return [row for row in self.rows if row["part"] == part]

    def save(self, more: Mapping[str, Any] | None = None) -> None:
        """Write the entries, one a line, and ``more``."""
        if self.path is None:
            return
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        rest = [f",\n{json.dumps(k)}: {json.dumps(v, indent=1)}" for k, v in (more or {}).items()]
        self.path.write_text(f'{{"runs": [\n{lines}\n]{"".join(rest)}\n}}\n')


class Trained:
    """A run that is trained when it is first asked for."""

    def __init__(self, rows: Rows | Callable[[], Rows], recipe: Recipe, seed: int) -> None:
        self.rows, self.recipe, self.seed = rows, recipe, seed
        self.known: Setting | None = None

    @property
    def setting(self) -> Setting:
        """The run and Φ."""
        if self.known is None:
            rows = self.rows() if callable(self.rows) else self.rows
            self.known = trained(level(rows, self.recipe, self.seed), self.recipe)
        return self.known


def retrain(runs: Runs, row: Row, run: Trained, seed: int, retrainings: int) -> list[Tensor]:
    """Fill up the entry's changes of Φ in retrainings; returns the rows that each leaves out."""
    masks = random_rows(TRAIN, SHARE, retrainings, seed)
    known = row.setdefault("actual", [])
    while len(known) < retrainings:
        begin, count = time.process_time(), min(5, retrainings - len(known))
        known += rounded(actual(run.setting, masks[len(known) : len(known) + count]))
        row["seconds of a retraining"] = (time.process_time() - begin) / count
        runs.save()
    return masks


def predicted(values: Tensor, masks: Sequence[Tensor]) -> list[float]:
    """The changes of Φ that scores predict: minus the sum over the rows left out."""
    return [-float(values[out].sum()) for out in masks]


def rounded(values: Iterable[float]) -> list[float]:
    """``values`` with eight digits, for a file."""
    return [float(f"{value:.8g}") for value in values]


def smoothness(setting: Setting, method: Method, here: Tensor, seed: int) -> float:
    """The cosine between the scores and those at weights 1 ± 0.1; see `Check`."""
    source = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (len(here),), generator=source) * 2 - 1
    with setting.run.repeated(1 + 0.1 * signs.float(), keep=True) as checkpoints:
        there = scores(setting, method, checkpoints)[0]["all"]
    return float(torch.cosine_similarity(here, there, dim=0))


def score(runs: Runs, row: Row, run: Trained, names: Sequence[str], masks: list[Tensor]) -> None:
    """Fill up the entry with what the methods ``names`` predict, and what they cost."""
    known = row.setdefault("methods", {})
    for name in names:
        if len(known.get(name, {}).get("predicted", ())) >= len(masks):
            continue
        setting, begin = run.setting, time.process_time()
        values, cost = by_name(setting, name)
        seconds = time.process_time() - begin
        known[name] = {"predicted": rounded(predicted(values, masks)), "seconds": seconds, **cost}
        if name == WHOLE:
            row["loss"] = setting.value()["all"]
            row["metasmoothness"] = smoothness(setting, Method.of(name), values, run.seed)
        runs.save()


def check(row: Row, name: str) -> Check:
    """What an entry's retrainings say of the method ``name``."""
    found = torch.tensor(row["methods"][name]["predicted"], dtype=torch.float64)
    truth = torch.tensor(row["actual"], dtype=torch.float64)
    smooth = row.get("metasmoothness") if name == WHOLE else None
    return Check(found[: len(truth)], truth, smooth, SHARE)


def smooth(runs: Runs, quick: bool) -> None:
    """Which change makes a run smooth, and the solvers' damping, on development seeds."""
    for task, seed in zip(TASKS, DEVELOPMENT_SEEDS):
        for name, recipe in CHANGES.items():
            row = runs.entry(part="smooth", task=task, seed=seed, recipe=repr(recipe))
            row["name"] = name
            count = 5 if quick else DEVELOPMENT_RETRAININGS
            run = Trained(lambda task=task, seed=seed: draw(task, seed), recipe, seed)
            masks = random_rows(TRAIN, SHARE, count, seed)
            score(runs, row, run, [WHOLE], masks)
            retrain(runs, row, run, seed, count)
            if recipe in SETTINGS.values():
                names = [f"minres:steps=5,damping={damping:g}" for damping in DAMPINGS]
                score(runs, row, run, names, masks)
            print(task, name, check(row, WHOLE), flush=True)


def compare(runs: Runs, quick: bool) -> None:
    """Every method against the same retrainings."""
    for seed in SEEDS[:1] if quick else SEEDS:
        for setting, recipe in SETTINGS.items():
            for task in TASKS[:1] if quick else TASKS:
                recipe = replace(recipe, epochs=1.0) if quick else recipe
                row = runs.entry(part="methods", task=task, seed=seed, recipe=repr(recipe))
                row["setting"] = setting
                count = 5 if quick else RETRAININGS
                run = Trained(lambda task=task, seed=seed: draw(task, seed), recipe, seed)
                masks = random_rows(TRAIN, SHARE, count, seed)
                score(runs, row, run, [WHOLE, "gradient"], masks)
                retrain(runs, row, run, seed, count)
                score(runs, row, run, methods(), masks)
                for name in row["methods"]:
                    print(task, setting, seed, name, check(row, name), flush=True)


def cost(runs: Runs, quick: bool) -> None:
    """Passes, time and memory of the whole run."""
    for name, recipe in SETTINGS.items():
        recipe = replace(recipe, epochs=1.0) if quick else recipe
        row = runs.entry(part="cost", task="tweets", recipe=repr(recipe))
        row["setting"] = name
        rounds = row.setdefault("rounds", [])
        while len(rounds) < (1 if quick else 3):
            rounds.append(timed(recipe, memory_limit=1.0))
            runs.save()
    long = replace(ROUGH, batch=BATCH_OF_LONG, epochs=(20 if quick else LONG) * 4 / TRAIN)
    row = runs.entry(part="cost", task="tweets", recipe=repr(long))
    row["setting"] = f"{long.steps} steps"
    lower = level(draw("tweets", 0), long, 0)
    size = sum(v.numel() * v.element_size() for v in lower.variables)
    limit = 50 * size / 2**30  # 16 points of variables and two moments
    if "rounds" not in row:
        row["rounds"] = [timed(long, memory_limit=limit)]
        runs.save()
    if "memory" not in row:
        one = replace(long, epochs=BATCH_OF_LONG / TRAIN)
        row["memory of one step"] = peak(one, limit) / size
        row["memory"] = peak(long, limit) / size - row["memory of one step"]
        runs.save()


def memory(runs: Runs, quick: bool) -> None:
    """The peak memory of each method on a run, with all activations."""
    recipe = replace(SMOOTH, epochs=1.0) if quick else SMOOTH
    row, run = runs.entry(part="memory", recipe=repr(recipe)), Trained(draw("tweets", 0), recipe, 0)
    sizes = row.setdefault("adapters", {})
    for name in methods():
        if name not in sizes:
            setting = run.setting
            size = sum(v.numel() * v.element_size() for v in setting.run.level.variables)
            found = peak_memory(lambda name=name: by_name(run.setting, name), torch.device("cpu"))
            sizes[name] = found / size
            runs.save()


def timed(recipe: Recipe, memory_limit: float) -> Row:
    """Seconds of a plain training and of training and scores; the latter's passes in trainings."""
    lower = level(draw("tweets", 0), recipe, 0)
    begin = time.process_time()
    for _ in range(recipe.steps):
        evaluation = lower.gradient(lower.next_batch(), lower.variables)
        lower.step(evaluation.gradient, 0.0)
    plain = time.process_time() - begin
    lower = level(draw("tweets", 0), recipe, 0)
    begin = time.process_time()
    setting = trained(lower, recipe, memory_limit)
    _, passes = by_name(setting, WHOLE)
    whole = time.process_time() - begin
    return {"plain": plain, "whole": whole, "trainings": 1 + passes["trainings"]}


def peak(recipe: Recipe, memory_limit: float) -> int:
    """The peak memory of training and scores in bytes, every row as long as the longest."""
    rows = draw("tweets", 0)
    whole = replace(rows.states, mask=torch.ones_like(rows.states.mask))
    lower = level(replace(rows, states=whole), recipe, 0)
    return peak_memory(
        lambda: by_name(trained(lower, recipe, memory_limit, chunk=1), WHOLE), torch.device("cpu")
    )


def find(runs: Runs, quick: bool) -> None:
    """Which ranking finds wrong labels."""
    kinds = [(noise, share) for noise in ("uniform", "class-dependent") for share in SHARES]
    cases = [(task, *kind) for task in TASKS for kind in kinds]
    cases += [(f"raters of {task}", "real", 0.0) for task in TASKS]
    for seed in SEEDS[:1] if quick else SEEDS:
        for task, noise, share in cases[1:2] if quick else cases:
            row = runs.entry(part="suspects", task=task, noise=noise, share=share, seed=seed)
            if "auc" not in row:
                recipe = replace(SMOOTH, epochs=1.0) if quick else SMOOTH
                run = Trained(draw(task, seed, noise, share), recipe, seed)
                row |= ranked(run)
                runs.save()
            print(row, flush=True)


def ranked(run: Trained) -> Row:
    """The area under the curve of each ranking of the wrong labels."""
    assert isinstance(run.rows, Rows)
    setting, wrong, labels = run.setting, run.rows.wrong, run.rows.labels
    whole, gradient = (by_name(setting, name)[0] for name in (WHOLE, "gradient"))
    losses = setting.run.losses / setting.run.visits
    found = suspects(setting, labels, whole, losses, 5, 0)
    orders = {
        "library (`suspects`)": -found.confidence,
        "out-of-fold probability": -found.probabilities.gather(1, labels[:, None])[:, 0],
        "mean training loss": losses,
        "score of the whole run": whole,
        "score by gradients": gradient,
    }
    if find_spec("cleanlab"):
        from cleanlab.rank import get_label_quality_scores

        for name, options in (
            ("cleanlab, self-confidence", {}),
            ("cleanlab, adjusted", {"adjust_pred_probs": True}),
        ):
            quality = get_label_quality_scores(
                labels.numpy(), found.probabilities.numpy(), method="self_confidence", **options
            )
            orders[name] = -torch.from_numpy(quality)
    auc = {name: float(roc_auc_score(wrong, order)) for name, order in orders.items()}
    return {"wrong": int(wrong.sum()), "auc": auc}


def mean(values: Iterable[float]) -> float | None:
    """The mean, None of nothing."""
    known = list(values)
    return statistics.fmean(known) if known else None


def smooth_table(rows: Sequence[Row]) -> list[Row]:
    """A row for each change, means over the development seeds."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        named = [r for r in rows if r["name"] == name and len(r.get("actual", ())) > 4]
        checks = [check(r, WHOLE) for r in named]
        if checks:
            found.append(
                {
                    "run": name,
                    "LDS": mean(c.lds for c in checks),
                    "slope": mean(c.slope for c in checks),
                    "metasmoothness": mean(c.metasmoothness for c in checks if c.metasmoothness),
                    "loss": mean(r["loss"] for r in named),
                    "runs": len(checks),
                    "retrainings": sum(len(c.actual) for c in checks),
                }
            )
    return found


def damping_table(rows: Sequence[Row]) -> list[Row]:
    """The LDS of the solver with each damping, means over the development seeds."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        named = [r for r in rows if r["name"] == name and len(r.get("methods", ())) > 1]
        for method in dict.fromkeys(m for r in named for m in r["methods"] if m != WHOLE):
            checks = [check(r, method) for r in named if method in r["methods"]]
            lds = mean(c.lds for c in checks)
            found.append({"run": name, "method": method, "LDS": lds, "runs": len(checks)})
    return found


def methods_table(rows: Sequence[Row], setting: str) -> list[Row]:
    """A row for each method: means over the seeds on each task, cost over all."""
    rows = [r for r in rows if r["setting"] == setting and len(r.get("actual", ())) > 4]
    found = []
    for name in dict.fromkeys(name for row in rows for name in row["methods"]):
        line: Row = {"method": name}
        for task in TASKS:
            checks = [check(r, name) for r in rows if r["task"] == task and name in r["methods"]]
            line[f"{task}: LDS"] = mean(c.lds for c in checks)
            line[f"{task}: interval"] = interval(checks) if checks else None
            line[f"{task}: slope"] = mean(c.slope for c in checks)
        known = [r["methods"][name] for r in rows if name in r["methods"]]
        line["trainings"] = mean(m["trainings"] for m in known if "trainings" in m)
        line["time"] = statistics.median(
            r["methods"][name]["seconds"] / r["seconds of a retraining"]
            for r in rows
            if name in r["methods"]
        )
        line["seeds"] = len({r["seed"] for r in rows if name in r["methods"]})
        found.append(line)
    return found


def interval(checks: Sequence[Check]) -> str:
    """The 95 % interval of the mean LDS of runs, each with the error of its retrainings."""
    halves = [(c.interval[1] - c.interval[0]) / 2 for c in checks]
    half = sum(h * h for h in halves) ** 0.5 / len(checks)
    middle = statistics.fmean(sum(c.interval) / 2 for c in checks)
    return f"{middle - half:.2f} to {min(middle + half, 1.0):.2f}"


def suspects_table(rows: Sequence[Row]) -> list[Row]:
    """A row for each kind of noise: the areas, means over the seeds."""
    rows, found = [row for row in rows if "auc" in row], []
    for key in dict.fromkeys((r["task"], r["noise"], r["share"]) for r in rows):
        same = [r for r in rows if (r["task"], r["noise"], r["share"]) == key]
        wrong = statistics.fmean(r["wrong"] for r in same) / TRAIN
        names = dict.fromkeys(name for r in same for name in r["auc"])
        areas = {n: mean(r["auc"][n] for r in same if n in r["auc"]) for n in names}
        found.append(
            {"texts": key[0], "noise": key[1], "wrong": wrong, **areas, "seeds": len(same)}
        )
    return found


def cost_table(rows: Sequence[Row]) -> list[Row]:
    """A row for each length of the run; everything in trainings, memory in adapter sizes."""
    return [
        {
            "run": row["setting"],
            "passes": mean(r["trainings"] for r in row["rounds"]),
            "time": statistics.median(r["whole"] / r["plain"] for r in row["rounds"]),
            "memory of one step": row.get("memory of one step"),
            "memory beyond it": row.get("memory"),
        }
        for row in rows
        if row.get("rounds")
    ]


def tables_of(runs: Runs) -> dict[str, list[Row]]:
    """All tables that have rows."""
    found = {
        "Which change makes a run smooth (development seeds)": smooth_table(runs.of("smooth")),
        "Damping of the solvers (development seeds)": damping_table(runs.of("smooth")),
        "Rough setting": methods_table(runs.of("methods"), "rough"),
        "Smooth setting": methods_table(runs.of("methods"), "smooth"),
        "Cost of the whole run": cost_table(runs.of("cost")),
        "Peak memory of the scores, in adapter sizes": [
            {"method": name, "memory": size}
            for row in runs.of("memory")
            for name, size in row["adapters"].items()
        ],
        "Wrong labels: area under the curve": suspects_table(runs.of("suspects")),
    }
    return {title: rows for title, rows in found.items() if rows}


def targets_of(tables: Mapping[str, Sequence[Row]]) -> list[Target]:
    """The issue's targets, of what has been measured."""
    found = []
    for setting in ("Rough setting", "Smooth setting"):
        rows = {row["method"]: row for row in tables.get(setting, ())}
        for task in TASKS if WHOLE in rows else ():
            lds, slope = rows[WHOLE][f"{task}: LDS"], rows[WHOLE][f"{task}: slope"]
            if lds is None:
                continue
            others = [r[f"{task}: LDS"] for name, r in rows.items() if name != WHOLE]
            best = max(other for other in others if other is not None)
            where = f"{setting.split()[0].lower()} setting, {task}"
            if setting == "Smooth setting":
                found.append(Target(f"LDS of the whole run, {where}", lds, 0.95, True))
                found.append(Target(f"|slope − 1| of the whole run, {where}", abs(slope - 1), 0.1))
            found.append(
                Target(f"LDS of the whole run − best other method, {where}", lds - best, 0, True)
            )
    for row in tables.get("Cost of the whole run", ()):
        found.append(Target(f"attribution ÷ training, passes, {row['run']}", row["passes"], 4))
        found.append(Target(f"attribution ÷ training, time, {row['run']}", row["time"], 4.5))
        if row["memory beyond it"] is not None:
            name = f"memory beyond that of one step ÷ adapter, {row['run']}"
            found.append(Target(name, row["memory beyond it"], 80))
    key = "Wrong labels: area under the curve"
    rows_of = [row for row in tables.get(key, ()) if "cleanlab, self-confidence" in row]
    if rows_of:
        least = min(r["library (`suspects`)"] - r["cleanlab, self-confidence"] for r in rows_of)
        found.append(Target("suspects − cleanlab, area under the curve", least, 0, True))
    return found


def main() -> None:
    """Run what is missing in the JSON file, and summarise all of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="all runs; goes on from it")
    parser.add_argument("--quick", action="store_true", help="a few runs, few retrainings")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    given = parser.parse_args()
    given.device = "cpu"
    torch.set_num_threads(1)
    keep_memory()
    quiet()
    runs = Runs(given.json)
    steps = {"smooth": smooth, "methods": compare, "cost": cost, "memory": memory, "suspects": find}
    for part in given.parts:
        if not (given.quick and part == "smooth"):
            steps[part](runs, given.quick)
    tables = tables_of(runs)
    targets = targets_of(tables)
    for title, rows in tables.items():
        print(f"\n{title}\n\n{table(rows)}")
    if targets:
        print(f"\nTargets\n\n{table([target.record() for target in targets])}")
    runs.save({k: v for k, v in contents(given, tables, targets, {}).items() if k != "details"})


if __name__ == "__main__":
    main()
