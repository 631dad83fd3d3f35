"""`why`: a few training rows whose removal changes a prediction.

The training rows are ordered by the derivative of the prediction's margin with respect to their
weights, which takes one solve with the Hessian of the head's loss. Retraining the head without the
first rows then finds the number to remove (Yang, Jain & Wallace 2023, arXiv:2302.02169).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer

from hyperopt_peft.attribution.head import HeadTraining, train_head
from hyperopt_peft.attribution.reasons import Reason, Reasons
from hyperopt_peft.attribution.rows import Rows, TrainerData
from hyperopt_peft.attribution.scores import (
    HEAD_ESTIMATOR,
    Evaluation,
    Trained,
    parse_estimator,
    scores,
)
from hyperopt_peft.core.labels import RowLosses
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.heads.features import Features
from hyperopt_peft.utils.models import base_model

#: The largest share of the training rows that a search removes.
MOST = 0.5
#: The largest entry of the gradient in a search, and in the trainings that verify its result. A
#: search to the second one takes ten times as long if λ is small.
ROUGHLY, VERIFIED = 1e-5, 1e-6


def why(
    trainer: Trainer,
    rows: Rows | None = None,
    *,
    row_losses: RowLosses | None = None,
    progress: bool = True,
) -> Reasons:
    """For each of ``rows``, find a few training rows whose removal changes its prediction.

    The predictions are those of a linear head on features from the Trainer's model in its present
    state. The head is at the minimum of a convex loss. The weight λ of its penalty is the smallest
    whose held-out loss is within a standard error of the least. The margin Φ is the logit of the
    predicted class minus log Σ exp of the other logits. Rows with the largest dΦ/dv_i are removed
    first. Retraining without a returned set changes the prediction; with its last row put back it
    does not. A smaller set may exist in another order.

    For token tags, each wrongly predicted token is explained, or if there is none, the token with
    the smallest margin. Whole training rows are removed.

    Args:
        trainer: a `transformers.Trainer` of a classifier, as for `attribute`.
        rows: a data set with labels, without training rows; by default the Trainer's
            ``eval_dataset``.
        row_losses: the losses of rows of a Trainer whose loss is the user's own, as for
            `attribute`.

    Raises:
        ProblemError: there are no rows, or all are training rows; labels are not one class per row
            or token.
        NonFiniteError: a training diverges.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import BertConfig, BertForSequenceClassification, Trainer
        >>> from transformers import TrainingArguments
        >>> size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> config = BertConfig(vocab_size=9, intermediate_size=8, **size)
        >>> columns = {"input_ids": [[k] * 3 for k in range(1, 9)], "labels": [0, 1] * 4}
        >>> rows = Dataset.from_dict(columns)
        >>> parts = {"train_dataset": rows.select(range(6)), "eval_dataset": rows.select([6, 7])}
        >>> args = TrainingArguments("out", report_to="none")
        >>> trainer = Trainer(BertForSequenceClassification(config), args, **parts)
        >>> [reason.row for reason in why(trainer, progress=False)]
        [0, 1]
    """
    data = TrainerData(trainer, rows, row_losses)
    (first,) = data.batches(data.train_rows, [0])
    if first["labels"].is_floating_point():
        raise ProblemError(
            "rows: only predictions of classes can be explained; these labels are numbers"
        )
    training, read = train_head(data, progress=progress, largest=False)
    places = read(data.evaluation_rows)
    bar = tqdm(explained(training, places), "why", disable=not progress)
    reasons = [reason_for(training, places, place) for place in bar]
    config = getattr(base_model(data.model), "config", None)
    names = getattr(config, "id2label", None) or {}
    return Reasons(reasons, names, *data.shown)


def explained(training: HeadTraining, places: Features) -> list[int]:
    """The indices in ``places`` to explain: each row, or some tokens of each row of tags."""
    if _one_per_row(places):
        return list(range(len(places.row)))
    with torch.no_grad():
        logits = training.on_rows.logits(places.batch())
    wrong = logits.argmax(1) != places.labels
    sure = margins(logits)
    chosen = []
    for row in places.row.unique():
        tokens = (places.row == row).nonzero().flatten()
        least = tokens[sure[tokens].argmin()].reshape(1)
        chosen += (tokens[wrong[tokens]] if wrong[tokens].any() else least).tolist()
    return chosen


def margins(logits: Tensor, classes: Tensor | None = None) -> Tensor:
    """The logits of ``classes``, by default the largest, minus log Σ exp of the others, ``(m,)``.

    Example:
        >>> margins(torch.tensor([[2.0, 0.0], [1.0, 3.0]])).tolist()
        [2.0, 2.0]
    """
    classes = logits.argmax(1) if classes is None else classes
    chosen = logits.gather(1, classes[:, None])[:, 0]
    return chosen - logits.scatter(1, classes[:, None], -torch.inf).logsumexp(1)


def reason_for(training: HeadTraining, places: Features, place: int) -> Reason:
    """The fewest rows, in the order of their scores, whose removal changes the prediction."""
    row = int(places.row[place])
    token = None if _one_per_row(places) else int((places.row[:place] == row).sum())
    x = places.x[place : place + 1]
    predicted = _predicted(training, x)
    classes = torch.full((1,), predicted, device=x.device)
    head = training.on_rows.model
    margin = Evaluation(training.weights, lambda: margins(head(x).logits, classes)[0])
    trained = Trained(training, margin, training.level, training.features.batch)
    slopes = scores(trained, parse_estimator(HEAD_ESTIMATOR))[0]
    most = min(int((slopes > 0).sum()), int(MOST * len(slopes)))
    order = slopes.argsort(descending=True)[:most]
    size = margin.value()
    guess = 1 + int((slopes[order].cumsum(0) < size).sum())
    result = fewest(training, x, order, guess)
    reason = Reason(row, token, predicted, None, [], [], size, most)
    if result is None:
        return reason
    count, becomes = result
    rows = order[:count]
    return replace(reason, becomes=becomes, rows=rows.tolist(), scores=slopes[rows].tolist())


def fewest(
    training: HeadTraining, x: Tensor, order: Tensor, guess: int = 1
) -> tuple[int, int] | None:
    """How many rows of ``order`` to remove until ``x`` ``(1, d)`` changes its class; the new class.

    With one row fewer the class does not change. None if removing all of ``order`` is not enough.
    Trainings to a lower tolerance verify the result; if they disagree, the search is repeated with
    that tolerance.
    """
    predicted = _predicted(training, x)
    try:
        training.tolerance = ROUGHLY
        result = _search(training, x, order, guess)
        training.tolerance = VERIFIED
        count = result[0] if result else len(order)
        after = _without(training, x, order[:count])
        before = _without(training, x, order[: count - 1]) if result else predicted
        if before != predicted or (after == predicted) == bool(result):
            return _search(training, x, order, guess)
    finally:
        del training.tolerance  # back to that of the class
    return (count, after) if result else None


def _search(training: HeadTraining, x: Tensor, order: Tensor, guess: int) -> tuple[int, int] | None:
    """As `fewest`: the number doubles from ``guess``, and bisection then finds it."""
    predicted, limit = _predicted(training, x), len(order)
    too_few, count = 0, min(max(guess, 1), limit)
    while (becomes := _without(training, x, order[:count])) == predicted:
        if count == limit:
            return None
        too_few, count = count, min(2 * count, limit)
    while count - too_few > 1:
        middle = (too_few + count) // 2
        other = _without(training, x, order[:middle])
        if other == predicted:
            too_few = middle
        else:
            count, becomes = middle, other
    return count, becomes


def _without(training: HeadTraining, x: Tensor, rows: Tensor) -> int:
    """The class of ``x`` after a training without ``rows``."""
    with training.without(rows):
        return _predicted(training, x)


@torch.no_grad()
def _predicted(training: HeadTraining, x: Tensor) -> int:
    return int(training.on_rows.model(x).logits.argmax())


def _one_per_row(places: Features) -> bool:
    return len(places.row.unique()) == len(places.row)
