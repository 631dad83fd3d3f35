"""Losses of single examples, and the upper level of programs that weight training examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse_loss,
    pad,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.accumulation import ITEMS, WEIGHT
from hyperopt_peft.utils.models import base_model

#: Columns that weights are read by, and a Trainer's entries, which are no arguments of a model.
COLUMNS = ("index", "source", "votes", ITEMS, WEIGHT)
MULTI_LABEL = "multi_label_classification"


class HeldOut(Problem):
    """Upper level: min over the parameters of ``weights`` of the model's loss on held-out data.

    Args:
        weights: the module whose parameters the level owns.
        model: a model whose forward returns ``.loss``; no parameter of the model moves.
        level: as in `TaskLevel`.

    Example:
        >>> HeldOut(nn.Linear(1, 1), model=None).names
        ('weight', 'bias')
    """

    def __init__(self, weights: nn.Module, model: Any, **level: Any) -> None:
        self.model = model
        super().__init__(weights.named_parameters(), **level)

    def loss(self, batch: Any) -> Tensor:
        """The loss of the model."""
        require_labels(batch)
        loss: Tensor = self.model(**without(batch, COLUMNS)).loss
        return loss * batch[WEIGHT].to(loss.dtype) if WEIGHT in batch else loss


def example_losses(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The loss ℓ_i of each example, ``(n,)``: its sum by its count, see `example_sums`.

    An example without a label to score has ℓ_i = 0.

    Raises:
        ProblemError: see `example_sums`.

    Example:
        >>> from types import SimpleNamespace
        >>> model = lambda x: SimpleNamespace(logits=x)
        >>> example_losses(model, {"x": torch.zeros(3, 2), "labels": torch.tensor([0, 1, 1])})
        tensor([0.6931, 0.6931, 0.6931])
    """
    sums, counts = example_sums(model, batch)
    return sums / counts.clamp(min=1)


def example_sums(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The summed loss of each example, ``(n,)``, and how many labels it has, ``(n,)``.

    The model's own loss, of which it returns only the mean, is the sum of all by the count of all:
    the cross entropy of whole numbers, the squared error of floating-point labels, and the binary
    cross entropy of these where ``problem_type`` is ``multi_label_classification``. With a label
    for each token, -100 is ignored, and a causal language model predicts the next token. Text
    must be padded on the right, since a token after padding is predicted as well.

    Args:
        model: a Transformers model, with or without a PEFT adapter.
        batch: the model's arguments and ``labels``. A sequence-to-sequence model also needs
            ``decoder_input_ids``, of ``DataCollatorForSeq2Seq(tokenizer, model)``.

    Raises:
        ProblemError: there are no labels, or labels that do not fit the logits.

    Example:
        >>> from types import SimpleNamespace
        >>> model = lambda x: SimpleNamespace(logits=x)
        >>> example_sums(model, {"x": torch.zeros(2, 1), "labels": torch.tensor([1.0, 3.0])})
        (tensor([1., 9.]), tensor([1, 1]))
    """
    labels = require_labels(batch)
    logits = model(**without(batch, ("labels", *COLUMNS))).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.is_floating_point():
        return _of_numbers(model, logits, labels)
    if labels.dim() != logits.dim() - 1:
        raise _unfit(labels, logits)
    if labels.dim() > 1:  # prompt tuning adds logits before those of the tokens
        labels = pad(labels, (logits.shape[1] - labels.shape[1], 0), value=-100)
    if _is_causal(model):
        labels = pad(labels, (0, 1), value=-100)[:, 1:]
    each = cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    rows = each.view(len(labels), -1).sum(1)
    return rows, (labels != -100).view(len(labels), -1).sum(1)


def weighted_mean(weights: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """Σ v_i s_i / Σ c_i, of `example_sums`: the loss of the model where each weight is 1.

    Example:
        >>> weighted_mean(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 9.0]), torch.tensor([1, 1]))
        tensor(0.5000)
    """
    return (weights.to(sums.dtype) * sums).sum() / counts.sum().clamp(min=1)


def _of_numbers(model: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if labels.numel() != logits.numel():
        raise _unfit(labels, logits)
    labels = labels.to(logits.dtype).view_as(logits)
    if getattr(getattr(model, "config", None), "problem_type", None) == MULTI_LABEL:
        each = binary_cross_entropy_with_logits(logits, labels, reduction="none")
    else:
        each = mse_loss(logits, labels, reduction="none")
    rows = each.view(len(labels), -1)
    return rows.sum(1), torch.full_like(rows[:, 0], rows.shape[1], dtype=torch.int64)


def _unfit(labels: Tensor, logits: Tensor) -> ProblemError:
    return ProblemError(
        f"labels: must be a class for each example or token, or a number for each logit, got "
        f"{labels.dtype} of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}"
    )


def column(batch: Any, name: str, count: int, what: str) -> Tensor:
    """``batch[name]``, ``(n,)``: whole numbers from 0 and below ``count``.

    Raises:
        ProblemError: there is no such column, or the column has other values.

    Example:
        >>> column({"source": torch.tensor([0, 1])}, "source", 2, "source")
        tensor([0, 1])
    """
    if name not in batch:
        raise ProblemError(
            f"column {name!r}: the batch has only {sorted(batch)}; add the number of the {what} to "
            "each row of the training set, and set remove_unused_columns=False in a Trainer"
        )
    values = batch[name]
    if not isinstance(values, Tensor) or values.dim() != 1 or values.dtype != torch.int64:
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise ProblemError(f"column {name!r}: must be a whole number an example, got {kind}")
    low, high = (int(x) for x in values.aminmax())
    if low < 0 or high >= count:
        raise ProblemError(
            f"column {name!r}: {low if low < 0 else high} is no {what} of {count}; use "
            f"numbers from 0 to {count - 1}"
        )
    return values


def require_labels(batch: Any) -> Tensor:
    """``batch["labels"]``.

    Raises:
        ProblemError: there are no labels, or they are no tensor.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ProblemError(f"labels: the batch must have a tensor of labels, got {found}")
    labels: Tensor = batch["labels"]
    return labels


def without(batch: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """``batch`` without the entries ``names``."""
    return {key: value for key, value in batch.items() if key not in names}


def _is_causal(model: Any) -> bool:
    base = base_model(model)
    return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
