"""The loss of each label, from a model's logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, pad
from torch.utils.checkpoint import checkpoint

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.types import Model
from hyperopt_peft.utils.vector import widened

#: The label of a position that is not scored.
IGNORED = -100
MULTI_LABEL = "multi_label_classification"
#: The most logits that a cross entropy copies to float32 at a time, 128 MiB.
CHUNK = 2**25


def losses_of_logits(
    model: Model, logits: Tensor, labels: Tensor, *, shifted: bool
) -> tuple[Tensor, Tensor]:
    """The loss of each label, 0 if not scored, and a mask of the scored labels.

    Both have the shape of ``labels``. Half-precision logits are widened to float32 in chunks.

    Args:
        model: the model; its ``problem_type`` selects the loss of floating-point labels.
        logits: ``(n, C)``, or ``(n, T, C)`` with T or more positions.
        labels: integers ``(n,)`` or ``(n, T)``, -100 for none, or a float for each logit.
        shifted: whether the logits of a position predict the next position's label.
    """
    labels = as_numbers(model, labels)
    if labels.is_floating_point():
        return _of_numbers(model, logits, labels)
    if labels.dim() != logits.dim() - 1:
        raise _unfit(labels, logits)
    if labels.dim() == 1:
        return _cross_entropy(logits, labels), labels != IGNORED
    targets = beside_logits(labels, logits.shape[1])
    targets = next_labels(targets) if shifted else targets
    each = _cross_entropy(logits.flatten(0, 1), targets.flatten()).view_as(targets)
    scored = targets != IGNORED
    if shifted:  # to the position of the label
        each, scored = pad(each[:, :-1], (1, 0)), pad(scored[:, :-1], (1, 0))
    return each[:, -labels.shape[1] :], scored[:, -labels.shape[1] :]


def as_numbers(model: Model, labels: Tensor) -> Tensor:
    """``labels`` in floating point if ``model`` predicts a number for each row, as for ratings."""
    config: Any = getattr(model, "config", None)
    kind, outputs = (getattr(config, name, None) for name in ("problem_type", "num_labels"))
    number = kind == "regression" or (kind is None and outputs == 1)  # as Transformers infers
    integers = not labels.is_floating_point() and labels.numel() == len(labels)
    return labels.float() if number and integers else labels


def next_labels(labels: Tensor) -> Tensor:
    """For each position the label of the next one; -100 for the last."""
    return pad(labels, (0, 1), value=IGNORED)[:, 1:]


def beside_logits(labels: Tensor, length: int) -> Tensor:
    """``labels`` padded on the left to ``length``: prompt tuning adds positions at the start."""
    return pad(labels, (length - labels.shape[1], 0), value=IGNORED)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(logits)[label] of each row, widened to float32 in chunks, again in backward."""
    size = max(1, CHUNK // logits.shape[-1])
    if len(labels) <= size:
        return _of_chunk(logits, labels)
    chunks = zip(logits.split(size), labels.split(size), strict=True)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(_of_chunk, *chunk, **options) for chunk in chunks])


def _of_chunk(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(widened(logits), labels, reduction="none", ignore_index=IGNORED)


def _of_numbers(model: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if labels.numel() != logits.numel():
        raise _unfit(labels, logits)
    logits = widened(logits).view_as(labels)
    multi_label = getattr(getattr(model, "config", None), "problem_type", None) == MULTI_LABEL
    loss = binary_cross_entropy_with_logits if multi_label else mse_loss
    each = loss(logits, labels.to(logits.dtype), reduction="none")
    return each, torch.ones_like(each, dtype=torch.bool)


def _unfit(labels: Tensor, logits: Tensor) -> ProblemError:
    return ProblemError(
        f"labels: must be a class for each example or token, or a number for each logit, got "
        f"{labels.dtype} of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}"
    )
