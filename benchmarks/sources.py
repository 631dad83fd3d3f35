"""How far is the recommended mixture of sources from the best one?

    python benchmarks/sources.py FOLDER    # ten minutes of a core; continues its file

A cell is a task, a number of trusted rows, and a draw of sources. Each mixture trains a head on
MiniLM's features. A rule chooses a mixture by five folds of the trusted rows; 500 test rows measure
the choice. The rule was developed on tweets with simulated sources and on sentences of four domains
with single raters. New cells measure it: questions with labelling functions and movie reviews with
simulated sources (trec/ and sst2/ in FOLDER).
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
from rated_text import DOMAINS, one_rater
from text_data import load_model, model_path, quiet, tweets
from transformers import AutoTokenizer, DataCollatorWithPadding

from hyperopt_peft import BilevelTrainingArguments, compare_methods, problems
from hyperopt_peft.comparison.heads import OnFeatures
from hyperopt_peft.problems.features import features_of
from hyperopt_peft.utils.statistics import error_of

RUNS = ROOT / "benchmarks/results/sources.jsonl"
TASKS = {"tweets": "development", "raters": "development", "movies": "new", "questions": "new"}
SEEDS, TRUSTED, TESTS = range(5), (20, 60), 500
RULES = {"lowest mean loss": 0.0, "within half an error": 0.5, "within an error": 1.0}
KINDS = ("right", "30 % wrong", "60 % wrong", "one label", "next class")
#: Sources by name, a row's number and its label; the trusted and the test rows.
Draw = tuple[dict[str, list[tuple[int, int]]], list[int], list[int]]


def texts_of(name: str, data: Path) -> tuple[list[str], list[int], Any]:
    """Texts, right labels, and the task's further labels by a person or by functions."""
    if name == "tweets":
        table = tweets().to_pandas().sample(2000, random_state=0)
        return list(table.text), table.label.tolist(), None
    if name == "raters":
        tables = (one_rater(each, seed=0).sample(800, random_state=0) for each in DOMAINS)
        table = pandas.concat(tables)
        return list(table.text), table.clean.tolist(), table.noisy.tolist()
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
    if more is not None:  # four domains, of which one is the target's
        blocks = [random.sample(range(k * 800, k * 800 + 800), 800) for k in range(len(DOMAINS))]
        rows, parts = random.choice(blocks), zip(DOMAINS, blocks, strict=True)
        sources = {name: [(row, more[row]) for row in block[:120]] for name, block in parts}
        return sources, rows[-TESTS - trusted : -TESTS], rows[-TESTS:]
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
    columns = zip(("head_row", "labels", "source"), map(list, zip(*rows)), strict=True)
    trusted, test = (
        Dataset.from_dict({"head_row": each, "labels": [labels[row] for row in each]})
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
    head, args = problems.Head(x.shape[1], max(labels) + 1), BilevelTrainingArguments("unused")
    options: dict[str, Any] = {"train_dataset": Dataset.from_dict(dict(columns)), "model": "head"}
    options |= {"upper_dataset": trusted, "compute_metrics": accuracy, "progress": False}
    judged: dict[str, dict[str, Any]] = {"loss": {"folds": 5}}
    judged["accuracy"] = {"test_dataset": test, "seeds": range(2)}
    model, scores = lambda: OnFeatures(x, head), dict[str, Any]()
    for metric, more in judged.items():
        result = compare_methods(mixtures, model, None, args, metric=metric, **options, **more)
        scores[metric] = {name: result.scores(name) for name in mixtures}
    return scores


def recommended(losses: dict[str, list[float]], within: float) -> str:
    """The first mixture whose mean is at most ``within`` paired errors above the lowest mean."""
    best = min(losses.values(), key=fmean)
    gaps = {name: [a - b for a, b in zip(each, best)] for name, each in losses.items()}
    return next(name for name, gap in gaps.items() if fmean(gap) <= within * error_of(gap))


def report(cells: list[Any]) -> str:
    """A table: the distance of each rule, and each mixture, to the best mixture's accuracy."""
    mixtures = [name for name in cells[0]["loss"] if not name.startswith("without")]
    choices: dict[str, Any] = {name: lambda cell, name=name: name for name in mixtures}
    choices |= {n: lambda cell, k=k: recommended(cell["loss"], k) for n, k in RULES.items()}
    lines = ["| choice | development, mean | worst | new, mean | worst |", "|---" * 5 + "|"]
    for name, choice in choices.items():
        gaps: dict[str, list[float]] = {"development": [], "new": []}
        for cell in cells:
            means = {mixture: fmean(values) for mixture, values in cell["accuracy"].items()}
            gaps[TASKS[cell["task"]]].append(max(means.values()) - means[choice(cell)])
        of_groups = (f"{fmean(each):.3f} | {max(each):.3f}" for each in gaps.values() if each)
        lines.append(f"| {name} | {' | '.join(of_groups)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the cells that the file lacks, and print the table."""
    quiet()
    cells = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    for name in TASKS:
        keys = [{"task": name, "trusted": t, "seed": s} for s in SEEDS for t in TRUSTED]
        if not (keys := [k for k in keys if not any(k.items() <= cell.items() for cell in cells)]):
            continue
        texts, labels, more = texts_of(name, Path(sys.argv[1]))
        tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
        tokens = tokenizer(texts, truncation=True, max_length=48)
        rows = Dataset.from_dict({**tokens, "labels": [0] * len(texts)})
        x = features_of(load_model("minilm", ["-"]), rows, DataCollatorWithPadding(tokenizer)).x
        for key in keys:
            random.seed(str(key))
            cells.append(key | measured(x, labels, draw(labels, more, key["trusted"])))
            print(*key.values(), flush=True)
            with RUNS.open("a") as file:
                file.write(json.dumps(cells[-1]) + "\n")
    print(report(cells))


if __name__ == "__main__":
    main()
