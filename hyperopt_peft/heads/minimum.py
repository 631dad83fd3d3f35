"""A head at the minimum of its weighted loss, and the weight λ of its penalty.

    W*, b* = argmin  1/C Σ_i v_i ℓ_i(W, b) + ½·λ·‖W‖²

C is the number of labels, ℓ_i the summed loss of row i. L-BFGS moves R·W in place of W, where
RᵀR = XᵀX/(m·classes) + λI is near the second derivative: features of neighbouring layers are
nearly dependent, and plain L-BFGS takes up to nine times as many evaluations.

λ is chosen by cross-validation (Breiman et al. 1984, §3.4.3) on at most `SAMPLE` labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from hyperopt_peft.core.examples import WeightedRows
from hyperopt_peft.core.labels import RowLosses, row_losses
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.engine import lbfgs
from hyperopt_peft.heads.features import Features
from hyperopt_peft.heads.head import L2, Head, l2_penalty
from hyperopt_peft.trainer.splits import folds_of
from hyperopt_peft.trainer.tags import INDEX
from hyperopt_peft.utils.restore import assign_

logger = logging.get_logger(__name__)
#: The values of λ for cross-validation, its folds, and its largest number of labels. With a larger
#: λ a head predicts almost only the most frequent class, and finds fewer wrong labels.
PENALTIES, FOLDS, SAMPLE = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01), 5, 10_000
#: The largest entry of the gradient at a minimum; the same in cross-validation; the largest number
#: of steps; the largest number of features for R.
TOLERANCE, ROUGHLY, STEPS, WIDEST = 1e-5, 1e-3, 2000, 4096


def penalised(level: Problem, l2: float = L2) -> Problem:
    """``level`` over a head, with ½·λ·‖W‖² added to its prior."""
    own, penalty = level.prior, l2_penalty(l2)
    level.prior = penalty if own is None else lambda variables: own(variables) + penalty(variables)
    return level


def level_of(
    head: Head, weights: Tensor | None = None, l2: float = L2, rule: RowLosses | None = None
) -> Problem:
    """The loss of ``head`` on a batch of `Features`, penalised.

    ``weights`` has the weight v of each row of the data, by default 1; ``rule`` is a user's
    ``row_losses``.

    Example:
        >>> batch = Features(torch.ones(1, 3), torch.tensor([1]), torch.tensor([0])).batch()
        >>> level_of(Head(3, 2), torch.tensor([0.5])).loss(batch)["loss"]  # log(2)/2
        tensor(0.3466, grad_fn=...)
    """

    def v(batch: Mapping[str, Tensor]) -> Tensor:
        row = batch[INDEX]
        return torch.ones(row.shape, device=row.device) if weights is None else weights[row]

    return penalised(WeightedRows(head, v, tags=[INDEX], row_losses=rule, name="head"), l2)


def solve(
    level: Problem,
    batch: Mapping[str, Tensor],
    *,
    tolerance: float = TOLERANCE,
    gram: Tensor | None = None,
    l2: float = L2,
) -> None:
    """Move the head of ``level`` from its present point to the minimum on ``batch``.

    Args:
        level: a head's level, penalised.
        tolerance: the largest entry of the gradient at the end.
        gram, l2: `gram_of` the features, and λ, for R; without ``gram`` R is the identity.

    Raises:
        NonFiniteError: the loss or its gradient is NaN or infinite.

    Example:
        >>> x, labels = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])
        >>> head = Head(1, 2)
        >>> solve(level_of(head), Features(x, labels, torch.arange(2)).batch())
        >>> head(x).logits.argmax(1).tolist()
        [0, 1]
    """
    factor = None
    if gram is not None:
        like = level.variables[0]
        factor = gram.to(like) + l2 * torch.eye(len(gram), dtype=like.dtype, device=like.device)
        factor = torch.linalg.cholesky(factor, upper=True)
    lbfgs(level, batch, tolerance=tolerance, max_steps=STEPS, factor=factor)


def gram_of(features: Features, classes: int) -> Tensor | None:
    """XᵀX/(m·classes) of up to `SAMPLE` rows, ``(d, d)``; None with fewer rows than features."""
    count, width = features.x.shape
    if width > min(count, WIDEST):
        return None
    x = features.x[:: -(-count // SAMPLE)].float()
    return x.T @ x / (len(x) * classes)


def sampled(features: Features, limit: int = SAMPLE) -> Features:
    """The features of random rows, of all classes in equal shares, with about ``limit`` labels."""
    if len(features.labels) <= limit:
        return features
    # Every k-th row in the order of its first label.
    rows, inverse = features.row.unique(return_inverse=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).to(rows.device)
    if features.labels.dim() == 1:
        first = features.labels.new_zeros(len(rows)).scatter(0, inverse, features.labels)
        order = order[first[order].argsort(stable=True)]
    share = limit / len(features.labels)
    places = torch.arange(max(1, int(share * len(rows))), device=rows.device) / share
    return features.select(rows[order[places.long()]])


def held_out_losses(
    head: Head, features: Features, progress: bool = False, rule: RowLosses | None = None
) -> Tensor:
    """The held-out loss of each label for the first k of `PENALTIES`, ``(k, m)``.

    The search ends with the first λ whose mean loss is more than a standard error above the least:
    a smaller λ is worse and takes more steps. ``head`` does not change.
    """
    features, head = sampled(features), deepcopy(head)
    rows = features.row.unique()
    numbers = folds_of(rows.tolist(), min(FOLDS, len(rows)))
    folds = [rows[torch.tensor(fold)] for fold in numbers]
    variables, losses = (head.weight, head.bias), list[Tensor]()
    points: list[Any] = [[x.detach().clone() for x in variables] for _ in folds]
    gram = gram_of(features, head.config.num_labels)
    for l2 in tqdm(PENALTIES, "head", disable=not progress):
        level, held_out = level_of(head, l2=l2, rule=rule), []
        for fold, point in zip(folds, points, strict=True):
            assign_(variables, point)
            train = features.select(rows[~torch.isin(rows, fold)]).batch()
            solve(level, train, tolerance=ROUGHLY, gram=gram, l2=l2)
            point[:] = [x.detach().clone() for x in variables]
            with torch.no_grad():
                others = features.select(fold)
                batch = {"features": others.x, "labels": others.labels}
                held_out.append(row_losses(head, batch, rule)[0])
        losses.append(torch.cat(held_out))
        if losses[-1].mean() > highest(losses):
            break
    return torch.stack(losses)


def highest(losses: Sequence[Tensor]) -> float:
    """The least mean of ``losses`` and its standard error."""
    least = min(losses, key=lambda each: float(each.mean()))
    return float(least.mean() + least.std() / len(least) ** 0.5)


def choose_l2(
    head: Head,
    features: Features,
    *,
    largest: bool = True,
    progress: bool = False,
    rule: RowLosses | None = None,
) -> float:
    """The ``largest`` λ, or else the smallest, within a standard error of the least held-out loss.

    A smaller λ hardly predicts better, and if features outnumber rows, each row then moves the head
    so far that derivatives do not predict leaving rows out. A λ at an end of `PENALTIES` is logged.
    ``head`` does not change.

    Example:
        >>> x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
        >>> labels = torch.arange(60) % 2  # nothing to predict, so that the largest is best
        >>> choose_l2(Head(2, 2), Features(x, labels, torch.arange(60)))
        10.0
    """
    losses = held_out_losses(head, features, progress, rule)
    good = losses.mean(1) <= highest(list(losses))
    l2 = PENALTIES[int(good.nonzero()[0 if largest else -1])]
    if end := end_of_grid(l2):
        logger.warning(f"head: its penalty λ = {l2:g} is the {end} one tried")
    return l2


def end_of_grid(l2: float) -> str:
    """ "largest" or "smallest" if λ is at an end of `PENALTIES`, else the empty string."""
    return {PENALTIES[0]: "largest", PENALTIES[-1]: "smallest"}.get(l2, "")
