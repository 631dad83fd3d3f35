"""Does a learned mix of sources beat simple baselines, and search at equal passes?

    python benchmarks/mix cells

A few trusted rows of a task, and sources whose labels are doubtful: questions with the votes of 68
labelling functions (TREC; the rows are in a folder of their own, ``--trec``), tweets of twelve
annotators, and sentiment of four domains with flipped and shuffled copies. A logistic head on the
frozen MiniLM, or LoRA in the last layer on cached states (`learners`). `methods` has the ways to
train: loops of this benchmark, not `MixTrainer`. Each chooses its settings by cross-validated
trusted loss; those of the learned mix were chosen on development seeds and rows alone. An
interrupted benchmark goes on from its file.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score

from benchmarks.measure import show
from benchmarks.mix import tasks
from benchmarks.mix.learners import Head, Learner, Lora, Passes
from benchmarks.mix.methods import (
    Method,
    Recipe,
    Trained,
    by_accuracy,
    by_log_odds,
    continued,
    filtered,
    held_out,
    learnt,
    mixed,
    searched,
    trusted_only,
)
from benchmarks.mix.tables import LEARNT, SEARCH, tables_of
from benchmarks.mix.tasks import BAD, DEVELOPMENT_SEEDS, GOOD, Task
from benchmarks.pages import RESULTS
from benchmarks.store import Row, Store, opened, run_parser

SEEDS, FOLDS = range(5), 3
#: Task, model, trusted rows.
CELLS = [
    *(("trec", "head", trusted) for trusted in (30, 60, 110, 260)),
    ("annotators", "lora", 60),
    *(("domains", "lora", trusted) for trusted in (32, 64)),
    *(("trec", "lora", trusted) for trusted in (30, 60)),
]
NAMES = list(dict.fromkeys(f"{task}-{model}" for task, model, _ in CELLS))
#: Chosen on the development seeds.
RECIPES = {"head": Recipe(), "lora": Recipe(prior=None, rate=0.3)}


@dataclass(frozen=True)
class Way:
    """A method, and the settings that it chooses from.

    ``judged``: its cross-validated trusted loss is measured though there is nothing to choose.
    """

    variants: Sequence[tuple[str, Method, Learner]]
    judged: bool = True


def ways(learner: Learner, recipe: Recipe) -> dict[str, Way]:
    """All methods but the search."""
    head = isinstance(learner, Head)

    def grid(method: Method, name: str = "") -> list[tuple[str, Method, Learner]]:
        if not head:
            return [(name, method, learner)]
        return [
            (f"{name} l2={l2:g}, repeat={n}".strip(), method, replace(learner, l2=l2, repeat=n))
            for l2 in (0.03, 0.1)
            for n in (1, 10)
        ]

    def line(method: Method, field: str, values: Sequence[float]) -> Way:
        return Way([(f"{field}={x:g}", method, replace(learner, **{field: x})) for x in values])

    def one(judged: bool = False, **changes: object) -> Way:
        return Way([("", partial(learnt, recipe=replace(recipe, **changes)), learner)], judged)

    alone = ("l2", (0.01, 0.03, 0.1)) if head else ("steps", (40, 100))
    again = ("near", (0.1, 0.3, 1.0, 3.0)) if head else ("after", (20, 60))
    return {
        "trusted only": line(trusted_only, *alone),
        "all, equal weights": Way(grid(mixed)),
        "all, then trusted": line(continued, *again),
        "agreement": Way(grid(by_accuracy, "accuracy") + grid(by_log_odds, "log odds")),
        "filtered": Way(grid(filtered)),
        LEARNT: one(judged=True),
        "learnt, no prior": one(prior=0.0),
        "upper rate 0": one(rate=0.0, steps=1),
    }


def measure(runs: Store, row: Row, task: Task, way: Way) -> None:
    """Choose by cross-validated trusted loss, train, and test once."""
    begin = time.process_time()
    judged = way.judged or len(way.variants) > 1
    losses = [held_out(m, learner, task, FOLDS) for _, m, learner in way.variants if judged]
    means = [float(each.mean()) for each in losses]
    chosen = means.index(min(means)) if judged else 0
    name, method, learner = way.variants[chosen]
    learner.passes.count = 0.0
    trained = method(learner, task)
    row |= {"setting": name, "passes": learner.passes.count, **tested(learner, task, trained)}
    if judged:
        row["cv"] = [round(float(loss), 3) for loss in losses[chosen]]
    row["seconds"] = round(time.process_time() - begin, 2)
    runs.save(row)


def tested(learner: Learner, task: Task, trained: Trained) -> Row:
    """Accuracy and loss of the test rows, and whether weights separate good from bad sources."""
    losses, right = learner.outcome(task, trained.model, task.test)
    row = {"accuracy": float(right.double().mean()), "loss": float(losses.mean())}
    row["tests"] = right.numel()
    if trained.weights is not None:
        row["trusted share"] = float(trained.weights.shares()[-1])
        u = trained.weights.logits.detach()[:-1]
        if len(u) == len(task.quality):
            of = (task.quality == GOOD) | (task.quality == BAD)
            row["auc"] = float(roc_auc_score(task.quality[of] == GOOD, u[of]))
            row["u"] = [round(float(x), 2) for x in trained.weights.logits]
    return row


def draw(name: str, model: str, trusted: int, seed: int) -> Task:
    """The rows of ``seed`` with ``trusted`` trusted ones."""
    source = torch.Generator().manual_seed(seed)
    if name == "trec":
        return tasks.trec(model, trusted, source, seed in DEVELOPMENT_SEEDS)
    make = {"annotators": tasks.annotators, "domains": tasks.domains}[name]
    return make(trusted, source, seed)


def compare(
    runs: Store, seeds: Sequence[int], cells: Sequence[tuple[str, str, int]], quick: bool
) -> None:
    """Every method that the file lacks, of cells and seeds."""
    for seed in seeds:
        for name, model, trusted in cells:
            steps = {"steps": 20} if quick else {}
            learner = (
                Head(passes=Passes())
                if model == "head"
                else Lora(passes=Passes(), seed=seed, **steps)
            )
            recipe = replace(RECIPES[model], steps=3) if quick else RECIPES[model]
            key = {"part": "cells", "task": name, "model": model, "trusted": trusted, "seed": seed}
            all_ways, task = ways(learner, recipe), None
            for method in [*all_ways, SEARCH]:
                row = runs.entry(**key, method=method)
                if "accuracy" in row:
                    continue
                task = task or draw(name, model, trusted, seed)
                way = all_ways.get(method)
                if way is None:  # as many passes as the learned mix took
                    passes = runs.entry(**key, method=LEARNT)["passes"]
                    search = partial(searched, recipe=recipe, passes=passes, seed=seed)
                    way = Way([("", search, learner)], model == "head")
                measure(runs, row, task, way)
                print(name, model, trusted, seed, method, f"{row['accuracy']:.3f}", flush=True)


def main() -> None:
    """Run what is missing in the file, and print the tables of all of it."""
    title = __doc__.partition("\n")[0]
    parser = run_parser(title, RESULTS / "mix.jsonl", NAMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--trec", type=Path, help="the folder with train.jsonl and gold.jsonl")
    options = parser.parse_args()
    if options.trec:
        tasks.TREC = options.trec
    runs = opened(options)
    cells = [cell for cell in CELLS if "-".join(cell[:2]) in options.parts]
    if options.quick:
        compare(runs, options.seeds[:1], cells[:1], True)
    else:
        compare(runs, options.seeds, cells, False)
    show(tables_of(runs))
    runs.finish()
