"""One optimizer over both levels of a `BilevelTrainer`, with groups of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError

if TYPE_CHECKING:
    from hyperopt_peft.trainer.trainer import BilevelTrainer


def new_optimizer(trainer: BilevelTrainer) -> Any:
    """The optimizer ``args.optim`` over both levels, each with its rate and weight decay.

    Raises:
        ProblemError: the optimizer takes no groups of parameters, or refuses the options.
    """
    cls, options = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(
        trainer.args, trainer.model
    )
    name = getattr(cls, "__name__", cls)
    takes_groups = isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    if not takes_groups or options.keys() & {"params", "model", "optimizer_dict"}:
        raise ProblemError(
            f"optim: {name} takes no groups of parameters; use one that does, such as adamw_torch"
        )
    try:
        return cls(_groups(trainer), **options)
    except (TypeError, ValueError) as error:
        raise ProblemError(
            f"optim: {name} does not take {options} ({error}); change the options"
        ) from error


def _groups(trainer: BilevelTrainer) -> list[dict[str, Any]]:
    """The lower variables with and without the Trainer's weight decay, and the upper variables."""
    args, upper = trainer.args, trainer.upper
    named = dict(trainer.model.named_parameters(remove_duplicate=False))
    plain = {id(p) for p in named.values()}
    plain -= {id(named[name]) for name in trainer.get_decay_parameter_names(trainer.model)}
    groups: list[dict[str, Any]] = [
        {
            "params": [v for v in trainer.lower.variables if id(v) not in plain],
            "weight_decay": args.weight_decay,
        },
        {"params": [v for v in trainer.lower.variables if id(v) in plain], "weight_decay": 0.0},
    ]
    if upper is not None:
        own = {"lr": args.upper_learning_rate, "weight_decay": args.upper_weight_decay}
        groups.append({"params": list(upper.variables), **own})
    return [group for group in groups if group["params"]]


def held(optimizer: Any) -> list[Tensor]:
    """The tensors of all groups of ``optimizer``, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def learning_rate(optimizer: Any, level: Problem) -> float | None:
    """The rate of the first group of ``optimizer`` with variables of ``level``."""
    own = {id(variable) for variable in level.variables}
    groups = [g for g in optimizer.param_groups if own & {id(p) for p in g["params"]}]
    rate = groups[0]["lr"]
    return None if rate is None else float(rate)  # Adafactor may have none


def check_optimizer(optimizer: Any, scheduler: Any, levels: Sequence[Problem]) -> None:
    """Raise ProblemError unless a user's optimizer has the levels' variables, in own groups."""
    if optimizer is None:
        if scheduler is not None:
            raise ProblemError("optimizers: a scheduler without an optimizer; give both or neither")
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ProblemError(
            f"optimizers: the first must be a torch.optim.Optimizer, got {optimizer!r}"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ProblemError(
            "optimizers: the scheduler drives another optimizer; make the scheduler for this one"
        )
    names = {id(v): n for level in levels for n, v in zip(level.names, level.variables)}
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    foreign = [tuple(p.shape) for p in held(optimizer) if id(p) not in names]
    missing = [name for key, name in names.items() if not any(key in group for group in groups)]
    if missing or foreign:
        raise ProblemError(
            "optimizers: the optimizer must hold exactly the variables of both levels; missing "
            f"are {missing or 'none'}, foreign are tensors of shape {foreign or 'none'}"
        )
    owned = [{id(v) for v in level.variables} for level in levels]
    if any(sum(bool(group & own) for own in owned) > 1 for group in groups):
        raise ProblemError(
            "optimizers: a group holds variables of both levels, which would share a learning "
            "rate; give each level groups of its own"
        )
