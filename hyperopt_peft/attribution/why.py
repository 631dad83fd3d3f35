"""`why`: few training rows whose removal changes a prediction.

The training rows are ordered by the derivative of the prediction's margin with respect to their
weights, by one solve with the Hessian of the head's loss. Retraining the head without the first
rows then finds the number to remove (Yang, Jain & Wallace 2023, arXiv:2302.02169).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hyperopt_peft.attribution.estimators import (
    HEAD_ESTIMATOR,
    parse_estimator,
    require_known_derivative,
)
from hyperopt_peft.attribution.head import HeadTraining, batch_of, train_head
from hyperopt_peft.attribution.reasons import Reason, Reasons
from hyperopt_peft.attribution.scores import Evaluation, RetrainingSetup, scores
from hyperopt_peft.attribution.trainer import (
    require_attributable,
    require_trainer,
    setup_from_trainer,
)
from hyperopt_peft.attribution.trainer_data import TrainerData, shown_columns
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.features import Features
from hyperopt_peft.utils.models import base_model

#: The share of the training rows that a search removes at most.
MOST = 0.5
#: The largest entry of the gradient in a search, and in the trainings that verify its end.
TOLERANCES = 1e-5, 1e-6


def why(trainer: Any, rows: Any = None, *, adapter: bool = False, progress: bool = True) -> Reasons:
    """For each of ``rows`` few training rows whose removal changes its prediction.

    A linear head predicts, on the features from the Trainer's model as it is. The head is at the
    minimum of a convex loss. The weight λ of its penalty is the smallest that predicts held-out
    rows as well as the best λ, up to a standard error. The margin Φ is the logit of the predicted
    class minus log Σ exp of the other logits. Rows with the largest dΦ/dv_i are removed first.
    Retraining without a returned set changes the prediction; with the set's last row back it does
    not. A smaller set in another order may exist.

    For token tags, each wrongly predicted token is explained, or the token of the smallest margin
    if the row has no wrong one; whole training rows are removed.

    Args:
        trainer: a `transformers.Trainer` of a classifier, as for `attribute`.
        rows: a data set of rows that are not trained on, with labels; by default the Trainer's
            ``eval_dataset``.
        adapter: also train the Trainer's model, with all rows and without each set, and report its
            predictions: a training for each row.
        progress: whether to show progress bars.

    Raises:
        ProblemError: no rows, or all of them are trained on; labels that are not one class a row or
            a token; with ``adapter``, a Trainer that has trained already, or that `attribute`
            refuses.
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
    require_trainer(trainer)
    if adapter:
        require_attributable(trainer)
        if getattr(trainer, "upper", None) is not None:
            require_known_derivative(trainer)
    data = TrainerData.read(trainer, rows, None)
    (first,) = data.batches(data.train_rows, [0])
    if torch.as_tensor(first.get("labels", 0)).is_floating_point():
        raise ProblemError("rows: a prediction of classes can be explained; these are numbers")
    head = train_head(trainer, data, progress=progress, largest=False)
    places = head.read(data.evaluation_rows)
    chosen = explained(head.training, places)
    bar = tqdm(chosen, "why", disable=not progress)
    found = [reason_for(head.training, places, place) for place in bar]
    if adapter:
        found = _with_adapter(trainer, rows, chosen, found, progress)
    config = getattr(base_model(trainer.model), "config", None)
    names = getattr(config, "id2label", None) or {}
    return Reasons(found, names, shown_columns(data.train), shown_columns(data.evaluation))


def _with_adapter(
    trainer: Any, rows: Any, places: list[int], found: list[Reason], progress: bool
) -> list[Reason]:
    """``found`` with the predictions of the adapter, trained on all rows and without each set."""
    options: dict[str, Any] = {"twice": False, "differentiated": False, "memory_limit": 1.0}
    setup = setup_from_trainer(trainer, rows, None, progress=progress, **options)
    assert setup.logits is not None
    before, reasons = setup.logits().argmax(-1), list[Reason]()
    bar = tqdm(found, "adapter", disable=not progress)
    for place, reason in zip(places, bar, strict=True):
        if reason.rows:
            with setup.run.without(reason.rows):
                after = setup.logits()[place].argmax()
            reason = replace(reason, adapter=(int(before[place]), int(after)))
        reasons.append(reason)
    return reasons


def explained(training: HeadTraining, places: Features) -> list[int]:
    """The entries of ``places`` to explain: each row, or some tokens of each row of tags."""
    if len(places.row.unique()) == len(places.row):
        return list(range(len(places.row)))
    with torch.no_grad():
        logits = training.on_rows.logits(batch_of(places))
    wrong, sure = logits.argmax(1) != places.labels, margins(logits)
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
    """The fewest rows, in the order of their scores, without which ``place`` is another class."""
    x, (row, token) = places.x[place : place + 1], _row_and_token(places, place)
    head, predicted = training.on_rows.model, _predicted(training, x)
    here = torch.full((1,), predicted, device=x.device)
    level, batch = training.level, batch_of(training.features)
    margin = Evaluation(training.weights, lambda: margins(head(x).logits, here)[0])
    setup = RetrainingSetup(training, margin, {"all": 1.0}, level, lambda: batch)
    held = scores(setup, parse_estimator(HEAD_ESTIMATOR))[0]["all"]
    order = held.argsort(descending=True)[: int((held > 0).sum())]
    size = margin.values()["all"]
    guess = 1 + int((held[order].cumsum(0) < size).sum())
    found = fewest(training, x, order, guess)
    reason = Reason(row, token, predicted, None, [], [], size, _limit(training, order))
    if found is None:
        return reason
    count, becomes = found
    rows = order[:count]
    return replace(reason, becomes=becomes, rows=rows.tolist(), scores=held[rows].tolist())


def fewest(
    training: HeadTraining, x: Tensor, order: Tensor, guess: int = 1
) -> tuple[int, int] | None:
    """How many rows of ``order`` to remove until ``x`` ``(1, d)`` has another class; that class.

    With one row fewer the prediction does not change. None if `MOST` of the rows do not suffice.
    Trainings to a lower tolerance verify the result; if they disagree, the search is repeated to
    that tolerance.
    """
    limit, predicted = _limit(training, order), _predicted(training, x)
    try:
        training.tolerance, verified = TOLERANCES
        found = _search(training, x, order, guess)
        training.tolerance = verified
        count = found[0] if found else limit
        after = _without(training, x, order[:count])
        before = _without(training, x, order[: count - 1]) if found else predicted
        if before != predicted or (after == predicted) == bool(found):
            return _search(training, x, order, guess)
    finally:
        del training.tolerance  # back to that of the class
    return (count, after) if found else None


def _search(training: HeadTraining, x: Tensor, order: Tensor, guess: int) -> tuple[int, int] | None:
    """As `fewest`: the number doubles from ``guess``; bisection then finds it."""
    predicted, limit = _predicted(training, x), _limit(training, order)
    kept, count, becomes = 0, min(max(guess, 1), limit), predicted
    while limit:
        becomes = _without(training, x, order[:count])
        if becomes != predicted or count == limit:
            break
        kept, count = count, min(2 * count, limit)
    if becomes == predicted:
        return None
    while count - kept > 1:
        middle = (kept + count) // 2
        other = _without(training, x, order[:middle])
        if other == predicted:
            kept = middle
        else:
            count, becomes = middle, other
    return count, becomes


def _without(training: HeadTraining, x: Tensor, rows: Tensor) -> int:
    """The class of ``x`` after a training without ``rows``."""
    with training.without(rows):
        return _predicted(training, x)


def _limit(training: HeadTraining, order: Tensor) -> int:
    return min(len(order), int(MOST * len(training.weights)))


@torch.no_grad()
def _predicted(training: HeadTraining, x: Tensor) -> int:
    return int(training.on_rows.model(x).logits.argmax())


def _row_and_token(places: Features, place: int) -> tuple[int, int | None]:
    row = int(places.row[place])
    if len(places.row.unique()) == len(places.row):
        return row, None
    return row, int((places.row[:place] == row).sum())
