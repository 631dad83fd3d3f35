"""Which features should a head read, and which rows are behind its predictions?

    python benchmarks/attribution heads

Heads on features of MiniLM before training, in two parts. ``layers``: heads on the last layer and
on three layers (as `features_of` has them). Measured are the accuracy on 600 test rows, the share
of wrong labels among the worst tenth by score, suspicion and loss (with a fifth of the labels
wrong), and the LDS. ``why``: the fewest training rows whose removal changes a prediction, in the
order of `why`, of gradient products, of the nearest rows of the predicted class, and at random;
retraining verifies each set.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.attribution.tables import SHARE
from benchmarks.attribution.uses import FOLDS, table_of, with_wrong
from benchmarks.last_layers import features
from benchmarks.measure import show
from benchmarks.pages import RESULTS
from benchmarks.store import Row, Store, opened, run_parser
from hyperopt_peft.attribution import Attribution
from hyperopt_peft.attribution.head import HeadTraining
from hyperopt_peft.attribution.scores import (
    HEAD_ESTIMATOR,
    Evaluation,
    Trained,
    parse_estimator,
    scores,
)
from hyperopt_peft.attribution.why import fewest, margins, reason_for
from hyperopt_peft.heads import Features, Head, choose_l2
from hyperopt_peft.utils.verdict import Verdict

#: Seeds below 100 were used to choose the layers that a head reads, and the λ of `why`.
SEEDS = {"layers": (0, 1, 2, 3, 4), "why": (100, 101, 102, 103, 104)}
#: Numbers of training, evaluation, pool and test rows, and of tokens per row.
TRAIN, ABOVE, POOL, TEST, LENGTH = 300, 100, 2000, 600, 24
#: The layers that a head reads; the states of the last one are the last third of the features.
LAYERS = ("last", "three")
TASKS = ("tweets", "trec", "sst2")
#: Explained rows per seed, and the range of their margins: neither a toss-up nor out of reach.
EXPLAINED, MARGINS = 15, (0.1, 2.5)


@cache
def pool(name: str) -> Features:
    """The states of three layers of up to `POOL` rows, ``(m, 3·384)``, and their classes."""
    table = table_of(name)
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(7))[:POOL]
    table = table.iloc[order.tolist()]
    return features(table.text.tolist(), table.clean.tolist(), LENGTH)


def drawn(name: str, seed: int) -> list[Features]:
    """Training, evaluation and test rows of a seed, with clean labels."""
    whole = pool(name)
    order = torch.randperm(len(whole.x), generator=torch.Generator().manual_seed(seed))
    rest = order[TRAIN + ABOVE :]
    return [
        Features(whole.x[part], whole.labels[part], torch.arange(len(part)))
        for part in (order[:TRAIN], order[TRAIN : TRAIN + ABOVE], rest[:TEST])
    ]


def reading(parts: Sequence[Features], layers: str = "three") -> list[Features]:
    """``parts`` with the states of ``layers`` side by side, standardised by the first part."""
    begin = 2 * parts[0].x.shape[1] // 3 if layers == "last" else 0
    raw = [replace(part, x=part.x[:, begin:]) for part in parts]
    return [each.standardized(raw[0]) for each in raw]


def head_on(train: Features, classes: int, *, largest: bool = True) -> HeadTraining:
    """A head at the minimum of ``train``, as in `attribute`; `why` has ``largest=False`` for λ."""
    head = Head(train.x.shape[1], classes, dtype=torch.float64)
    return HeadTraining(head, train, len(train.x), choose_l2(head, train, largest=largest))


@torch.no_grad()
def logits_of(training: HeadTraining, rows: Features) -> torch.Tensor:
    """The logits of each row."""
    return training.on_rows.logits(rows.batch())


def accuracy(training: HeadTraining, test: Features) -> float:
    """The accuracy on ``test``."""
    guess = logits_of(training, test).argmax(1)
    return float((guess == test.labels).double().mean())


def setup_of(training: HeadTraining, phi: Any) -> Trained:
    """A head's training and Φ."""
    batch = training.features.batch()
    return Trained(
        training,
        Evaluation(training.weights, phi),
        training.level,
        lambda: batch,
        probabilities=lambda rows: training.on_rows.probabilities([batch])[rows],
        labels=training.features.labels,
    )


def layers(runs: Store, name: str, seed: int) -> None:
    """Measure heads on each choice of layers."""
    row = runs.entry(part="layers", task=name, seed=seed)
    parts, ways = drawn(name, seed), row.setdefault("ways", {})
    classes = int(pool(name).labels.max()) + 1
    noisy = replace(parts[0], labels=with_wrong(parts[0].labels, classes, seed))
    wrong, estimator = noisy.labels != parts[0].labels, parse_estimator(HEAD_ESTIMATOR)
    for way in LAYERS:
        if way in ways:
            continue
        train, above, test = reading([noisy, *parts[1:]], way)
        training = head_on(train, classes)
        setup = setup_of(training, training.on_rows.mean([above.batch()]))
        result = Attribution.of(setup, estimator)
        check, count = result.check(20, share=SHARE, perturbation=None, seed=seed), len(wrong) // 10
        worst = {
            "score": result.scores.topk(count).indices,
            "suspicion": result.suspects(FOLDS, seed=seed).confidence.argsort()[:count],
            "loss": result.losses.topk(count).indices,
        }
        ways[way] = {
            "wrong labels": accuracy(training, test),
            "right labels": accuracy(head_on(reading(parts[:1], way)[0], classes), test),
            "found": {by: float(wrong[rows].double().mean()) for by, rows in worst.items()},
            "lds": check.lds,
            "slope": check.slope,
        }
        runs.save(row)


def why(runs: Store, name: str, seed: int) -> None:
    """For each order, the number of rows to remove until a prediction changes."""
    row = runs.entry(part="why", task=name, seed=seed)
    if "sizes" in row:
        return
    train, above, _ = reading(drawn(name, seed))
    training = head_on(train, int(pool(name).labels.max()) + 1, largest=False)
    margin = margins(logits_of(training, above))
    order = torch.randperm(len(margin), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [k for k in order if MARGINS[0] < margin[k] < MARGINS[1]][:EXPLAINED]
    row |= {"l2": training.settings["l2"], "sizes": [], "seconds": []}
    row["limit"] = len(training.weights) // 2
    for place in chosen:
        begin = time.process_time()
        reason = reason_for(training, above, place)
        row["seconds"].append(time.process_time() - begin)
        sizes = {"why": len(reason.rows) or None}
        for by, rows in other_orders(training, above, place, reason.predicted).items():
            found = fewest(training, above.x[place : place + 1], rows)
            sizes[by] = None if found is None else found[0]
        row["sizes"].append(sizes)
    runs.save(row)


def other_orders(
    training: HeadTraining, places: Features, place: int, predicted: int
) -> dict[str, Tensor]:
    """The training rows in the other orders, with which `why` is compared."""
    x, head, train = places.x[place : place + 1], training.on_rows.model, training.features
    here = torch.tensor([predicted])
    setup = setup_of(training, lambda: margins(head(x).logits, here)[0])
    products = scores(setup, parse_estimator("gradient"))[0]
    of_class = (train.labels == predicted).nonzero()[:, 0]
    near = (normalize(train.x[of_class]) @ normalize(x)[0]).argsort(descending=True)
    source = torch.Generator().manual_seed(place)
    return {
        "products": products.argsort(descending=True)[: int((products > 0).sum())],
        "nearest": of_class[near],
        "random": of_class[torch.randperm(len(of_class), generator=source)],
    }


def layers_table(rows: Sequence[Row]) -> list[Row]:
    """By task and layers: means over the seeds."""
    table = []
    for task in TASKS:
        of_task = [row["ways"] for row in rows if row["task"] == task]
        for way in of_task[0] if of_task else ():
            ways = [each[way] for each in of_task if way in each]
            line: Row = {"task": task, "layers": way}
            for name in ("right labels", "wrong labels"):
                line[name] = statistics.fmean(each[name] for each in ways)
            for by in ("score", "suspicion", "loss"):
                line[f"found by {by}"] = statistics.fmean(each["found"][by] for each in ways)
            for name in ("lds", "slope"):
                line[name] = statistics.fmean(each[name] for each in ways)
            table.append(line)
    return table


def why_table(rows: Sequence[Row]) -> list[Row]:
    """By task: the rows in a set, and how many times as many each other order needs."""
    table = []
    for task in dict.fromkeys(row["task"] for row in rows):
        chosen = [row for row in rows if row["task"] == task]
        sets = [(each, row["limit"]) for row in chosen for each in row["sizes"] if each["why"]]
        line: Row = {"task": task, "λ": statistics.median(row["l2"] for row in chosen)}
        line["explained"] = f"{len(sets)} of {sum(len(row['sizes']) for row in chosen)}"
        line["rows, median"] = statistics.median(each["why"] for each, _ in sets)
        for by in ("products", "nearest", "random"):
            logs = []  # of each seed; a search that ends without a set counts as its limit
            for row in chosen:
                ratios = [(s[by] or row["limit"]) / s["why"] for s in row["sizes"] if s["why"]]
                logs.append(statistics.fmean(map(math.log, ratios)))
            ratio = Verdict(logs)
            low, high = map(math.exp, ratio.interval)
            line[f"{by} ÷"] = f"{math.exp(ratio.estimate):.2f} ({low:.2f} to {high:.2f})"
        line["seconds a row"] = statistics.fmean(x for row in chosen for x in row["seconds"])
        table.append(line)
    return table


#: The tables of the page, by the marks of their places.
OF_PAGE = {"layers": "Layers that a head reads", "why": "Rows behind a prediction"}
RUNS = RESULTS / "attribution_heads.jsonl"


def tables_of(runs: Store) -> dict[str, list[Row]]:
    """All tables that have rows."""
    parts = {"layers": layers_table, "why": why_table}
    tables = {OF_PAGE[part]: make(runs.of(part)) for part, make in parts.items()}
    return {title: rows for title, rows in tables.items() if rows}


def main() -> None:
    """Run the missing entries of the file, and summarise all."""
    title = (__doc__ or "").partition("\n")[0]
    options = run_parser(title, RUNS, SEEDS).parse_args()
    runs, make = opened(options), {"layers": layers, "why": why}
    for part in options.parts:
        for task in TASKS[: 1 if options.quick else None]:
            for seed in SEEDS[part][: 1 if options.quick else None]:
                make[part](runs, task, seed)
                print(part, task, seed, flush=True)
    show(tables_of(runs))
    runs.finish()
