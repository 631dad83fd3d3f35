"""CPU seconds of a head on many rows, its λ chosen: features of three layers of MiniLM.

    python benchmarks/speed head                     # a minute; writes results/speed_head.json

Rows are drawn from the normal distribution with mean and covariance of 2,000 tweets' features, and
classes from a head that is trained on these tweets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.attribution.heads import pool
from benchmarks.measure import arguments, report
from benchmarks.pages import RESULTS
from hyperopt_peft.attribution.head import HeadTraining
from hyperopt_peft.heads import Features, Head, choose_l2

ROWS, QUICK = 100_000, 3_000


def drawn(count: int) -> tuple[Features, int]:
    """The features of ``count`` rows in float32, with their classes, and the number of classes."""
    tweets = pool("tweets")
    plain, classes = tweets.standardized(), int(tweets.labels.max()) + 1
    head = HeadTraining(new_head(plain, classes), plain, len(plain.x), 0.1).on_rows.model
    source = torch.Generator().manual_seed(0)
    centred, width = tweets.x.double() - tweets.x.double().mean(0), tweets.x.shape[1]
    covariance = centred.T @ centred / len(centred) + 1e-8 * torch.eye(width).double()
    x = torch.randn(count, width, generator=source) @ torch.linalg.cholesky(covariance).float().T
    rows = Features(x + tweets.x.mean(0), torch.zeros(count).long(), torch.arange(count))
    with torch.no_grad():
        shares = head(rows.standardized(tweets).x).logits.softmax(1)
    return Features(rows.x, torch.multinomial(shares, 1, generator=source)[:, 0], rows.row), classes


def new_head(rows: Features, classes: int) -> Head:
    """A head of zeros."""
    return Head(rows.x.shape[1], classes, dtype=torch.float64)


def main() -> None:
    """Measure, print, and write JSON."""
    options = arguments("CPU seconds of a head on many rows, its λ chosen")
    if not options.quick and options.json is None:
        options.json = RESULTS / "speed_head.json"
    raw, classes = drawn(QUICK if options.quick else ROWS)
    seconds = dict[str, float]()

    def measured(name: str, work: Callable[[], Any]) -> Any:
        begin = time.process_time()
        result = work()
        seconds[f"{name}, s"] = time.process_time() - begin
        return result

    rows = measured("standardised", raw.standardized)
    head = new_head(rows, classes)
    l2 = measured("λ chosen", lambda: choose_l2(head, rows))
    measured("solved", lambda: HeadTraining(head, rows, len(rows.x), l2))
    row = {"rows": len(rows.x), "features": rows.x.shape[1], "λ": l2, **seconds}
    report(options, {"A head on many rows": [row | {"all, s": sum(seconds.values())}]}, {})
