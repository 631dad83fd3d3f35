"""How much of a score rests on which test rows there are: an evaluation without each part of them.

A mean over seeds has the deviation of the seeds alone; the test rows are a sample, too. They are
cut into `PARTS`, the same of every run, and θ₋ᵍ is the score without part g. The influence of a
part is the centred pseudo-value of the jackknife, (G − 1)(mean θ₋ − θ₋ᵍ) (Tukey 1958, Annals of
Mathematical Statistics 29, p. 614; Efron and Stein 1981, Annals of Statistics 9, eq. 1.2); of a
mean over rows it is the mean of the part minus that of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction, Trainer

#: The most parts: enough for the deviation of their mean, and few for a metric to be computed on.
PARTS = 50
#: The arguments by which a trainer sorts the rows of an evaluation, and their values without.
UNSORTED = {"group_by_length": False, "train_sampling_strategy": "random"}

Influence = dict[str, list[float]]


def mixed(rows: Dataset) -> Dataset:
    """``rows`` in a fixed random order, so that a part is a sample of them.

    Example:
        >>> sorted(mixed(Dataset.from_dict({"x": range(5)}))["x"])
        [0, 1, 2, 3, 4]
    """
    return rows.select(np.random.RandomState(0).permutation(len(rows)))


def parts(count: int, batch: int) -> tuple[int, int]:
    """The rows of a part of ``count`` rows, and of a batch, at most ``batch``, of which it has k.

    Example:
        >>> parts(1200, 8), parts(1200, 16), parts(500, 256), parts(7, 8)
        ((24, 8), (24, 12), (10, 10), (1, 1))
    """
    size = -(-count // PARTS)
    batches = -(-size // batch)
    batch = -(-size // batches)
    return batch * batches, batch


def influence(
    score: Callable[[Any], Mapping[str, Any]], count: int, size: int, whole: Mapping[str, Any]
) -> Influence:
    """By the name of a score, the influence of each part of ``size`` of ``count`` rows.

    Args:
        score: the scores of the rows with some indices.
        count, size: the number of rows, and of those of a part.
        whole: the scores of all rows; a score that a part lacks, or that is not finite, is left
            out, and with it all of them where ``score`` fails on a part.

    Example:
        >>> right = np.array([1, 1, 0, 1])
        >>> influence(lambda rows: {"accuracy": right[rows].mean()}, 4, 2, {"accuracy": 0.75})
        {'accuracy': [0.25, -0.25]}
    """
    if count <= size:
        return {}
    without = []
    for begin in range(0, count, size):
        try:
            without.append(score(np.r_[0:begin, min(begin + size, count) : count]))
        except Exception:  # of a user's metric, made for all rows, say
            return {}
    found = {}
    for name in whole:
        with suppress(KeyError, TypeError, ValueError):
            scores = np.array([float(each[name]) for each in without])
            if np.isfinite(scores).all():
                found[name] = ((len(scores) - 1) * (scores.mean() - scores)).tolist()
    return found


def evaluate(trainer: Trainer, rows: Dataset) -> tuple[dict[str, float], Influence]:
    """The metrics of ``rows`` by a trainer, and the influence of their parts on each.

    The loss is read by batch, and ``compute_metrics`` is called on all rows but a part. Neither has
    an influence where the number of batches or of predictions is not that of the rows.
    """
    step, measure, args = trainer.prediction_step, trainer.compute_metrics, trainer.args
    count, devices = len(rows), max(1, args.n_gpu)
    args.per_device_eval_batch_size = max(1, parts(count, args.eval_batch_size)[1] // devices)
    vars(args).update({name: x for name, x in UNSORTED.items() if hasattr(args, name)})
    size, batch = parts(count, args.eval_batch_size)
    losses: list[float] = []
    found: Influence = {}

    def recorded(*given: Any, **options: Any) -> Any:
        result = step(*given, **options)
        if result[0] is not None:
            losses.append(float(result[0].detach().mean()))
        return result

    def measured(prediction: EvalPrediction) -> Any:
        whole = measure(prediction)
        if _rows_of(prediction) == {count}:
            part = lambda chosen: measure(_select(prediction, chosen))  # noqa: E731
            found.update(influence(part, count, size, whole))
        return whole

    trainer.prediction_step = recorded
    if measure is not None and not args.batch_eval_metrics:
        trainer.compute_metrics = measured
    try:
        metrics = trainer.evaluate(rows)
    finally:
        del trainer.prediction_step
        trainer.compute_metrics = measure
    found = {f"eval_{name.removeprefix('eval_')}": each for name, each in found.items()}
    if (each := _of_loss(losses, metrics.get("eval_loss"), count, size, batch)) is not None:
        found["eval_loss"] = each
    return metrics, {name: each for name, each in found.items() if name in metrics}


def _of_loss(
    losses: Sequence[float], loss: float | None, count: int, size: int, batch: int
) -> list[float] | None:
    """The influence on a loss that is the mean of those of the batches, or of the rows."""
    if loss is None or len(losses) != -(-count // batch):
        return None
    values, begins = np.array(losses), np.arange(0, count, batch)
    of_rows = np.minimum(begins + batch, count) - begins
    for weights in (of_rows, np.ones(len(values))):
        if math.isclose(np.average(values, weights=weights), loss, rel_tol=1e-4):
            mean = partial(_mean, values, weights, batch)
            return influence(mean, count, size, {"loss": loss}).get("loss")
    return None


def _mean(values: Any, weights: Any, batch: int, rows: Any) -> dict[str, float]:
    """The loss of the batches that have ``rows``."""
    chosen = np.unique(rows // batch)
    return {"loss": float(np.average(values[chosen], weights=weights[chosen]))}


def _arrays(prediction: Any) -> dict[str, Any]:
    """What an ``EvalPrediction`` has of each row."""
    names = ("predictions", "label_ids", "inputs", "losses")
    given = {name: getattr(prediction, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _rows_of(value: Any) -> set[int]:
    """The numbers of rows of the arrays in ``value``."""
    if isinstance(value, Mapping | tuple | list):
        items = value.values() if isinstance(value, Mapping) else value
        return set().union(*(_rows_of(each) for each in items))
    return {len(value)} if hasattr(value, "shape") else _rows_of(_arrays(value))


def _select(value: Any, rows: Any) -> Any:
    """``value`` with ``rows`` of each array alone."""
    if isinstance(value, Mapping):
        return {name: _select(each, rows) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_select(each, rows) for each in value)
    if hasattr(value, "shape"):
        return value[rows]
    return type(value)(**{name: _select(x, rows) for name, x in _arrays(value).items()})
