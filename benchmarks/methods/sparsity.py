"""Do weights end sparse where they learn together with the model, and not where it is solved?

arXiv:2310.17386 predicts so for row weights of a given sum. A head on MiniLM's features, 40 % wrong
labels and 60 trusted rows: `RowWeights` learns from the head after each gradient step, or from the
head at its minimum. Then a head is trained from scratch with the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from torch.optim import SGD, Adam

from benchmarks import pages
from benchmarks.measure import table
from benchmarks.methods.settings import SETTINGS
from hyperopt_peft import Engine
from hyperopt_peft.heads import Features, Head, l2_penalty, level_of, solve
from hyperopt_peft.method import INDEX, without
from hyperopt_peft.problems import RowWeights
from hyperopt_peft.utils.plots import lines

FILE, FIGURE = pages.RESULTS / "sparsity.jsonl", pages.DOCS / "sparsity.png"
TASKS, SEEDS, MARKS = ("tweets", "trec"), range(100, 105), (1, 3, 10, 30, 100, 300, 1000)
Form = Literal["sigmoid", "softmax"]
#: The weights of logits, and what they are.
FORMS: dict[Form, str] = {"sigmoid": "2σ(u)", "softmax": "n·softmax(u)"}
#: A weight up to this is near 0, where all begin with 1.
NEAR = 0.05
#: Lower steps for each upper one, the estimator, the rates of head and weights, and upper steps.
WAYS: dict[str, tuple[Any, str, float, int]] = {
    "together with the head": (1, "darts:xi=0.1", 0.1, 1000),
    "head solved": ("minimum", "cg:steps=30", 1.0, 300),
}


def sparsity(*, quick: bool = False) -> None:
    """Measure, and write the file; ``quick`` prints a few steps."""
    torch.set_num_threads(1)
    found = []
    for task in TASKS[: 1 if quick else None]:
        here = SETTINGS["wrong labels"].task(task, heads=True)
        x = here.base_model().x
        parts = [_features(x, rows) for rows in (here.train, here.trusted, here.test)]
        like = Features.joined(parts[:2])
        parts = [part.standardized(like) for part in parts]
        for seed in SEEDS[: 1 if quick else None]:
            for form, way in product(FORMS, WAYS):
                rows = parts[0], parts[1], parts[2]
                curve = measured(form, way, seed, here.classes, *rows, most=10 if quick else 1000)
                key = {"task": task, "seed": seed, "form": form, "way": way}
                found.append({**key, "curve": curve})
                print(*key.values(), curve[-1], flush=True)
    if not quick:
        FILE.write_text("\n".join(map(json.dumps, found)) + "\n")


def measured(
    form: Form,
    way: str,
    seed: int,
    classes: int,
    train: Features,
    trusted: Features,
    test: Features,
    most: int,
) -> list[tuple[int, float, float]]:
    """The upper steps, share of weights near 0 and test accuracy, at some points of a run."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(train.x), generator=draw)[: 4 * len(train.x) // 5].sort().values
    train = Features(train.x[chosen], train.labels[chosen], torch.arange(len(chosen)))
    every, estimator, rate, steps = WAYS[way]
    method, head = RowWeights(form=form), Head(train.x.shape[1], classes, dtype=train.x.dtype)
    method.rows(range(len(train.x)), range(len(trusted.x)))
    batches: list[Any] = [[without(trusted.batch(), [INDEX])], [train.batch()]]
    makers: list[Callable[[Any], Any]] = [partial(Adam, lr=0.3), partial(SGD, lr=rate)]
    upper, lower = method.levels(head, data=batches, optimizers=makers)
    lower.prior = l2_penalty()
    if every == "minimum":
        lower.optimizer = None
    engine = Engine(upper, lower, estimator, lower_steps=every, progress=False)
    curve, done = [(0, 0.0, accuracy(None, classes, train, test))], 0
    for mark in (x for x in MARKS if x <= min(steps, most)):
        engine.run(mark - done)
        weights, done = method.row_weights().detach(), mark
        near = float((weights < NEAR).double().mean())
        curve.append((mark, near, accuracy(weights, classes, train, test)))
    return curve


def accuracy(weights: Tensor | None, classes: int, train: Features, test: Features) -> float:
    """That of a head from scratch with ``weights`` of the training rows."""
    head = Head(train.x.shape[1], classes, dtype=train.x.dtype)
    solve(level_of(head, None if weights is None else weights.to(train.x)), train.batch())
    return float((head(test.x).logits.argmax(1) == test.labels).double().mean())


def _features(x: Tensor, rows: Dataset) -> Features:
    labels = torch.tensor(rows["labels"][:])
    return Features(x[rows["features"][:]], labels, torch.arange(len(labels)))


def means() -> dict[tuple[Form, str], list[tuple[float, float, float]]]:
    """By form and way the upper steps, share near 0 and accuracy, means over tasks and seeds."""
    runs = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []
    curves = {
        (form, way): [run["curve"] for run in runs if (run["form"], run["way"]) == (form, way)]
        for form, way in product(FORMS, WAYS)
    }
    return {key: [tuple(map(fmean, zip(*at))) for at in zip(*each)] for key, each in curves.items()}


def figure() -> None:
    """Write the figure, if there is a file."""
    panels: dict[str, dict[str, Any]] = {"weights near 0 (%)": {}, "accuracy (points)": {}}
    for (form, way), points in means().items():
        if points:
            steps, *values = zip(*points[1:])  # a logarithm has no 0
            for panel, each in zip(panels.values(), values, strict=True):
                panel[f"{FORMS[form]}, {way}"] = steps, [100 * x for x in each]
    if all(panels.values()):
        lines(panels, FIGURE, xscale="log", xlabel="upper steps")


def section() -> str:
    """The table, a row for each number of upper steps, as Markdown; nothing without a file."""
    rows: dict[tuple[Form, float], dict[str, Any]] = {}
    for (form, way), points in means().items():
        for step, near, right in points:
            row = rows.setdefault((form, step), {"v": FORMS[form], "upper steps": f"{step:g}"})
            row[f"near 0 (%), {way}"] = f"{100 * near:.1f}"
            row[f"accuracy, {way}"] = f"{100 * right:.1f}"
    heads = dict.fromkeys(head for row in rows.values() for head in row)
    cells = [{head: row.get(head) for head in heads} for row in rows.values()]
    return f"{table(cells)}\n" if cells else ""
