"""One optimizer over both levels of a `BilevelTrainer`, each in parameter groups of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.core.validation import check_optimizer
from hyperopt_peft.errors import ProblemError


def _kind(trainer: Any) -> Any:
    """The class of the optimizer of ``trainer``, and its options."""
    kind = trainer.optimizer_cls_and_kwargs
    return kind or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)


def new_optimizer(trainer: Any) -> Any:
    """An optimizer over both levels of ``trainer``."""
    kind, options = _kind(trainer)
    name = getattr(kind, "__name__", kind)
    takes_groups = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    # Some classes take the model, and step in hooks of the backward pass.
    if not takes_groups or options.keys() & {"params", "model", "optimizer_dict"}:
        raise ProblemError(
            f"optim: {name} takes no groups of parameters; use one that does, such as adamw_torch"
        )
    groups = _groups(trainer)
    try:
        return kind(groups, **options)
    except (TypeError, ValueError) as error:
        raise ProblemError(
            f"optim: {name} does not take {options} ({error}); change the options"
        ) from error


def _groups(trainer: Any) -> list[dict[str, Any]]:
    """The lower variables with weight decay, those without, such as biases, the upper ones."""
    args, lower, upper = trainer.args, trainer.lower, trainer.upper
    named = dict(trainer.model.named_parameters(remove_duplicate=False))
    names = trainer.get_decay_parameter_names(trainer.model)
    without_decay = {*map(id, named.values())} - {id(named[name]) for name in names}
    plain = [variable for variable in lower.variables if id(variable) in without_decay]
    decayed = [variable for variable in lower.variables if id(variable) not in without_decay]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if upper is not None:
        options = {"lr": args.upper_learning_rate, "weight_decay": args.upper_weight_decay}
        groups.append({"params": list(upper.variables), **options})
    return [group for group in groups if group["params"]]


def create(trainer: Any, parent: Callable[[], Any]) -> None:
    """Let ``parent``, the parent's ``create_optimizer``, construct what is `new_optimizer`."""
    kind, options = before = _kind(trainer)
    made = new_optimizer(trainer)
    returning = type(str(kind), (Optimizer,), {"__new__": lambda *_, **__: made})
    trainer.optimizer_cls_and_kwargs = returning, {**options}
    parent()
    trainer.optimizer_cls_and_kwargs = before
    check_optimizers("create_optimizer", trainer.optimizer, None, trainer.levels)


def take_replicated(trainer: Any) -> list[dict[str, Any]]:
    """Under FSDP2, remove the groups of tensors outside the model, and return them.

    FSDP2 needs a shard for each tensor of the optimizer.
    """
    if not trainer.is_fsdp_enabled:
        return []
    of_model, groups = {*map(id, trainer.model.parameters())}, trainer.optimizer.param_groups
    outside = [group for group in groups if id(group["params"][0]) not in of_model]
    groups[:] = [group for group in groups if id(group["params"][0]) in of_model]
    return outside


def learning_rate(optimizer: Any, level: Problem) -> float | None:
    """The learning rate of the first group of ``optimizer`` that has variables of ``level``."""
    of_level = {id(variable) for variable in level.variables}
    groups = [g for g in optimizer.param_groups if of_level & {id(p) for p in g["params"]}]
    rate = groups[0]["lr"]
    return None if rate is None else float(rate)  # Adafactor may have none


def check_optimizers(source: str, optimizer: Any, scheduler: Any, levels: list[Problem]) -> None:
    """Raise ProblemError unless the ``optimizer`` of ``source`` holds each level's groups."""
    if optimizer is None:
        if scheduler is not None:
            raise ProblemError(f"{source}: a scheduler without an optimizer; give both or neither")
        return
    named = [(n, v) for level in levels for n, v in zip(level.names, level.variables, strict=True)]
    check_optimizer(optimizer, named, source)
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ProblemError(
            f"{source}: the scheduler drives another optimizer; make the scheduler for this one"
        )
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    of_levels = [{id(v) for v in level.variables} for level in levels]
    if any(sum(bool(group & of_level) for of_level in of_levels) > 1 for group in groups):
        raise ProblemError(
            f"{source}: a group holds variables of both levels, so they would share a learning "
            "rate; give each level groups of its own"
        )
