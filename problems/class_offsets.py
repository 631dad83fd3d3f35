"""Class offsets: a learned number is added to each class's logit in training.

    upper: min over l, Δ       CE(z; D_val) with the same weight for each class
    lower: w*(l, Δ) = argmin over w             CE(2σ(Δ)⊙z + l; D_train)

z are the logits of the model w. A frequent class gets a larger offset in training, so that the
model itself need not prefer it: l = log π, with the classes' shares π in D_train, is Bayes-optimal
for balanced accuracy. Li et al. 2021, arXiv:2201.01212 (AutoBalance), who have σ(Δ) from Δ = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hyperopt_peft.method import (
    IGNORED,
    WEIGHT,
    Batch,
    Method,
    Model,
    ProblemError,
    TaskLoss,
    option,
    require_labels,
)


@dataclass
class ClassOffsets(Method):
    """Offsets of the classes above, the adapter below; then the adapter alone, on all rows.

    The upper loss gives the classes of a *batch* equal weights. With more than 128 upper rows let
    ``per_device_upper_batch_size`` be many times their number. The saved model has plain logits;
    ``offsets`` and ``factors`` stay with the method. Label smoothing and a loss of the user's own
    are refused, unless a subclass says ``own_loss = True``.

    Raises:
        ProblemError: labels are no classes.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model, method = BertForSequenceClassification(tiny).eval(), ClassOffsets(factor=True)
        >>> method.prepare(model)
        >>> {name: x.shape for name, x in method.upper_variables(model).items()}
        {'offsets': torch.Size([2]), 'factors': torch.Size([2])}
        >>> batch = {"input_ids": torch.ones(3, 4).long(), "labels": torch.tensor([0, 0, 1])}
        >>> torch.allclose(method.lower_loss(model, batch, None), model(**batch).loss)  # at first
        True
    """

    factor: bool = option(False, help="whether a factor 2σ(Δ) of each class's logit is learned too")
    paper: bool = option(False, help="take estimator, steps and phases of AutoBalance's code")

    full_upper_batch = True  # classes that a batch lacks have no weight
    # Neumann steps of size 1, the published ones, diverge where a curvature is above 2.
    defaults = {"hypergradient": "minres:steps=5,damping=1.0", "lower_steps": 4}
    published_defaults = {
        "hypergradient": "neumann:terms=5,step_size=1.0",
        "lower_steps": 20,
        "retrain": "scratch",
    }

    @classmethod
    def published(cls) -> Self:
        """Offsets and factors, with ``paper``.

        Example:
            >>> ClassOffsets.published().factor
            True
        """
        return cls(factor=True, paper=True)

    def prepare(self, model: Model) -> None:
        """Make l and Δ, 0."""
        like, config = next(model.parameters()), getattr(model, "config", None)
        if (classes := getattr(config, "num_labels", None)) is None:
            raise ProblemError("num_labels: the model's config lacks it; set config.num_labels")
        dtype = torch.promote_types(like.dtype, torch.float32)
        zeros = torch.zeros(classes, dtype=dtype, device=like.device)
        #: l and Δ, ``(classes,)``.
        self.offsets = zeros.clone().requires_grad_()
        self.factors = zeros.clone().requires_grad_()

    def upper_variables(self, model: Model) -> dict[str, Tensor]:
        """l, and Δ where it is learned."""
        return {"offsets": self.offsets, **({"factors": self.factors} if self.factor else {})}

    def lower_loss(self, model: Model, batch: Batch, task_loss: TaskLoss) -> Any:
        """The cross entropy of 2σ(Δ)⊙z + l."""
        logits, labels = logits_and_labels(self, model, batch)
        logits = 2 * self.factors.sigmoid() * logits + self.offsets
        return cross_entropy(logits, labels) * batch.get(WEIGHT, 1.0)

    def upper_loss(self, model: Model, batch: Batch, task_loss: TaskLoss) -> Tensor:
        """The cross entropy of z with equal weights for the classes of the batch or piece."""
        return balanced_loss(self, model, batch)


def balanced_loss(method: Method, model: Model, batch: Batch) -> Tensor:
    """The mean over the classes of ``batch`` of their mean cross entropies."""
    logits, labels = logits_and_labels(method, model, batch)
    counts = labels[labels != IGNORED].bincount(minlength=logits.shape[-1])
    return cross_entropy(logits, labels, 1 / counts.clamp(min=1).to(logits.dtype))


def class_labels(batch: Batch) -> Tensor:
    """The labels of ``batch``; raises ProblemError where they are no classes."""
    labels = require_labels(batch)
    if labels.is_floating_point():
        raise ProblemError(
            f"labels: must be numbers of classes, got {labels.dtype}; choose a method that does "
            "not count classes"
        )
    return labels


def logits_and_labels(method: Method, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits of each label, (n, classes), in float32 or wider, and the labels, (n,)."""
    labels = class_labels(batch)
    return method.logits_of(model, batch).flatten(0, -2), labels.flatten()
