"""Wrong labels corrected by their confusions, which trusted rows count; without an upper level.

    min over the adapter w   mean of −log Σ_a softmax(z)_a C[a, y],   C[a, b] ≈ p(label b | class a)

z are the logits of w. C is counted before the training: C[a, b] is the mean over the trusted rows
of class a of p(b | x), by a linear head on frozen features that is trained on the other rows, and
in Hendrycks et al. 2018, arXiv:1802.05300, by the net itself. A trusted row has the plain loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import one_hot

from hyperopt_peft.heads import Features, Head, features_of, level_of, solve
from hyperopt_peft.method import (
    IGNORED,
    INDEX,
    WEIGHT,
    Batch,
    Collate,
    Method,
    Model,
    ProblemError,
    Rows,
    TaskLoss,
    option,
    require_examples,
    without,
)
from hyperopt_peft.problems.class_offsets import logits_and_labels
from hyperopt_peft.problems.data_plans import SOURCE, EqualSources


@dataclass
class LossCorrection(Method):
    """All rows; a label of a row that is not trusted has a loss with its confusions C.

    A class without a trusted row counts as never confused.

    Raises:
        ProblemError: there are no trusted rows; labels are no classes; as `EqualSources`.

    Example:
        >>> LossCorrection(by_source=True)
        LossCorrection(by_source=True, column='source')
    """

    by_source: bool = option(False, help="count C for each source, by a head of its own rows")
    column: str = option(SOURCE, help="the column that names the source of a row")

    tags = (INDEX,)

    def rows(self, train: Rows, upper: Rows | None) -> tuple[Any, Any]:
        """Both as they are; the sources are numbered, with the trusted rows as the last one."""
        require_examples("upper_dataset", upper)
        numbers = [0] * len(train)
        if self.by_source:
            numbers = EqualSources(self.column).rows(train, None)[0][SOURCE][:]
        self.source = torch.tensor([*numbers, max(numbers) + 1])
        return train, upper

    def read_rows(self, model: Model, rows: Dataset, collate: Collate) -> None:
        """Count C of each source."""
        made = features_of(model, rows, lambda chosen: without(collate(chosen), self.tags))
        if made.labels.is_floating_point():
            raise ProblemError("labels: LossCorrection needs classes, and these are numbers")
        made, source = made.standardized(), self.sources_of(torch.tensor(rows[INDEX][:]))
        count = int(self.source[-1]) + 1
        *parts, trusted = (made.select((source == k).nonzero()[:, 0]) for k in range(count))
        classes = max(1 + int(made.labels.max()), getattr(model.config, "num_labels", 0))
        found = [confusions(part, trusted, classes) for part in parts]
        #: C of each source and, for trusted rows, the identity, ``(K + 1, C, C)``.
        self.confusions = torch.stack([*found, torch.eye(classes).to(found[0])])

    def sources_of(self, index: Tensor) -> Tensor:
        """The source of each row by its number."""
        return self.source.to(index.device)[index.clamp(max=len(self.source) - 1)]

    def lower_loss(self, model: Model, batch: Batch, task_loss: TaskLoss) -> Any:
        """The mean of −log Σ_a softmax(z)_a C[a, y] over the labels."""
        logits, labels = logits_and_labels(self, model, batch)
        source, scored = self.sources_of(batch[INDEX]).flatten(), labels != IGNORED
        source = source.repeat_interleave(len(labels) // len(source))  # of each token
        chosen = self.confusions.to(logits)[source, :, labels.clamp(min=0)]
        losses = -(logits.log_softmax(-1) + chosen.log()).logsumexp(-1)
        return losses[scored].sum() / scored.sum().clamp(min=1) * batch.get(WEIGHT, 1.0)


def confusions(rows: Features, trusted: Features, classes: int) -> Tensor:
    """C of the labels of ``rows``, ``(classes, classes)``; its rows have the sum 1."""
    head = Head(rows.x.shape[1], classes, dtype=rows.x.dtype)
    solve(level_of(head), rows.batch())
    members = one_hot(trusted.labels, classes).to(rows.x)
    with torch.no_grad():
        shares: Tensor = members.T @ head(trusted.x).logits.softmax(-1)
    means = shares / members.sum(0)[:, None]
    return means.where(means.isfinite(), torch.eye(classes).to(means))
