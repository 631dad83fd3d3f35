"""Labels: which logits a model's loss scores, the loss of each row, and weights of micro-batches.

All functions take the models of Hugging Face: ``model(**batch)`` returns ``loss`` and ``logits``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hyperopt_peft.core.logits import IGNORED, beside_logits, losses_of_logits, next_labels
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.autograd import function_modes_off
from hyperopt_peft.utils.models import base_model, evaluating
from hyperopt_peft.utils.random_state import RandomState, replay

#: Entries of a micro-batch that a Trainer adds for the loss of a step, the mean over its
#: micro-batches. A mean over labels is multiplied by ``WEIGHT``, see `label_weights`. A sum over
#: labels is divided by ``ITEMS``, the labels of the whole step (of all processes, where the Trainer
#: multiplies the loss by their number), and multiplied by ``MICRO_BATCHES``, their number.
WEIGHT, ITEMS, MICRO_BATCHES = ENTRIES = "loss_weight", "num_items_in_batch", "micro_batches"
#: The argument with which TRL's head returns the log-probabilities of labels without logits.
FUSED = "fused_lm_head"
#: What to do about a loss that is none of the rules of this module.
OWN_LOSS = "write the level as a Problem with a loss of your own"

#: The relative difference of a model's own loss and the mean over labels that is rounding.
TOLERANCE = 1e-2

_RULES = (False, True)
# A model is asked once: the answers of some, and the models whose loss is a mean over labels.
_SHIFTED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_MEAN: WeakSet[nn.Module] = WeakSet()


def labels_are_shifted(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the loss of ``model`` compares the logits of a token with the next token's label.

    No name decides: the model's own loss on ``batch``, with other labels, is differentiated by its
    logits. At each position the derivative is negative for the class alone that the loss scores
    there: the position's label, or the next one's. Without a gradient the loss's value decides. The
    first batch decides for the model; the pass leaves model and random state as they were. Without
    a label for each token the answer is False.

    Raises:
        ProblemError: neither rule fits; the model returns no loss or no logits.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point():
        return False
    if model not in _SHIFTED:
        _SHIFTED[model] = has_fused_head(model) or _shifted(model, batch)
    return _SHIFTED[model]


def row_losses(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The summed loss of each row, ``(n,)``, and how many labels the row has, ``(n,)``.

    Arguments and errors are those of `label_losses`. The model's own loss is the sum of all by the
    count of all.
    """
    each = label_losses(model, batch)
    losses, counts = (x.reshape(len(x), -1).sum(1) for x in each)
    return losses, counts


def label_losses(
    model: Any, batch: Mapping[str, Any], *, twice: bool = False
) -> tuple[Tensor, Tensor]:
    """The loss of each label, of the shape of ``labels``, and whether the label is scored.

    It is the cross entropy of whole numbers, the squared error of floating-point labels, or the
    binary cross entropy of these where ``problem_type`` is ``multi_label_classification``. A label
    of -100 is not scored and has the loss 0; `labels_are_shifted` says which logits predict a
    token's label. Text must be padded on the right, since a token after padding is predicted as
    well. The first batch of a model compares the model's own loss with the mean.

    Args:
        model: the model, with or without a PEFT adapter.
        batch: the model's arguments and ``labels``; a Trainer's `ENTRIES` are not read. A
            sequence-to-sequence model also needs ``decoder_input_ids``.
        twice: whether the losses are differentiated twice, which those of TRL's fused head cannot
            be; the model then makes logits.

    Raises:
        ProblemError: there are no labels, or labels that do not fit the logits; or the model's own
            loss is no mean over labels, or has the auxiliary loss of a router.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10))
        >>> ids = torch.tensor([[3, 1, 4], [1, 5, -100]])
        >>> losses, scored = label_losses(model, {"input_ids": ids.clamp(min=0), "labels": ids})
        >>> losses.shape, scored.tolist()
        (torch.Size([2, 3]), [[False, True, True], [False, True, False]])
    """
    labels = require_labels(batch)
    batch = {key: value for key, value in batch.items() if key not in ENTRIES}
    _require_no_router_loss(model)
    if has_fused_head(model) and not twice:
        with model_reads(batch):
            output = model(**batch, **{FUSED: True})
        # The first position has no prediction; those of a prompt that is tuned are left out.
        scored = pad(output.label_mask, (1, 0))[:, -labels.shape[1] :]
        return pad(-output.log_probs, (1, 0))[:, -labels.shape[1] :], scored
    shifted = labels_are_shifted(model, batch)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with model_reads(inputs):
        output = model(**inputs)
    losses = losses_of_logits(model, output.logits, labels, shifted=shifted)
    if model not in _MEAN:
        _require_mean(model, batch, shifted)
        _MEAN.add(model)
    return losses


def _require_no_router_loss(model: Any) -> None:
    """Raise ProblemError for a mixture of experts whose loss balances its router."""
    config: Any = getattr(base_model(model), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if coefficient and getattr(config, "output_router_logits", False):
        raise ProblemError(
            f"router_aux_loss_coef: the loss of {type(base_model(model)).__name__} has the "
            f"router's auxiliary loss times {coefficient:g}, which is no sum over rows; set 0 in "
            "the SFTConfig, or output_router_logits=False in the model's configuration"
        )


def has_fused_head(model: Any) -> bool:
    """Whether ``model`` has the head of TRL's trainers, which scores the next token's label."""
    forward = base_model(model).forward
    while forward is not None:  # accelerate wraps the forward too
        if FUSED in signature(forward, follow_wrapped=False).parameters:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def scored_labels(batch: Any, shifted: bool) -> Tensor | None:
    """The number of labels of ``batch`` that are scored; None without labels."""
    if not isinstance(batch, Mapping):
        return None
    labels = batch.get("shift_labels")
    if labels is None:
        labels = batch.get("labels")
        if shifted and isinstance(labels, Tensor):
            labels = labels[..., 1:]
    return labels.ne(IGNORED).sum() if isinstance(labels, Tensor) else None


def label_weights(batches: Sequence[Any], *, shifted: bool) -> list[dict[str, Tensor]]:
    """The entries of each batch that make a step's loss the mean over all of its labels.

    The loss of micro-batch i on process p is the mean over its c_ip labels that are scored. The
    loss of a step of n micro-batches on P processes is

        1/(nP) Σ_ip weight_ip · loss_ip,   weight_ip = c_ip · nP / Σ c

    There are no entries where a batch has no labels. With ``shifted`` the first label of a row is
    not scored.
    """
    counts = [scored_labels(batch, shifted) for batch in batches]
    counted = [count for count in counts if count is not None]
    if not counted or len(counted) < len(batches):
        return [{} for _ in batches]
    # Apple's devices have no floats of 64 bits.
    exact = torch.float32 if counted[0].is_mps else torch.float64
    mean = distributed.average(torch.stack(counted).sum().to(exact)) / len(counted)
    return [{WEIGHT: count / mean} for count in counted]


def require_labels(batch: Any) -> Tensor:
    """``batch["labels"]``; raises ProblemError where there is no tensor of labels."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        entries = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ProblemError(f"labels: the batch must have a tensor of labels, got {entries}")
    labels: Tensor = batch["labels"]
    return labels


def _shifted(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    gradient, labels = None, require_labels(batch)
    # 0, 1, 1, 0, 0, ...: one, two and three positions later the labels are others.
    pattern = (torch.arange(labels.shape[-1], device=labels.device) + 1) // 2 % 2
    # One row, since evaluation mode has no gradient checkpoints.
    batch = {key: rows_of(value, len(labels), slice(1)) for key, value in batch.items()}
    labels = pattern[None]
    batch["labels"] = labels
    with _probing(model), torch.enable_grad():
        output = _output(model, batch)
        if output.logits.requires_grad:
            (gradient,) = torch.autograd.grad(output.loss, output.logits, allow_unused=True)
    if gradient is None:  # all parameters are frozen, or the loss is of other logits
        errors = {shifted: _error_of_mean(model, batch, output, shifted) for shifted in _RULES}
        fitting = [shifted for shifted in _RULES if errors[shifted] <= TOLERANCE]
        fitting.sort(key=lambda shifted: float(errors[shifted]))
    else:  # a position's cross entropy falls with the logit of its label alone
        reached, scored = gradient.ne(0).any(-1), gradient.argmin(-1)
        labels = beside_logits(labels, scored.shape[1])
        expected = {False: labels, True: next_labels(labels)}
        fitting = [s for s in _RULES if not (reached & (scored != expected[s])).any()]
    if not fitting:
        raise ProblemError(
            f"{type(model).__name__}: the loss scores the logits of a token neither by its label "
            f"nor by the next token's; {OWN_LOSS}"
        )
    return fitting[0]


def rows_of(value: Any, count: int, which: slice | Tensor) -> Any:
    """The rows ``which``, a slice or mask, of a column of ``count`` rows; another value itself."""
    return value[which] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value


def _require_mean(model: nn.Module, batch: Mapping[str, Any], shifted: bool) -> None:
    labels = require_labels(batch)
    batch = {**batch, "labels": labels.where(labels != IGNORED, 0)}  # no mean is over nothing
    with _probing(model), torch.no_grad():
        output = _output(model, batch)
        if _error_of_mean(model, batch, output, shifted) <= TOLERANCE:
            return
    raise ProblemError(
        f"{type(model).__name__}: the loss of the first batch is {float(output.loss):.4g}, which "
        "is no mean over the labels, so that a row has no loss of its own; " + OWN_LOSS
    )


def _error_of_mean(
    model: nn.Module, batch: Mapping[str, Any], output: Any, shifted: bool
) -> Tensor:
    """The relative difference of the model's own loss and the mean over its labels."""
    labels, logits = require_labels(batch), output.logits.detach()
    losses, scored = losses_of_logits(model, logits, labels, shifted=shifted)
    mean = losses.sum() / scored.sum().clamp(min=1)
    loss: Tensor = output.loss.detach().to(mean.dtype)
    return (loss - mean).abs() / mean.abs().clamp(min=TOLERANCE)


def _output(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    parameters = signature(base_model(model).forward).parameters
    if "labels" in parameters:  # a Trainer's columns may be others' than the model's
        batch = {key: value for key, value in batch.items() if key in parameters}
    with model_reads(batch):
        output = model(**batch)
        loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
        if logits is None:  # with labels TRL's head makes none, from 1.4 to 1.14
            output = model(**{key: value for key, value in batch.items() if key != "labels"})
            logits = getattr(output, "logits", None)
    if not isinstance(loss, Tensor) or not isinstance(logits, Tensor):
        raise ProblemError(
            f"{type(model).__name__}: the model must return loss and logits for a batch with "
            f"labels; {OWN_LOSS}"
        )
    return SimpleNamespace(loss=loss, logits=logits)


@contextmanager
def model_reads(batch: Mapping[str, Any]) -> Iterator[None]:
    """Turn the errors of a model that cannot read ``batch`` in the body into a ProblemError."""
    try:
        yield
    except (TypeError, ValueError, IndexError) as error:
        raise ProblemError(
            f"the model has no loss for a batch of {sorted(batch)}: {error}; give the data the "
            "columns of the model's forward, with valid labels (a sequence-to-sequence model "
            "needs DataCollatorForSeq2Seq(tokenizer, model))"
        ) from error


@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which heads are not fused; afterwards all is as before."""
    try:
        with evaluating(model), function_modes_off(), replay(RandomState.capture()):
            yield
    finally:
        distributed.reshard(model)
