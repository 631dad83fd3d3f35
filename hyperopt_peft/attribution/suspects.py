"""Rows whose labels may be wrong: out-of-fold confidence and training loss, beside the scores."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.attribution.methods import Setting
from hyperopt_peft.errors import ProblemError


@dataclass(frozen=True)
class Suspects:
    """How doubtful the label of each row is; a lower ``confidence`` is more doubtful.

    Attributes:
        confidence: cleanlab's label quality from out-of-fold probabilities (Northcutt et al. 2021,
            arXiv:1911.00068), or the probability of the given label without cleanlab, ``(n,)``;
            NaN for a row without a label.
        loss: the mean training loss, ``(n,)``.
        score: the attribution score, which answers another question, ``(n,)``.
        flagged: the rows that cleanlab takes for wrong, most doubtful first; without cleanlab the
            rows whose label is not the most probable class.
        probabilities: of each class, by the folds that did not train on the row, ``(n, classes)``.
    """

    confidence: Tensor
    loss: Tensor
    score: Tensor
    flagged: list[int]
    probabilities: Tensor


def suspects(setting: Setting, score: Tensor, loss: Tensor, folds: int, seed: int) -> Suspects:
    """Repeat the run without each fold of the rows, and compare its predictions with the labels.

    Args:
        setting: the run, of a classifier.
        score: the scores, ``(n,)``.
        loss: the mean training losses, ``(n,)``.
        folds: how many; each costs a training.
        seed: of the random folds.

    Raises:
        ProblemError: no classifier with one class a row, fewer than 2 folds, or more than rows.
        NonFiniteError: a training without a fold diverges.
    """
    labels = setting.labels
    if labels is None or setting.probabilities is None:
        raise ProblemError("suspects: needs a Trainer of a classifier with one class a row")
    count = len(labels)
    if not 2 <= folds <= count:
        raise ProblemError(f"folds: must be from 2 to the number of rows, got {folds}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    probabilities: Any = None
    for fold in order.tensor_split(folds):
        with setting.run.without(fold):
            of_fold = setting.probabilities(fold.tolist())
        if probabilities is None:
            probabilities = torch.zeros(count, of_fold.shape[1], dtype=of_fold.dtype)
        probabilities[fold] = of_fold
    rows = (labels >= 0).nonzero().flatten()
    given, known = labels[rows], probabilities[rows]
    if find_spec("cleanlab") is None:
        quality = known.gather(1, given[:, None])[:, 0]
        wrong = (known.argmax(1) != given).nonzero().flatten()
        found = wrong[quality[wrong].argsort()]
    else:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores

        arrays = given.numpy(), known.numpy()
        quality = torch.from_numpy(get_label_quality_scores(*arrays))
        ranked = find_label_issues(*arrays, return_indices_ranked_by="self_confidence", n_jobs=1)
        found = torch.from_numpy(ranked)
    confidence = torch.full((count,), torch.nan, dtype=torch.float64)
    confidence[rows] = quality.to(torch.float64)
    return Suspects(confidence, loss, score, rows[found].tolist(), probabilities)
