"""Losses of a model's labels and rows, the logits they score, and weights of micro-batches.

The models are Hugging Face's: ``model(**batch)`` returns ``loss`` and ``logits``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature, unwrap
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperopt_peft.core.logits import IGNORED, beside_logits, losses_of_logits, next_labels
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.autograd import function_modes_off
from hyperopt_peft.utils.models import base_model, in_mode, uncounted
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.types import Batch, Model

#: Entries that a Trainer adds to a micro-batch, so that the mean over a step's micro-batches is the
#: loss of the step. A mean over labels is multiplied by ``WEIGHT`` (`label_weights`). A sum over
#: labels is divided by ``ITEMS``, the number of labels in the step (in all processes, where the
#: Trainer multiplies the loss by the number of processes), and multiplied by ``MICRO_BATCHES``.
WEIGHT, ITEMS, MICRO_BATCHES = ENTRIES = "loss_weight", "num_items_in_batch", "micro_batches"
#: The argument that makes TRL's head return log-probabilities of the labels, without logits.
FUSED = "fused_lm_head"
#: Advice for a model whose loss follows no rule of this module.
OWN_LOSS = "write the level as a Problem with a loss of your own"
#: Advice for a loss of a user's own.
ADVICE = (
    "give row_losses, a function of (model, batch) that returns the loss of each row "
    "(hyperopt_peft.method.row_losses where the loss is the mean over labels)"
)
#: The cause of a loss that is not finite, in a batch without scored labels.
NO_LABELS = (
    f"all labels of a micro-batch are {IGNORED}, and a mean over none is not a number; remove rows "
    "without labels, or cut fewer tokens off"
)

#: A relative difference of this size between a loss and the mean over labels is rounding.
TOLERANCE = 1e-2

#: The losses of the rows of a batch by a user's own rule, a function of model and batch. It returns
#: ℓ ``(n,)``, whose mean is the loss; or ℓ and c, both ``(n,)``, where Σ ℓ/Σ c is the loss.
RowLosses = Callable[[Any, Any], "Tensor | tuple[Tensor, Tensor]"]

_RULES = (False, True)
# Caches per model: whether labels are shifted, and which models passed the mean-loss check.
_SHIFTED: WeakKeyDictionary[Model, bool] = WeakKeyDictionary()
_MEAN: WeakSet[Model] = WeakSet()


def labels_are_shifted(model: Model, batch: Batch) -> bool:
    """Whether the loss of ``model`` compares a token's logits with the next token's label.

    The test differentiates the model's own loss on one row of ``batch``, with other labels, with
    respect to the logits. At each position the derivative is negative only for the class that the
    loss scores there: the position's own label, or the next one. If the logits have no gradient,
    the value of the loss is compared. The result of the first batch is cached for the model. Model
    and random state are restored. Without a label for each token the result is False.

    Raises:
        ProblemError: neither rule fits; the model returns no loss or no logits.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point():
        return False
    if model not in _SHIFTED:
        _SHIFTED[model] = has_fused_head(model) or _shifted(model, batch)
    return _SHIFTED[model]


def row_losses(model: Model, batch: Batch, own: RowLosses | None = None) -> tuple[Tensor, Tensor]:
    """The summed loss of each row, ``(n,)``, and the number of scored labels in it, ``(n,)``.

    The quotient of their sums is the model's own loss. For arguments and errors see `label_losses`.
    A user's ``own`` rule takes its place; ProblemError unless it returns numbers of rows.

    Example:
        >>> from hyperopt_peft.heads import Head
        >>> batch = {"features": torch.ones(2, 3), "labels": torch.tensor([0, 1])}
        >>> row_losses(Head(3, 2), batch)  # log 2
        (tensor([0.6931, 0.6931], grad_fn=...), tensor([1, 1]))
    """
    if own is None:
        losses, counts = (x.reshape(len(x), -1).sum(1) for x in label_losses(model, batch))
        return losses, counts
    found = own(model, {key: value for key, value in batch.items() if key not in ENTRIES})
    both = (found, torch.ones_like(found)) if isinstance(found, Tensor) else tuple(found)
    shapes = [tuple(getattr(x, "shape", "–")) for x in both]
    of_rows = len(both) == 2 and shapes[0] == shapes[1] and len(shapes[0]) == 1
    if not (of_rows and both[0].is_floating_point()):
        raise ProblemError(
            "row_losses: must return the loss of each row, (n,), or the losses and the numbers by "
            f"whose sum their sum is divided, got shapes {shapes}"
        )
    return both[0], both[1]


def is_mean_over_labels(rule: RowLosses | None) -> bool:
    """Whether ``rule``, or the function that it wraps, is `row_losses` itself, or there is none."""
    return rule is None or unwrap(rule) is row_losses


def mean_loss(losses: Tensor, counts: Tensor) -> Tensor:
    """Σ ℓ/Σ c, 0 if Σ c is 0."""
    total = counts.sum()
    return losses.sum() / (total + (total == 0))


def label_losses(model: Model, batch: Batch, *, twice: bool = False) -> tuple[Tensor, Tensor]:
    """The loss of each label, and a mask of the scored labels, both in the shape of ``labels``.

    The loss is the cross entropy for integer labels, and the squared error for floating-point
    labels, or binary cross entropy if ``problem_type`` is ``multi_label_classification``. A label
    of -100 is not scored and has loss 0; `labels_are_shifted` says which logits predict a token's
    label. Pad text on the right, since a token after padding is scored too. A model's first batch
    checks that the mean over the labels is the model's own loss.

    Args:
        model: the model, with or without a PEFT adapter.
        batch: the model's arguments and ``labels``; a Trainer's `ENTRIES` are ignored. A
            sequence-to-sequence model also needs ``decoder_input_ids``.
        twice: whether the losses are differentiated twice. The losses of TRL's fused head cannot
            be; the logits are computed instead.

    Raises:
        ProblemError: there are no labels, or they do not fit the logits; or the model's own loss
            is not a mean over labels, or includes the auxiliary loss of a router.
    """
    labels = require_labels(batch)
    batch = {key: value for key, value in batch.items() if key not in ENTRIES}
    _require_no_router_loss(model)
    if has_fused_head(model) and not twice:
        with model_reads(batch):
            output = model(**batch, **{FUSED: True})
        # The first position has no prediction; the positions of a tuned prompt are cut off.
        scored = pad(output.label_mask, (1, 0))[:, -labels.shape[1] :]
        return pad(-output.log_probs, (1, 0))[:, -labels.shape[1] :], scored
    shifted = labels_are_shifted(model, batch)
    if model not in _MEAN:  # before the losses, whose graph may hold buffers
        _require_mean(model, batch, shifted)
        _MEAN.add(model)
    return losses_of_logits(model, logits_of(model, batch), labels, shifted=shifted)


def logits_of(model: Model, batch: Batch, tags: Sequence[str] = ()) -> Tensor:
    """The logits of ``model`` for ``batch`` without its labels, `ENTRIES` and ``tags``."""
    inputs = {name: x for name, x in batch.items() if name not in ("labels", *ENTRIES, *tags)}
    with model_reads(inputs):
        logits: Tensor = model(**inputs).logits
    return logits


def _require_no_router_loss(model: Any) -> None:
    """Raise ProblemError for a mixture of experts whose loss balances its router."""
    config: Any = getattr(base_model(model), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if coefficient and getattr(config, "output_router_logits", False):
        raise ProblemError(
            f"router_aux_loss_coef: the loss of {type(base_model(model)).__name__} includes "
            f"{coefficient:g} times the router's auxiliary loss, which has no part for each row; "
            "set 0 in the SFTConfig, or output_router_logits=False in the model's configuration"
        )


def has_fused_head(model: Model) -> bool:
    """Whether ``model`` has the head of TRL's trainers, which scores the next token's label."""
    forward = base_model(model).forward
    while forward is not None:  # accelerate wraps the forward too
        if FUSED in signature(forward, follow_wrapped=False).parameters:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def scored_labels(batch: object, *, shifted: bool) -> Tensor | None:
    """Which labels of ``batch`` are scored, a mask in their shape; None without labels.

    All are but `IGNORED`, and with ``shifted`` the first of each row.
    """
    entries = batch if isinstance(batch, Mapping) else {}
    of_next = entries.get("shift_labels")
    labels = entries.get("labels") if of_next is None else of_next
    if not isinstance(labels, Tensor):
        return None
    scored = labels.ne(IGNORED) | labels.is_floating_point()
    if shifted and of_next is None:
        scored[..., 0] = False
    return scored


def counts_of_labels(batches: Sequence[Any], *, shifted: bool) -> list[Tensor] | None:
    """The number of `scored_labels` of each batch; None if one has no labels."""
    masks = [scored_labels(batch, shifted=shifted) for batch in batches]
    counts = [mask.sum() for mask in masks if mask is not None]
    return counts if len(counts) == len(masks) > 0 else None


def label_weights(counts: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """The entries for each batch that make a step's loss the mean over all labels of the step.

    The loss of micro-batch i on process p is the mean over its c_ip scored labels. The loss of a
    step of n micro-batches on P processes is

        1/(nP) Σ_ip weight_ip · loss_ip,   weight_ip = c_ip · nP / Σ c

    ``counts`` has the c of this process, as `counts_of_labels` returns them.
    """
    # Apple's devices have no float64.
    exact = torch.float32 if counts[0].is_mps else torch.float64
    mean = distributed.average(torch.stack([*counts]).sum().to(exact)) / len(counts)
    return [{WEIGHT: count / mean} for count in counts]


def require_labels(batch: object) -> Tensor:
    """``batch["labels"]``; raises ProblemError if this is not a tensor.

    Example:
        >>> require_labels({})
        Traceback (most recent call last):
        hyperopt_peft.errors.ProblemError: labels: the batch must have a tensor of labels, got []
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        entries = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ProblemError(f"labels: the batch must have a tensor of labels, got {entries}")
    labels: Tensor = batch["labels"]
    return labels


def _shifted(model: Model, batch: Batch) -> bool:
    gradient, labels = None, require_labels(batch)
    # One row saves memory, since gradient checkpointing is off in evaluation mode.
    batch = {key: rows_of(value, len(labels), slice(1)) for key, value in batch.items()}
    # 0, 1, 1, 0, 0, ...: the labels one, two or three positions later differ somewhere.
    labels = (torch.arange(labels.shape[-1], device=labels.device)[None] + 1) // 2 % 2
    batch["labels"] = labels
    with _probing(model), torch.enable_grad():
        output = _output(model, batch)
        if output.logits.requires_grad:
            (gradient,) = torch.autograd.grad(output.loss, output.logits, allow_unused=True)
    if gradient is None:  # all parameters are frozen, or the loss does not read these logits
        errors = {s: _error_of_mean(model, batch, output, s) for s in _RULES}
        fitting = sorted((s for s in _RULES if errors[s] <= TOLERANCE), key=errors.__getitem__)
    else:  # the cross entropy of a position falls only with the logit of the scored class
        reached, scored = gradient.ne(0).any(-1), gradient.argmin(-1)
        labels = beside_logits(labels, scored.shape[1])
        expected = {False: labels, True: next_labels(labels)}
        fitting = [s for s in _RULES if not (reached & (scored != expected[s])).any()]
    if not fitting:
        raise ProblemError(
            f"{type(model).__name__}: the loss compares a token's logits neither with the token's "
            f"label nor with the next one; {OWN_LOSS}"
        )
    return fitting[0]


def rows_of(value: object, count: int, which: slice | Tensor) -> Any:
    """``value[which]`` if ``value`` is a tensor of ``count`` rows; else ``value`` unchanged."""
    return value[which] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value


def with_all_classes(model: Model, batch: Batch) -> list[Batch]:
    """``batch`` with the labels 0, 1, 2, …, and 1, 2, 3, …; alone if its labels are numbers.

    A batch of sorted rows may have one class, which does not show that classes have weights; with
    one set of labels a weighted mean may be the plain one by chance.
    """
    labels = require_labels(batch)
    if labels.is_floating_point():
        return [batch]
    row = {key: rows_of(value, len(labels), slice(1)) for key, value in batch.items()}
    with _probing(model), torch.no_grad():
        classes = logits_of(model, row).shape[-1]
    numbers = torch.arange(labels.numel(), device=labels.device).view(labels.shape)
    return [{**batch, "labels": (numbers + first) % classes} for first in (0, 1)]


def _require_mean(model: Model, batch: Batch, shifted: bool) -> None:
    """Raise ProblemError unless the model's loss is the mean over labels, as a function of logits.

    Values and gradients are compared in training mode: where all logits are equal, as those of a
    new head, weights of classes hardly change the value.
    """
    for labelled in with_all_classes(model, batch):
        for training in (True, False):
            with _probing(model, training=training), torch.enable_grad():
                output = _output(model, labelled, without_logits=training)
                if output is None:  # a model whose training is fused, such as Liger's
                    continue
                error = _error_of_mean(model, labelled, output, shifted, gradients=True)
                del output
                break
        if error > TOLERANCE:
            raise ProblemError(
                f"{type(model).__name__}: the loss of the first batch, or its slope by the logits, "
                f"is not that of the mean over labels, so that rows have no losses; {OWN_LOSS}"
            )


def _error_of_mean(
    model: Model,
    batch: Batch,
    output: Any,
    shifted: bool,
    *,
    gradients: bool = False,
) -> float:
    """The relative difference between the model's own loss and the mean over its labels.

    With ``gradients``, the larger one of this and that of the gradients by the logits.
    """
    labels, logits = require_labels(batch), output.logits.detach().requires_grad_(gradients)
    mean = mean_loss(*losses_of_logits(model, logits, labels, shifted=shifted))
    pairs = [(output.loss.detach().to(mean.dtype), mean.detach())]
    if gradients and output.logits.requires_grad:
        (own,) = torch.autograd.grad(output.loss, output.logits, allow_unused=True)
        if own is not None:  # else the model scores a copy of its logits
            pairs.append((own, *torch.autograd.grad(mean, logits)))
    floors = (TOLERANCE, 1e-30)
    return max(
        float((a - b).float().norm() / b.float().norm().clamp(min=floor))
        for (a, b), floor in zip(pairs, floors)
    )


def _output(model: Model, batch: Batch, *, without_logits: bool = False) -> Any:
    """Loss and logits; with ``without_logits`` None if there are no logits."""
    parameters = signature(base_model(model).forward).parameters
    if "labels" in parameters:  # the Trainer's batch may have further columns
        batch = {key: value for key, value in batch.items() if key in parameters}
    with model_reads(batch):
        output = model(**batch)
    if without_logits and getattr(output, "logits", None) is None:
        return None
    if not all(isinstance(getattr(output, name, None), Tensor) for name in ("loss", "logits")):
        raise ProblemError(
            f"{type(model).__name__}: the model must return loss and logits for a batch with "
            f"labels; {OWN_LOSS}, or, over TRL's SFTTrainer, install trl>=1.15"
        )
    return output


@contextmanager
def model_reads(batch: Batch) -> Iterator[None]:
    """Turn an error of the model in the body into a ProblemError that names ``batch``'s entries."""
    try:
        yield
    except (TypeError, ValueError, IndexError) as error:
        raise ProblemError(
            f"the model has no loss for a batch with {sorted(batch)}: {error}; give the data the "
            "columns that the model's forward takes, with valid labels (a sequence-to-sequence "
            "model needs DataCollatorForSeq2Seq(tokenizer, model))"
        ) from error


@contextmanager
def _probing(model: Model, *, training: bool = False) -> Iterator[None]:
    """Evaluation mode, in which heads are not fused; afterwards all state is restored."""
    try:
        unseen = replay(RandomState.capture()), uncounted()
        with in_mode(model, training), function_modes_off(), unseen[0], unseen[1]:
            yield
    finally:
        distributed.reshard(model)
