"""Whose loss a Trainer trains: a mean over labels by declaration, or by the user's ``row_losses``.

A loss is known to be the mean over labels if `transformers.Trainer`, or TRL's SFTTrainer with
``loss_type="nll"``, computes it over a known library's model. Any other is the user's own: values
on a few batches do not show a term that is 0 at first, or in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from hyperopt_peft.core.labels import (
    ADVICE,
    ENTRIES,
    TOLERANCE,
    RowLosses,
    counts_of_labels,
    labels_are_shifted,
    mean_loss,
    row_losses,
)
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.internals import metrics_restored
from hyperopt_peft.trainer.tags import without
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.models import in_mode, is_stock, own_loss_of, trainable, uncounted
from hyperopt_peft.utils.random_state import RandomState, replay

logger = logging.get_logger(__name__)
#: The number of batches on which ``row_losses`` are compared with ``compute_loss``.
BATCHES = 5


def own_loss(trainer: Any, *, of_model: bool = True) -> str:
    """What makes the loss of ``trainer`` another than a known mean over labels; "" if nothing.

    ``of_model`` says whether the model's own loss counts.
    """
    for name in ("label_smoother", "compute_loss_func"):
        if getattr(trainer, name) is not None:
            return name.replace("label_smoother", "label_smoothing_factor")
    for place in (trainer, *type(trainer).__mro__):
        function, name = vars(place).get("compute_loss"), getattr(place, "__name__", "")
        known = place.__module__.partition(".")[0] != "trl" or name == "SFTTrainer"
        if function is not None and not (known and is_stock(function)):
            return f"{type(trainer).__name__}.compute_loss"
        kind = getattr(trainer.args, "loss_type", "nll")
        if name == "SFTTrainer" and kind != "nll":
            return f"loss_type={kind!r}"
    return own_loss_of(trainer.model) if of_model else ""


@dataclass
class Rule:
    """The user's ``row_losses``, which counts its calls, for batches that have ``tags`` too."""

    function: RowLosses
    tags: Sequence[str] = ()
    reads: int = 0

    def __post_init__(self) -> None:
        self.__wrapped__ = self.function

    def __call__(self, model: Any, batch: Any) -> Any:
        """ℓ, or ℓ and c."""
        self.reads += 1
        return self.function(model, without(batch, (*self.tags, *ENTRIES)))


def check_known(trainer: Any) -> None:
    """Raise ProblemError for a level of `WeightedRows` without the losses of its rows."""
    levels = [level.examples for level in trainer.levels if level.examples is not None]
    if any(level.row_losses is None for level in levels) and (
        name := own_loss(trainer, of_model=False)
    ):
        raise ProblemError(f"{name}: is no known mean over labels; {ADVICE}")


def require_read(trainer: Any, batch: Any, *, rows_read: bool) -> None:
    """Raise ProblemError if the lower level, which did not call ``task_loss``, drops a user's loss.

    If it has read the losses of rows of ``batch``, or the user says that they are those of the mean
    over labels, they are compared with the Trainer's loss, but for FSDP2, where a further pass
    would move shards.
    """
    lower, method, rule = trainer.lower, trainer.method, trainer.phase.row_losses
    of_level = getattr(lower.examples, "row_losses", None)  # which the user may have made
    if rows_read or of_level is not None or rule is row_losses:
        if (given := rule or of_level) is not None and not trainer.is_fsdp_enabled:
            compare(trainer, given, batch, trainer.tags, lower.variables)
        return
    # Levels that a user gives in place of a method replace the model's loss.
    name = "row_losses" if rule else own_loss(trainer, of_model=method is not None)
    if not name:
        return
    text = f"{name}: {lower.name} drops it, since its loss does not call task_loss"
    if not getattr(method, "own_loss", False):
        advice = ", or let the method say own_loss = True" if method else ""
        raise ProblemError(f"{text}; leave {name} out{advice}")
    logger.warning_once(text)


def require_row_losses(
    trainer: Any, rule: RowLosses | None, batches: Sequence[Any], tags: Sequence[str]
) -> None:
    """Raise ProblemError if rows of ``trainer`` have no losses: its loss is its own, without rule.

    A ``rule`` is compared with the Trainer's loss of ``batches``.
    """
    if rule is None:
        if name := own_loss(trainer):
            raise ProblemError(f"{name}: is no known mean over labels; {ADVICE}")
        return
    variables = [x for _, x in trainable(trainer.model)]
    for batch in batches:
        compare(trainer, rule, batch, tags, variables)


def compare(
    trainer: Any, rule: RowLosses, batch: Any, tags: Sequence[str], variables: Sequence[Tensor]
) -> None:
    """Raise ProblemError if the mean by ``rule`` is not the loss of ``trainer`` of ``batch``.

    Values and gradients are compared in training mode, from one random state.
    """
    batch = without(batch, (*tags, *ENTRIES))
    model, items = trainer.model, _labels(trainer, batch)
    state = RandomState.capture([trainer.args.device])

    def evaluated(loss_of: Callable[[], Tensor]) -> tuple[float, Tensor]:
        with in_mode(model, True), replay(state), trainer.compute_loss_context_manager():
            loss = loss_of()
            if not loss.requires_grad:
                raise ProblemError("row_losses: have no gradient; compute them outside of no_grad")
            slopes = torch.autograd.grad(loss, variables, allow_unused=True, materialize_grads=True)
            return float(loss.detach()), torch.cat([x.float().flatten() for x in slopes])

    with metrics_restored(trainer), uncounted(), torch.enable_grad():
        mean, slope = evaluated(lambda: mean_loss(*row_losses(model, {**batch}, rule)))
        loss, expected = evaluated(
            lambda: trainer.compute_loss(model, {**batch}, num_items_in_batch=items)
        )
    kinds = {x.dtype for x in variables} | ({torch.bfloat16} if trainer.args.bf16 else set())
    rounding = max(TOLERANCE, *(4 * torch.finfo(kind).eps for kind in kinds))
    lengths = float(slope.norm()), float(expected.norm())
    error = float((slope - expected).norm())
    if abs(mean - loss) > rounding * max(abs(loss), TOLERANCE) or error > rounding * lengths[1]:
        raise ProblemError(
            f"row_losses: their mean is {mean:.4g} with a gradient of length {lengths[0]:.3g}, and "
            f"the loss of {type(trainer).__name__} {loss:.4g} with {lengths[1]:.3g} (the gradients "
            f"differ by {error:.3g}); return all parts of the loss by row, as in training mode, "
            "and draw the same random numbers in the same order"
        )


def _labels(trainer: Any, batch: Mapping[str, Any]) -> Tensor | None:
    """The number of labels of ``batch``, by which a sum of losses is divided; None without any."""
    if distributed.world_size() > 1 or "labels" not in batch:
        return None  # with several processes the Trainer scales the loss
    try:
        shifted = labels_are_shifted(trainer.model, batch)
    except ProblemError:  # the model may have no loss
        shifted = False
    counts = counts_of_labels([batch], shifted=shifted)
    return counts[0] if counts else None
