"""Sources weighted by their agreement with a model of trusted rows, without an upper level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor

from hyperopt_peft.heads import Head, features_of, level_of, solve
from hyperopt_peft.method import Collate, Model, ProblemError, option, without
from hyperopt_peft.problems.data_plans import SOURCE, TRUSTED, EqualSources


@dataclass
class Agreement(EqualSources):
    """A row of source k has the weight q_k, the source's agreement with a model of trusted rows.

    The model is a linear head on frozen features, fitted to the trusted rows, and q_k the share of
    the source's labels that it predicts, with one right and C − 1 wrong ones more for C classes. A
    trusted row has the weight 1.

    Raises:
        ProblemError: a row has no class, or there are no trusted rows.

    Example:
        >>> Agreement(log_odds=True)
        Agreement(column='source', log_odds=True)
    """

    log_odds: bool = option(
        False, help="weight a source by log(q_k/(1 − q_k)·(C − 1)), from 0, as in naive Bayes"
    )

    def read_rows(self, model: Model, rows: Dataset, collate: Collate) -> None:
        """Fit the head to the trusted rows, and count its predictions for the others."""
        super().read_rows(model, rows, collate)
        source = torch.tensor(rows[SOURCE][:])
        made = features_of(model, rows, lambda chosen: without(collate(chosen), self.tags))
        numbers = made.labels.is_floating_point() or made.labels.shape != source.shape
        if self.names[-1] != TRUSTED or numbers:
            raise ProblemError("upper_dataset: Agreement needs trusted rows, and a class a row")
        made, classes = made.standardized(), max(2, 1 + int(made.labels.max()))
        head, size = Head(made.x.shape[1], classes, dtype=made.x.dtype), len(self.names)
        solve(level_of(head), made.select((source == size - 1).nonzero()[:, 0]).batch())
        right = head(made.x).logits.argmax(1) == made.labels
        counts = source.bincount(minlength=size) + classes
        q = ((source[right].bincount(minlength=size) + 1) / counts)[:-1]
        if self.log_odds:
            q = (q / (1 - q) * (classes - 1)).log().clamp(min=0)
            q = q / q.max().clamp(min=1e-6)
        self.agreement = torch.cat([q, torch.ones(1)])

    def p(self) -> Tensor:
        """The share of each source, ``(K,)``: its weight times its labels, by their sum."""
        mass = self.agreement * self.counts
        return mass / mass.sum()
