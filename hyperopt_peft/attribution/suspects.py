"""Rows whose labels may be wrong: out-of-fold confidence and training loss, beside the scores."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from hyperopt_peft.attribution.scores import RetrainingSetup
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


def suspects(
    setup: RetrainingSetup, score: Tensor, loss: Tensor, folds: int, seed: int
) -> Suspects:
    """Repeat the run without each fold of the rows, and compare its predictions with the labels.

    See `Attribution.suspects`; ``score`` and ``loss`` are those of the rows, ``(n,)``.
    """
    labels = setup.labels
    if labels is None or setup.probabilities is None:
        raise ProblemError("suspects: needs a Trainer of a classifier with one class a row")
    count = len(labels)
    if not 2 <= folds <= count:
        raise ProblemError(f"folds: must be from 2 to the number of rows, got {folds}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts, of_parts = order.tensor_split(folds), []
    for rows in parts:
        with setup.run.without(rows):
            of_parts.append(setup.probabilities(rows.tolist()))
    probabilities = torch.cat(of_parts)[order.argsort()]
    labelled = (labels >= 0).nonzero().flatten()
    confidence = torch.full((count,), torch.nan, dtype=torch.float64)
    confidence[labelled], doubtful = _doubts(labels[labelled], probabilities[labelled])
    return Suspects(confidence, loss, score, labelled[doubtful].tolist(), probabilities)


def _doubts(labels: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """The confidence in each label, and the positions of the doubtful ones, worst first."""
    if find_spec("cleanlab") is None:
        confidence = probabilities.gather(1, labels[:, None])[:, 0]
        wrong = (probabilities.argmax(1) != labels).nonzero().flatten()
        return confidence, wrong[confidence[wrong].argsort()]
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    arrays = labels.numpy(), probabilities.numpy()
    confidence = torch.from_numpy(get_label_quality_scores(*arrays)).to(torch.float64)
    doubtful = find_label_issues(*arrays, return_indices_ranked_by="self_confidence", n_jobs=1)
    return confidence, torch.from_numpy(doubtful)
