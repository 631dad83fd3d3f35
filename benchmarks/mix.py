"""Does a learnt mix of sources beat simple baselines, and search at equal passes?

    python benchmarks/mix.py --json benchmarks/results/mix.json

A few trusted rows of a task, and sources whose labels are doubtful: questions with the votes of 68
labelling functions (TREC; the rows are in a folder of their own, ``--trec``), tweets of twelve
annotators, sentiment of four domains with flipped and shuffled copies, and docstrings beside other
text (`mix_documents`; it needs SmolLM2). A logistic head on the frozen MiniLM, or LoRA in the last
layer on cached states (`mix_learners`). `mix_methods` has the ways to train. Baselines choose
settings from a small grid by cross-validated trusted loss; those of the learnt mix were chosen on
development seeds and rows alone (``--parts development``). A run is an entry of the JSON file: an
interrupted benchmark goes on from it.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from measure import contents, keep_memory, table

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import mix_tasks
from attribution_tables import Runs
from mix_documents import LanguageModel, documents
from mix_learners import Head, Learner, Lora, Passes
from mix_methods import (
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
from mix_tables import LEARNT, SEARCH, Row, tables_of, targets_of
from mix_tasks import BAD, DEVELOPMENT_SEEDS, GOOD, Task, annotators, domains, trec
from sklearn.metrics import roc_auc_score
from text_data import quiet

SEEDS, FOLDS = range(5), 3
#: Task, model, trusted rows.
CELLS = [
    *(("trec", "head", trusted) for trusted in (30, 60, 110, 260)),
    ("annotators", "lora", 60),
    *(("domains", "lora", trusted) for trusted in (32, 64)),
    *(("trec", "lora", trusted) for trusted in (30, 60)),
    ("documents", "lm", 16),
]
TASKS = {"annotators": annotators, "domains": domains, "documents": documents}
#: Chosen on the development seeds.
RECIPES = {"head": Recipe(), **dict.fromkeys(("lora", "lm"), Recipe(prior=None, rate=0.3))}
PARTS = ("development", "cells")


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

    def change(**options: float) -> Learner:
        return replace(learner, **options)

    def grid(method: Method, name: str = "") -> list[tuple[str, Method, Learner]]:
        if not head:
            return [(name, method, learner)]
        return [
            (f"{name} l2={l2:g}, repeat={repeat}".strip(), method, change(l2=l2, repeat=repeat))
            for l2 in (0.03, 0.1)
            for repeat in (1, 10)
        ]

    alone = ("l2", (0.01, 0.03, 0.1)) if head else ("steps", (40, 100))
    again = ("near", (0.1, 0.3, 1.0, 3.0)) if head else ("after", (20, 60))

    language = isinstance(learner, LanguageModel)
    # The agreement of documents is no share of right votes.
    odds = [] if language else grid(by_log_odds, "log odds")

    def one(**changes: object) -> list[tuple[str, Method, Learner]]:
        return [("", partial(learnt, recipe=replace(recipe, **changes)), learner)]

    return {
        "trusted only": Way(
            [(f"{alone[0]}={x:g}", trusted_only, change(**{alone[0]: x})) for x in alone[1]]
        ),
        "all, equal weights": Way(grid(mixed)),
        "all, then trusted": Way(
            [(f"{again[0]}={x:g}", continued, change(**{again[0]: x})) for x in again[1]]
        ),
        "agreement": Way(grid(by_accuracy, "accuracy") + odds),
        "filtered": Way(grid(filtered)),
        LEARNT: Way(one()),
        "learnt, no prior": Way(one(prior=0.0), judged=False),
        "learnt, from agreement": Way(one(start="agreement"), judged=head),
        "upper rate 0": Way(one(rate=0.0, steps=1), judged=False),
    }


def measure(
    runs: Runs, row: Row, task: Task, variants: Sequence[tuple[str, Method, Learner]], judged: bool
) -> None:
    """Choose by cross-validated trusted loss, train, and test once."""
    begin = time.process_time()
    losses = [
        held_out(method, learner, task, FOLDS) if judged or len(variants) > 1 else None
        for _, method, learner in variants
    ]
    known = [float("inf") if found is None else float(found.mean()) for found in losses]
    chosen = known.index(min(known))
    name, method, learner = variants[chosen]
    learner.passes.count = 0.0
    trained = method(learner, task)
    row |= {"setting": name, "passes": learner.passes.count, **tested(learner, task, trained)}
    if losses[chosen] is not None:
        row["cv"] = [round(float(loss), 3) for loss in losses[chosen]]
    row["seconds"] = round(time.process_time() - begin, 2)
    runs.save()


def tested(learner: Learner, task: Task, trained: Trained) -> Row:
    """Accuracy and loss of the test rows, and whether weights separate good from bad sources."""
    losses, right = learner.outcome(task, trained.model, task.test)
    found = {"accuracy": float(right.double().mean()), "loss": float(losses.mean())}
    found["tests"] = right.numel()
    if trained.weights is not None:
        found["trusted share"] = float(trained.weights.shares()[-1])
        u = trained.weights.logits.detach()[:-1]
        if len(u) == len(task.quality):
            of = (task.quality == GOOD) | (task.quality == BAD)
            found["auc"] = float(roc_auc_score(task.quality[of] == GOOD, u[of]))
            found["u"] = [round(float(x), 2) for x in trained.weights.logits]
    return found


def learner_of(model: str, seed: int, quick: bool) -> Learner:
    """The learner of a cell."""
    if model == "head":
        return Head(passes=Passes())
    kind = LanguageModel if model == "lm" else Lora
    return kind(passes=Passes(), seed=seed, **({"steps": 20} if quick else {}))


def draw(name: str, model: str, trusted: int, seed: int) -> Task:
    """The rows of ``seed`` with ``trusted`` trusted ones."""
    source = torch.Generator().manual_seed(seed)
    if name == "trec":
        return trec(model, trusted, source, seed in DEVELOPMENT_SEEDS)
    return TASKS[name](trusted, source, seed)


def compare(runs: Runs, given: argparse.Namespace) -> None:
    """Every cell, seed and method that the file lacks."""
    quick = given.quick
    cells = chosen_cells(given)
    for seed in given.seeds[:1] if quick else given.seeds:
        for name, model, trusted in cells[:1] if quick else cells:
            learner, recipe = learner_of(model, seed, quick), RECIPES[model]
            recipe = replace(recipe, steps=3) if quick else recipe
            key = {"part": "cells", "task": name, "model": model, "trusted": trusted, "seed": seed}
            all_ways, task = ways(learner, recipe), None
            for method in [*all_ways, SEARCH]:
                row = runs.entry(**key, method=method)
                if "accuracy" in row:
                    continue
                task = task or draw(name, model, trusted, seed)
                if method == SEARCH:  # as many passes as the learnt mix took
                    passes = runs.entry(**key, method=LEARNT)["passes"]
                    search = partial(searched, recipe=recipe, passes=passes, seed=seed)
                    measure(runs, row, task, [("", search, learner)], model == "head")
                else:
                    way = all_ways[method]
                    measure(runs, row, task, way.variants, way.judged)
                print(
                    f"{name} {model} {trusted} {seed} {method}: {row['accuracy']:.3f}", flush=True
                )


#: Changes of the learnt mix's recipe or learner that are tried on the development seeds.
CHANGES = [
    {},
    *({"prior": prior} for prior in (0.0, 0.03, 0.1, 0.3)),
    *({"rate": rate} for rate in (0.1, 0.6)),
    {"search_batch": 16},
    {"search_batch": 16, "steps": 54},  # of seven tenths of the passes
    {"steps": 24},
    {"kind": "softmax"},
    {"average": "sources"},
    {"start": "agreement"},
]


def develop(runs: Runs, given: argparse.Namespace) -> None:
    """Settings of the learnt mix, one changed at a time, on the development seeds."""
    for name, model, trusted in chosen_cells(given):
        if trusted > 64 or given.quick:
            continue
        for seed in DEVELOPMENT_SEEDS:
            task = draw(name, model, trusted, seed)
            for change in CHANGES:
                learner, recipe = learner_of(model, seed, quick=False), RECIPES[model]
                of_learner = {k: v for k, v in change.items() if k == "search_batch"}
                if of_learner and model == "head":  # has no batches
                    continue
                key = {"part": "development", "task": name, "model": model, "trusted": trusted}
                changed = ", ".join(f"{k}={v}" for k, v in change.items()) or "none"
                row = runs.entry(**key, seed=seed, change=changed)
                if "accuracy" in row:
                    continue
                learner = replace(learner, **of_learner)
                recipe = replace(recipe, **{k: v for k, v in change.items() if k not in of_learner})
                row["recipe"] = repr(recipe)
                measure(runs, row, task, [("", partial(learnt, recipe=recipe), learner)], False)
                print(name, model, trusted, seed, row["change"], row["accuracy"], flush=True)


def chosen_cells(given: argparse.Namespace) -> list[tuple[str, str, int]]:
    """The cells that are asked for."""
    return [cell for cell in CELLS if given.tasks is None or "-".join(cell[:2]) in given.tasks]


def main() -> None:
    """Run what is missing in the JSON file, and summarise all of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="all runs; goes on from it")
    parser.add_argument("--quick", action="store_true", help="one cell and seed, few steps")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tasks", nargs="+", help="some cells alone, as in trec-head")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--trec", type=Path, help="the folder with train.jsonl and gold.jsonl")
    given = parser.parse_args()
    given.device = "cpu"
    if given.trec:
        mix_tasks.TREC = given.trec
    torch.set_num_threads(1)
    keep_memory()
    quiet()
    runs = Runs(given.json)
    if "development" in given.parts:
        develop(runs, given)
    if "cells" in given.parts:
        compare(runs, given)
    tables = tables_of(runs)
    targets = targets_of(runs)
    for title, rows in tables.items():
        print(f"\n{title}\n\n{table(rows)}")
    if targets:
        print(f"\nTargets\n\n{table([target.record() for target in targets])}")
    runs.save({k: v for k, v in contents(given, tables, targets, {}).items() if k != "details"})


if __name__ == "__main__":
    main()
