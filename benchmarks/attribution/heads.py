"""Which rows are behind a head's predictions?

    python benchmarks/attribution heads

Heads on features of MiniLM before training. For each prediction, the fewest training rows whose
removal changes it, in the order of `why`, of gradient products, of the nearest rows of the
predicted class, and at random; retraining verifies each set.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.attribution.uses import table_of
from benchmarks.last_layers import features
from benchmarks.measure import show
from benchmarks.pages import RESULTS
from benchmarks.store import Row, Store, opened, run_parser
from hyperopt_peft.attribution.head import HeadTraining
from hyperopt_peft.attribution.scores import (
    Evaluation,
    Trained,
    parse_estimator,
    scores,
)
from hyperopt_peft.attribution.why import fewest, margins, reason_for
from hyperopt_peft.heads import Features, Head, choose_l2
from hyperopt_peft.utils.verdict import Verdict

#: Seeds below 100 were used to choose the λ of `why`.
SEEDS = (100, 101, 102, 103, 104)
#: Numbers of training, evaluation and pool rows, and of tokens per row.
TRAIN, ABOVE, POOL, LENGTH = 300, 100, 2000, 24
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


def drawn(name: str, seed: int) -> tuple[Features, Features]:
    """Training and evaluation rows of a seed, standardised by the training rows."""
    whole = pool(name)
    order = torch.randperm(len(whole.x), generator=torch.Generator().manual_seed(seed))
    train, above = (
        Features(whole.x[part], whole.labels[part], torch.arange(len(part)))
        for part in (order[:TRAIN], order[TRAIN : TRAIN + ABOVE])
    )
    return train.standardized(), above.standardized(train)


def why(runs: Store, name: str, seed: int) -> None:
    """For each order, the number of rows to remove until a prediction changes."""
    row = runs.entry(part="why", task=name, seed=seed)
    if "sizes" in row:
        return
    train, above = drawn(name, seed)
    head = Head(train.x.shape[1], int(pool(name).labels.max()) + 1, dtype=torch.float64)
    training = HeadTraining(head, train, len(train.x), choose_l2(head, train, largest=False))
    with torch.no_grad():
        margin = margins(training.on_rows.logits(above.batch()))
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
    phi = Evaluation(training.weights, lambda: margins(head(x).logits, here)[0])
    setup = Trained(training, phi, training.level, train.batch)
    products = scores(setup, parse_estimator("gradient"))[0]
    of_class = (train.labels == predicted).nonzero()[:, 0]
    near = (normalize(train.x[of_class]) @ normalize(x)[0]).argsort(descending=True)
    source = torch.Generator().manual_seed(place)
    return {
        "products": products.argsort(descending=True)[: int((products > 0).sum())],
        "nearest": of_class[near],
        "random": of_class[torch.randperm(len(of_class), generator=source)],
    }


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
OF_PAGE = {"why": "Rows behind a prediction"}
RUNS = RESULTS / "attribution_heads.jsonl"


def tables_of(runs: Store) -> dict[str, list[Row]]:
    """All tables that have rows."""
    rows = why_table(runs.of("why"))
    return {OF_PAGE["why"]: rows} if rows else {}


def main() -> None:
    """Run the missing entries of the file, and summarise all."""
    title = (__doc__ or "").partition("\n")[0]
    options = run_parser(title, RUNS).parse_args()
    runs = opened(options)
    for task in TASKS[: 1 if options.quick else None]:
        for seed in SEEDS[: 1 if options.quick else None]:
            why(runs, task, seed)
            print(task, seed, flush=True)
    show(tables_of(runs))
    runs.finish()
