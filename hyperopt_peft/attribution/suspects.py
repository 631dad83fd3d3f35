"""Rows whose labels may be wrong, by models that did not train on them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
from sklearn.metrics import accuracy_score, cohen_kappa_score
from torch import Tensor
from tqdm.auto import tqdm

from hyperopt_peft.attribution.scores import Trained
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.splits import folds_of

#: The kappa up to which agreement is slight (Landis & Koch 1977, doi:10.2307/2529310).
SLIGHT = 0.2
CLEANLAB = "cleanlab's confident learning"
MOST_PROBABLE = "the most probable class"
INSTALL = 'pip install "hyperopt-peft[cleanlab]" flags fewer rows'


@dataclass(frozen=True)
class Suspects:
    """How doubtful the label of each row is.

    Attributes:
        confidence: the probability of the given label, or cleanlab's label quality (Northcutt et
            al. 2021, arXiv:1911.00068), ``(n,)``; low if doubtful, NaN for a row without a label.
        flagged: the rows that cleanlab flags, most doubtful first; without cleanlab the rows whose
            label is not the most probable class. Empty if ``kappa`` is at most `SLIGHT`.
        probabilities: the class probabilities, from a model that did not train on the row,
            ``(n, classes)``.
        accuracy: the share of the labels that are the most probable class.
        kappa: how far ``accuracy`` is above chance: 0 at chance, 1 if all labels are predicted
            (Cohen 1960, doi:10.1177/001316446002000104).
        method: the rule that flagged the rows.
    """

    confidence: Tensor
    flagged: list[int]
    probabilities: Tensor
    accuracy: float
    kappa: float
    method: str

    def record(self) -> dict[str, Any]:
        """The numbers of the search, for a file."""
        names = ("accuracy", "kappa", "method", "verdict")
        return {**{name: getattr(self, name) for name in names}, "flagged": len(self.flagged)}

    @property
    def verdict(self) -> str:
        """How many labels may be wrong, or why none can be flagged."""
        if self.kappa <= SLIGHT:
            return (
                "no label is flagged: models predict the labels of held-out rows hardly better "
                "than chance; train for longer, or on more rows"
            )
        return "; ".join([f"{len(self.flagged)} labels may be wrong", *filter(None, [self.advice])])

    @property
    def advice(self) -> str:
        """How to flag fewer rows; empty if cleanlab is installed."""
        return "" if self.method == CLEANLAB else INSTALL

    @property
    def numbers(self) -> str:
        """How well models predict the labels of rows on which they did not train."""
        return (
            f"labels of held-out rows predicted: {self.accuracy:.0%}, kappa {self.kappa:.2f} (0 is "
            f"chance, 1 is all); rows flagged by {self.method}"
        )

    def __str__(self) -> str:
        return f"{self.verdict}\n{self.numbers}"


def suspects(trained: Trained, folds: int, seed: int) -> Suspects:
    """See `Attribution.suspects`."""
    labels = trained.labels
    if labels is None or trained.probabilities is None:
        raise ProblemError("suspects: needs a Trainer of a classifier with one class per row")
    if not 2 <= folds <= len(labels):
        raise ProblemError(f"folds: must be from 2 to the number of rows, got {folds}")
    parts, of_parts = folds_of(range(len(labels)), folds, seed), []
    for rows in tqdm(parts, "folds", disable=not trained.progress):
        with trained.run.without(rows):
            of_parts.append(trained.probabilities(rows))
    probabilities = torch.cat(of_parts)[torch.tensor([*chain(*parts)]).argsort()]
    labelled = (labels >= 0).nonzero().flatten()
    confidence = torch.full((len(labels),), torch.nan, dtype=torch.float64)
    scored = labels[labelled], probabilities[labelled]
    confidence[labelled], doubtful = _doubts(*scored)
    pair = scored[0], scored[1].argmax(1)
    accuracy, kappa = accuracy_score(*pair), cohen_kappa_score(*pair)
    flagged = labelled[doubtful].tolist() if kappa > SLIGHT else []
    method = CLEANLAB if find_spec("cleanlab") else MOST_PROBABLE
    return Suspects(confidence, flagged, probabilities, accuracy, kappa, method)


def _doubts(labels: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """The confidence in each label, and the indices of the doubtful ones, worst first."""
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
