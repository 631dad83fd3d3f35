"""Rows whose labels may be wrong, by models that did not train on them."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Suspects:
    """How doubtful the label of each row is.

    Attributes:
        confidence: the probability of the given label, ``(n,)``; NaN for a row without a label.
        flagged: the rows whose label is not the most probable class, most doubtful first. Empty if
            ``kappa`` is at most `SLIGHT`.
        probabilities: the class probabilities, from a model that did not train on the row,
            ``(n, classes)``.
        accuracy: the share of the labels that are the most probable class.
        kappa: how far ``accuracy`` is above chance: 0 at chance, 1 if all labels are predicted
            (Cohen 1960, doi:10.1177/001316446002000104).
    """

    confidence: Tensor
    flagged: list[int]
    probabilities: Tensor
    accuracy: float
    kappa: float

    def record(self) -> dict[str, Any]:
        """The numbers of the search, for a file."""
        names = ("accuracy", "kappa", "verdict")
        return {**{name: getattr(self, name) for name in names}, "flagged": len(self.flagged)}

    @property
    def verdict(self) -> str:
        """How many labels may be wrong, or why none can be flagged."""
        if self.kappa <= SLIGHT:
            return (
                "no label is flagged: models predict the labels of held-out rows hardly better "
                "than chance; train for longer, or on more rows"
            )
        return f"{len(self.flagged)} labels may be wrong"

    @property
    def numbers(self) -> str:
        """How well models predict the labels of rows on which they did not train."""
        return (
            f"labels of held-out rows predicted: {self.accuracy:.0%}, kappa {self.kappa:.2f} (0 is "
            "chance, 1 is all)"
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
    of_parts = []
    parts = folds_of(range(len(labels)), folds, seed)
    for rows in tqdm(parts, "folds", disable=not trained.progress):
        with trained.run.without(rows):
            of_parts.append(trained.probabilities(rows))
    probabilities = torch.cat(of_parts)[torch.tensor([*chain(*parts)]).argsort()]
    labelled = (labels >= 0).nonzero().flatten()
    true, of_class = labels[labelled], probabilities[labelled]
    guesses = of_class.argmax(1)
    confidence = torch.full((len(labels),), torch.nan, dtype=torch.float64)
    confidence[labelled] = of_class.gather(1, true[:, None])[:, 0]
    accuracy = accuracy_score(true, guesses)
    kappa = cohen_kappa_score(true, guesses)
    doubtful = labelled[guesses != true] if kappa > SLIGHT else labelled[:0]
    flagged = doubtful[confidence[doubtful].argsort()].tolist()
    return Suspects(confidence, flagged, probabilities, accuracy, kappa)
