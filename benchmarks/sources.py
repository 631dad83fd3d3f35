"""Which rule should recommend a way to train on sources, and how far is its way from the best one?

    python benchmarks/sources.py             # ten minutes of a core; --quick: one cell of each task
    python benchmarks/sources.py --report    # the table again, from the file of the runs

A cell is a task, trusted rows, and a draw of sources and rows. Every way trains a head on MiniLM's
features. Five folds of the trusted rows are all that a rule sees; a way is measured by its accuracy
on 500 test rows. The rule is chosen on the development tasks, tweets with simulated sources and
sentences of four domains that single persons rate, and measured on two other tasks: questions
with labelling functions (the folder ``--data`` has trec/ and sst2/), and sentences of movie reviews
with simulated sources.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import pandas
import torch
from datasets import Dataset
from rated_text import DOMAINS, one_rater
from text_data import load_model, model_path, quiet, tweets
from torch import Tensor
from transformers import AutoTokenizer, DataCollatorWithPadding

from hyperopt_peft import BilevelTrainingArguments, compare_methods, problems
from hyperopt_peft.comparison.heads import OnFeatures
from hyperopt_peft.comparison.recommend import recommended
from hyperopt_peft.problems import Head
from hyperopt_peft.problems.features import features_of

RUNS = ROOT / "benchmarks/results/sources.jsonl"
TASKS = {"tweets": "development", "raters": "development", "movies": "new", "questions": "new"}
SEEDS, TRUSTED, TESTS, FOLDS = range(5), (20, 60), 500, 5
RULES = {"lowest mean loss": 0.0, "within half an error": 0.5, "within an error": 1.0}
KINDS = ("right", "30 % wrong", "60 % wrong", "one label", "next class")
#: Sources by name, (numbers of rows, labels); numbers of the trusted and of the test rows.
Draw = tuple[dict[str, tuple[list[int], list[int]]], list[int], list[int]]


def simulated(labels: list[int], classes: int, trusted: int) -> Draw:
    """Five sources of random kinds and sizes."""
    rows = random.sample(range(len(labels)), len(labels))
    test, first, rest = rows[:TESTS], rows[TESTS:][:trusted], rows[TESTS + trusted :]
    sources = {}
    for k in range(5):
        kind, size = random.choice(KINDS), random.choice((40, 80, 160))
        chosen, rest = rest[:size], rest[size:]
        given = []
        for label in (labels[row] for row in chosen):
            wrong = (label + random.randrange(1, classes)) % classes
            choices = {"right": label, "one label": 1, "next class": (label + 1) % classes}
            often = float(kind[:2]) / 100 if "%" in kind else 0.0
            given.append(choices.get(kind, wrong if random.random() < often else label))
        sources[f"{k}: {kind}"] = chosen, given
    return sources, first, test


class Task:
    """Texts with labels and features, and draws of sources."""

    def __init__(self, name: str, data: Path) -> None:
        self.name, self.classes, functions = name, 3, dict[int, list[tuple[int, int]]]()
        if name == "tweets":
            table = tweets().to_pandas().sample(2000, random_state=0)
            texts, self.labels = list(table.text), table.label.tolist()
        elif name == "raters":
            tables = [one_rater(d, seed=0).sample(800, random_state=0) for d in DOMAINS]
            texts = [text for each in tables for text in each.text]
            self.labels = [label for each in tables for label in each.clean.tolist()]
            self.noisy = [label for each in tables for label in each.noisy.tolist()]
        elif name == "movies":
            read = {"sep": "\t", "header": None, "quoting": 3}
            table = pandas.read_csv(data / "sst2/train.tsv", **read).sample(2000, random_state=0)
            texts, self.labels, self.classes = list(table[1]), table[0].tolist(), 2
        else:
            parts = [(data / f"trec/{x}.jsonl").read_text() for x in ("gold", "train")]
            gold, train = ([json.loads(line) for line in x.splitlines()] for x in parts)
            known = {row["text"] for row in gold}
            rows = [*gold, *(row for row in train if row["text"] not in known)]
            texts, self.classes = [row["text"] for row in rows], 6
            self.labels = [row.get("label", -1) for row in rows]
            for k, row in enumerate(rows[len(gold) :], len(gold)):
                for function, vote in row["votes"]:
                    functions.setdefault(function, []).append((k, vote))
        self.functions = {f"function {f}": x for f, x in functions.items() if len(x) >= 30}
        tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
        tokens = tokenizer(texts, truncation=True, max_length=48)
        rows = Dataset.from_dict({**tokens, "labels": [0] * len(texts)})
        model = load_model("minilm", ["a", "b"])
        self.x: Tensor = features_of(model, rows, DataCollatorWithPadding(tokenizer)).x

    def draw(self, trusted: int) -> Draw:
        """Sources, trusted and test rows of a cell; `random` is seeded."""
        if self.functions:
            gold = random.sample(range(1000), 1000)
            names = random.sample(sorted(self.functions), 8)
            some = {x: random.sample(v := self.functions[x], min(60, len(v))) for x in names}
            sources = {x: ([r for r, _ in v], [y for _, y in v]) for x, v in some.items()}
            return sources, gold[TESTS:][:trusted], gold[:TESTS]
        if self.name != "raters":
            return simulated(self.labels, self.classes, trusted)
        blocks = [random.sample(range(k * 800, k * 800 + 800), 800) for k in range(len(DOMAINS))]
        own = random.choice(blocks)
        test, first = own[-TESTS:], own[-TESTS - trusted : -TESTS]
        named = {d: rows[:120] for d, rows in zip(DOMAINS, blocks, strict=True)}
        return {d: (rows, [self.noisy[r] for r in rows]) for d, rows in named.items()}, first, test

    def measured(self, trusted: int, seed: int) -> dict[str, Any]:
        """The losses on the folds and the test accuracy of every way."""
        random.seed(f"{self.name} {trusted} {seed}")
        sources, first, test = self.draw(trusted)
        pairs = [(r, y, n) for n, (rows, given) in sources.items() for r, y in zip(rows, given)]
        names = ("head_row", "labels", "source")
        train = Dataset.from_dict(dict(zip(names, map(list, zip(*pairs)))))
        trusted_rows, test_rows = (
            Dataset.from_dict({"head_row": rows, "labels": [self.labels[row] for row in rows]})
            for rows in (first, test)
        )
        ways: dict[str, Any] = {
            "each source alike": problems.EqualSources(),
            "everything, equal weights": problems.LoRA(),
            "trusted rows 10 times": problems.TrustedRepeated(times=10),
            "trusted rows 30 times": problems.TrustedRepeated(times=30),
            "trusted rows alone": problems.SomeSources(),
            **{
                f"without {x}": problems.SomeSources([y for y in sources if y != x])
                for x in sources
            },
            "weights by agreement": problems.Agreement(),
            "weights by log odds of agreement": problems.Agreement(log_odds=True),
            "learned weights": problems.Sources(),
        }
        head, args = Head(self.x.shape[1], self.classes), BilevelTrainingArguments("unused")
        options: dict[str, Any] = {"train_dataset": train, "upper_dataset": trusted_rows}
        options |= {"model": "head", "progress": False}
        found = {}
        for name, more in (
            ("losses", {"folds": FOLDS}),
            ("accuracy", {"test_dataset": test_rows, "seeds": range(2), "metric": "accuracy"}),
        ):
            result = compare_methods(
                ways,
                lambda: OnFeatures(self.x, head),
                None,
                args,
                compute_metrics=accuracy,
                **options,
                **more,
            )
            found[name] = {way: result.scores(way) for way in ways}
        return found


def accuracy(outputs: Any) -> dict[str, float]:
    """The share of right classes."""
    return {"accuracy": float((outputs.predictions.argmax(1) == outputs.label_ids).mean())}


def report(cells: list[Any]) -> str:
    """The regret in accuracy of each rule, and of a few ways, in both groups of cells."""
    lines = ["| rule or way | " + " | ".join(f"{x}, mean | worst" for x in ("development", "new"))]
    lines = [lines[0] + " |", "| --- | --- | --- | --- | --- |"]
    rules: dict[str, Any] = {
        name: lambda cell, k=k: recommended(cell["losses"], True, k) for name, k in RULES.items()
    }
    fixed = [way for way in cells[0]["losses"] if not way.startswith("without")]
    rules |= {f"always {way}": lambda cell, way=way: way for way in fixed}
    for name, rule in rules.items():
        row = [name]
        for group in ("development", "new"):
            regrets = [regret(x, rule(x)) for x in cells if TASKS[x["task"]] == group] or [0.0]
            row += [f"{fmean(regrets):.3f}", f"{max(regrets):.3f}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def regret(cell: Mapping[str, Any], way: str) -> float:
    """The best way's test accuracy minus that of ``way``."""
    means = {name: fmean(values) for name, values in cell["accuracy"].items()}
    return max(means.values()) - means[way]


def main() -> None:
    """Do the cells that the file lacks, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--quick", action="store_true", help="a cell of each task, not kept")
    parser.add_argument("--report", action="store_true", help="the table alone")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    lines = RUNS.read_text().splitlines() if RUNS.exists() and not options.quick else []
    cells = [json.loads(line) for line in lines]
    for name in [] if options.report else options.tasks:
        keys = [{"task": name, "trusted": t, "seed": s} for s in SEEDS for t in TRUSTED]
        keys = [key for key in keys if not any(key.items() <= cell.items() for cell in cells)]
        task = Task(name, options.data) if keys else None
        for key in keys[: 1 if options.quick else None]:
            cells.append(key | task.measured(key["trusted"], key["seed"]))
            print(*key.values(), flush=True)
            if not options.quick:
                with RUNS.open("a") as file:
                    file.write(json.dumps(cells[-1]) + "\n")
    print(report(cells))


if __name__ == "__main__":
    main()
