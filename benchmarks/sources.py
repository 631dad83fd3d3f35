"""How far is the recommended mixture of sources from the best one?

    python benchmarks/sources.py FOLDER    # twenty minutes of a core; continues its file

A cell is a task, a number of trusted rows, and a draw of sources: questions with labelling
functions, or movie reviews with simulated sources (trec/ and sst2/ in FOLDER). Each mixture trains
a head on MiniLM's features. The mixture with the lowest mean loss on five folds of the trusted rows
is the recommended one; 500 test rows measure all. Tweets and sentences of four domains, on which
this rule was chosen, were of an earlier version; the file still has their 20 cells.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
# ruff: noqa: E402
import pandas
import torch
from datasets import Dataset

from benchmarks.last_layers import features
from benchmarks.measure import show
from benchmarks.pages import RESULTS
from benchmarks.store import Row, Store
from hyperopt_peft import BilevelTrainingArguments, problems
from hyperopt_peft.comparison import Runs, compare_heads
from hyperopt_peft.heads import Head
from hyperopt_peft.heads.head import OnFeatures

TASKS = ("movies", "questions")
SEEDS, TRUSTED, TESTS = range(5), (20, 60), 500
KINDS = ("right", "30 % wrong", "60 % wrong", "one label", "next class")
#: Sources by name, a row's number and its label; the trusted and the test rows.
Draw = tuple[dict[str, list[tuple[int, int]]], list[int], list[int]]


def texts_of(name: str, data: Path) -> tuple[list[str], list[int], Any]:
    """Texts, right labels, and the labels by functions if the task has some."""
    if name == "movies":
        read: dict[str, Any] = {"sep": "\t", "header": None, "quoting": 3}
        table = pandas.read_csv(data / "sst2/train.tsv", **read).sample(2000, random_state=0)
        return list(table[1]), table[0].tolist(), None
    lines = [(data / f"trec/{part}.jsonl").read_text().splitlines() for part in ("gold", "train")]
    gold, train = (list(map(json.loads, part)) for part in lines)
    known, functions = {row["text"] for row in gold}, dict[str, list[tuple[int, int]]]()
    rows = [*gold, *(row for row in train if row["text"] not in known)]
    for number, row in enumerate(rows[len(gold) :], len(gold)):
        for function, vote in row["votes"]:
            functions.setdefault(f"function {function}", []).append((number, vote))
    functions = {name: votes for name, votes in functions.items() if len(votes) >= 30}
    return [row["text"] for row in rows], [row["label"] for row in gold], functions


def draw(labels: list[int], more: Any, trusted: int) -> Draw:
    """The sources and rows of a cell; `random` is seeded."""
    if isinstance(more, dict):  # eight functions, and 60 of the rows on which each votes
        rows, chosen = random.sample(range(len(labels)), len(labels)), random.sample([*more], 8)
        sources = {name: random.sample(v := more[name], min(60, len(v))) for name in chosen}
        return sources, rows[TESTS:][:trusted], rows[:TESTS]
    rows, sources = random.sample(range(len(labels)), len(labels)), {}
    test, first, rows, classes = rows[:TESTS], rows[TESTS:][:trusted], rows[900:], max(labels) + 1
    for k in range(5):
        kind, size = random.choice(KINDS), random.choice((40, 80, 160))
        often = float(kind[:2]) / 100 if "%" in kind else 0.0
        for row in rows[k * 200 :][:size]:
            wrong = (labels[row] + random.randrange(1, classes)) % classes
            label = wrong if random.random() < often else labels[row]
            label = {"one label": 1, "next class": (label + 1) % classes}.get(kind, label)
            sources.setdefault(f"{k}: {kind}", []).append((row, label))
    return sources, first, test


def accuracy(outputs: Any) -> dict[str, float]:
    """The share of right classes."""
    return {"accuracy": float((outputs.predictions.argmax(1) == outputs.label_ids).mean())}


def measured(x: torch.Tensor, labels: list[int], cell: Draw) -> dict[str, Any]:
    """The losses on the folds and the test accuracy of every mixture."""
    sources, *both = cell
    rows = [(row, label, name) for name, pairs in sources.items() for row, label in pairs]
    columns = zip(("features", "labels", "source"), map(list, zip(*rows)), strict=True)
    trusted, test = (
        Dataset.from_dict({"features": each, "labels": [labels[row] for row in each]})
        for each in both
    )
    others = {name: [each for each in sources if each != name] for name in sources}
    mixtures: dict[str, Any] = {
        "each source alike": problems.EqualSources(),
        "everything, equal weights": problems.LoRA(),
        "trusted rows 10 times": problems.TrustedRepeated(times=10),
        "trusted rows 30 times": problems.TrustedRepeated(times=30),
        "trusted rows alone": problems.SomeSources(),
        **{f"without {name}": problems.SomeSources(rest) for name, rest in others.items()},
        "weights by agreement": problems.Agreement(),
        "weights by log odds of agreement": problems.Agreement(log_odds=True),
        "learned weights": problems.Sources(),
    }
    head, args = Head(x.shape[1], max(labels) + 1), BilevelTrainingArguments("unused")
    options: dict[str, Any] = {"train_dataset": Dataset.from_dict(dict(columns))}
    options |= {"upper_dataset": trusted, "compute_metrics": accuracy}
    options["runs"] = Runs(progress=False)
    judged: dict[str, dict[str, Any]] = {"loss": {"folds": 5}}
    judged["accuracy"] = {"test_dataset": test, "seeds": range(2)}
    model, scores = lambda: OnFeatures(x, head), dict[str, Any]()
    for metric, more in judged.items():
        result = compare_heads(mixtures, model, args, metric=metric, **options, **more)
        found = result.scores()
        scores[metric] = {name: found[name].tolist() for name in mixtures}
    return scores


def table(cells: list[Row]) -> list[Row]:
    """The mean and the largest distance of each mixture to the best mixture's accuracy."""
    lines = []
    for name in ("recommended", *(x for x in cells[0]["loss"] if not x.startswith("without"))):
        gaps = []
        for cell in cells:
            losses = {mixture: fmean(values) for mixture, values in cell["loss"].items()}
            means = {mixture: fmean(values) for mixture, values in cell["accuracy"].items()}
            chosen = min(losses, key=losses.__getitem__) if name == "recommended" else name
            gaps.append(max(means.values()) - means[chosen])
        lines.append({"mixture": name, "mean": fmean(gaps), "worst": max(gaps)})
    return lines


def main() -> None:
    """Run the cells that the file lacks, and print the table."""
    runs = Store(RESULTS / "sources.jsonl")
    for name in TASKS:
        keys: list[Row] = [{"task": name, "trusted": t, "seed": s} for s in SEEDS for t in TRUSTED]
        if not (keys := [key for key in keys if "loss" not in runs.entry(**key)]):
            continue
        texts, labels, more = texts_of(name, Path(sys.argv[1]))
        x = features(texts, [0] * len(texts), 48).x
        for key in keys:
            random.seed(str(key))
            runs.save(runs.entry(**key) | measured(x, labels, draw(labels, more, key["trusted"])))
            print(*key.values(), flush=True)
    show({"Distance to the best mixture": table([r for r in runs.rows if r["task"] in TASKS])})


if __name__ == "__main__":
    main()
