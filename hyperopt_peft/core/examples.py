"""A level that weights the losses of rows or labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.core.labels import (
    ADVICE,
    WEIGHT,
    RowLosses,
    is_mean_over_labels,
    label_losses,
    row_losses,
)
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.core.validation import Variables
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.models import own_loss_of, trainable
from hyperopt_peft.utils.types import Batch


class WeightedRows(Problem):
    """A level with the loss f = 1/C Σ_i v_i ℓ_i over rows or labels i.

    v_i is a weight, ℓ_i the summed loss of row i or the loss of label i, and C the number of scored
    labels. If all v_i are 1, f is the model's own loss. By ``row_losses`` f is 1/Σ c_i Σ_i v_i ℓ_i.
    A Trainer's entries in the batch (`core.labels`) make the mean of f over the micro-batches of a
    step the mean over the step's labels, even if the micro-batches differ in size. Only the weights
    may read the upper variables.

    Args:
        model: the model, as for `label_losses`.
        weights: a function from a batch to v: ``(n,)`` for rows, ``(n, T)`` for labels.
        variables: the tensors that the level owns; by default the model's trainable parameters.
        tags: the entries of a batch that are for ``weights`` and not for the model.
        row_losses: a rule for ℓ and c, such as ``row_losses`` of a `Method`; None is the mean over
            labels, for models of known libraries alone.
        twice: as for `label_losses`.
        level: arguments of `Problem`: data, optimizer, scheduler, max_grad_norm, name, prior.

    Raises:
        ProblemError: no parameter is trainable. ``loss`` raises it if the weights have another
            shape, the model has a loss of its own and there is no rule, and as `label_losses`.

    Example:
        >>> from hyperopt_peft.heads import Head
        >>> batch = {"features": torch.ones(2, 3), "labels": torch.tensor([0, 1])}
        >>> level = WeightedRows(Head(3, 2), lambda batch: torch.tensor([1.0, 0.0]))
        >>> level.loss(batch)  # the second row does not count: log(2)/2
        {'loss': tensor(0.3466, grad_fn=...), 'task_loss': tensor(0.6931)}
    """

    #: Further numbers to log, by name.
    metrics: Callable[[], Mapping[str, Any]] = dict

    def __init__(
        self,
        model: Any,
        weights: Callable[[Any], Tensor],
        variables: Variables | None = None,
        *,
        tags: Sequence[str] = (),
        row_losses: RowLosses | None = None,
        twice: bool = False,
        **level: Any,
    ) -> None:
        self.model, self.weights, self.tags, self.twice = model, weights, tags, twice
        self.row_losses = row_losses
        super().__init__(trainable(model) if variables is None else variables, **level)

    @property
    def examples(self) -> WeightedRows:
        """This level."""
        return self

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``weighted(losses(batch), batch)``."""
        return self.weighted(self.losses(batch), batch)

    def losses(self, batch: Batch) -> Tensor:
        """ℓ_i/C, flat, times the Trainer's weight for the micro-batch."""
        inputs = {name: value for name, value in batch.items() if name not in self.tags}
        if self.row_losses is None and (own := own_loss_of(self.model)):
            raise ProblemError(f"{own}: is no known mean over labels; {ADVICE}")
        if is_mean_over_labels(self.row_losses):
            each, counts = label_losses(self.model, inputs, twice=self.twice)
        else:
            each, counts = row_losses(self.model, inputs, self.row_losses)
        with torch.no_grad():
            shape = self.weights(batch).shape
        shapes = [each.shape[:1], each.shape]
        each = each if len(shape) > 1 else each.reshape(len(each), -1).sum(1)
        if shape not in shapes:
            raise ProblemError(
                f"{self.name}: weights have shape {tuple(shape)} for losses of shape "
                f"{tuple(shapes[-1])}; return one weight for each row or for each label"
            )
        total = counts.sum()
        each = each.flatten() / (total + (total == 0))
        return each * batch[WEIGHT].to(each) if WEIGHT in batch else each

    def weighted(self, losses: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Σ v_i ℓ_i/C without the model; the metric ``task_loss`` is the sum with all weights 1."""
        loss = (self.weights(batch).flatten().to(losses) * losses).sum()
        return {"loss": loss, "task_loss": losses.detach().sum(), **self.metrics()}
