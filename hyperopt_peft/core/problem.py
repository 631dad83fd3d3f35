"""A `Problem` is one level of a bilevel program: its variables, loss, data and optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hyperopt_peft.core.data import DataStream
from hyperopt_peft.core.optimizer import optimizer_state_copy, present_options, write_options
from hyperopt_peft.core.validation import (
    Variables,
    check_optimizer,
    check_scheduler,
    is_number,
    loss_and_metrics,
    missing_input_hint,
    named_variables,
    runs_in_half,
)
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.autograd import graph_leaves
from hyperopt_peft.utils.distributed import is_sharded, seen_parameters, total
from hyperopt_peft.utils.random_state import RandomState
from hyperopt_peft.utils.reductions import all_finite, sums, to_floats
from hyperopt_peft.utils.reductions import norm as norm_of


@dataclass(frozen=True)
class Evaluation:
    """A loss at one point, and its gradient.

    ``gradient`` has one entry for each tensor that was asked for, in that tensor's shape and
    dtype; None where the loss does not read the tensor.
    """

    loss: float
    metrics: dict[str, float]
    gradient: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class StepRecord:
    """One step of a level, as an estimator may look back on it.

    ``variables`` are copies from before the step, ``gradient`` is ∂f/∂w before clipping
    (None where the batch's loss did not read the variable, which the step then left alone),
    ``upper_gradient`` is ∂f/∂u from the same backward pass (None where it was not asked
    for), ``optimizer`` what `Problem.optimizer_snapshot` returned before it.
    """

    batch: Any
    random_state: RandomState
    variables: tuple[Tensor, ...] = ()
    gradient: tuple[Tensor | None, ...] = ()
    upper_gradient: tuple[Tensor | None, ...] | None = None
    optimizer: Mapping[str, Any] | None = None


class Problem:
    """One level: it owns ``variables`` and minimises ``loss`` over them.

    Subclass it and define ``loss``. The two levels of a program are two Problems, usually
    over the same modules: a level *owns* some tensors and may *read* any.

    Args:
        variables: what the level owns: tensors or ``(name, tensor)`` pairs, leaves that
            require a gradient, for example ``model.named_parameters()``. Of a model that FSDP2
            shards, the parameters after ``fully_shard``; the loss must then read them through
            the model.
        data: any re-iterable of batches, a shuffled DataLoader for example; it is cycled.
            Without data, ``loss`` is given None.
        optimizer: used as given, never rebuilt; it must hold exactly ``variables``.
        scheduler: stepped after each step of the optimizer.
        max_grad_norm: the gradient is scaled down to this 2-norm before each step.
        name: what error messages and logs call the level; the class's name by default.

    Raises:
        ProblemError: no variables, one that is not a leaf, needs no gradient or is complex, one
            that is given twice, an optimizer that does not hold exactly the variables, or data
            that are empty or cannot be read twice.
    """

    def __init__(
        self,
        variables: Variables,
        *,
        data: Iterable[Any] | None = None,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        max_grad_norm: float | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or type(self).__name__
        self.names, self.variables = named_variables(variables, self.name)
        self.batches = None if data is None else DataStream(data, self.name)
        self.optimizer, self.scheduler = optimizer, scheduler
        if max_grad_norm is not None and not (is_number(max_grad_norm) and max_grad_norm > 0):
            raise ProblemError(
                f"{self.name}: max_grad_norm must be a positive number, got {max_grad_norm!r}"
            )
        self.max_grad_norm = max_grad_norm
        #: Whether the loss runs in half precision; None until it is first evaluated.
        self.half: bool | None = None
        if optimizer is not None:
            check_optimizer(optimizer, self.names, self.variables, self.name)
        if scheduler is not None:
            check_scheduler(scheduler, optimizer, self.name)

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """The level's objective on ``batch``.

        Returns a scalar tensor, or a mapping with the scalar under ``"loss"``, a Hugging Face
        ``ModelOutput`` for example. Its other entries that are single numbers are logged.
        """
        raise ProblemError(f"{self.name}: define loss(self, batch)")

    def optimizer_options(self) -> Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]:
        """Options of the optimizer that are functions of upper variables; none by default.

        ``{"lr": self.log_lr.exp()}`` for example: ``lr`` and ``weight_decay``, single numbers, one
        mapping for all groups of parameters or one for each. They are written into the groups
        before each step, in place of what these were made with. ``"unrolled"`` and ``"forward"``
        take hypergradients with respect to them; other estimators refuse. A scheduler sets the
        learning rate itself, so beside one only ``weight_decay`` is allowed.
        """
        return {}

    @property
    def devices(self) -> list[torch.device]:
        """The devices that hold the variables."""
        return list(dict.fromkeys(variable.device for variable in self.variables))

    def next_batch(self) -> Any:
        """The next batch of the level's data, on its device; None where it has none."""
        return None if self.batches is None else self.on_device(self.batches.next())

    def peek_batch(self) -> Any:
        """The batch that ``next_batch`` will return; it stays the next one."""
        return None if self.batches is None else self.on_device(self.batches.peek())

    def on_device(self, batch: Any) -> Any:
        """``batch`` on the device of the first variable.

        Tensors, mappings, tuples, lists and ``BatchEncoding`` are moved; a loss is evaluated many
        times on one batch, so drivers call this once for each.
        """
        return send_to_device(batch, self.variables[0].device)

    def evaluate(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """The loss with its graph, on this process, and the metrics; its value is not looked at.

        ``batch`` is where the loss expects it: see `on_device`.

        Raises:
            ProblemError: the loss is not a scalar tensor, depends on nothing that requires a
                gradient, or stumbles over a batch that is None or lacks a column.
        """
        if isinstance(batch, Mapping):  # a loss may take entries out, and is evaluated again
            batch = copy(batch)
        try:
            result = self.loss(batch)
        except (AttributeError, KeyError, TypeError) as error:
            if lack := missing_input_hint(batch, error):
                raise ProblemError(f"{self.name}: {lack}") from error
            raise
        loss, metrics = loss_and_metrics(result, self.name)
        if self.half is None:
            self.half = runs_in_half(loss, self.name)
        return loss, metrics

    def gradient(self, batch: Any, variables: Sequence[Tensor]) -> Evaluation:
        """The loss on ``batch`` and its gradient with respect to ``variables``.

        Taken by ``loss.backward`` and read from ``.grad``, so that the hooks of a wrapped
        model fire; every ``.grad`` is afterwards as it was. In a distributed run, loss and
        gradient are averages over the processes, each with its own part of the batch.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite, on any process.
        """
        loss, metrics, gradient = self.backward(batch, variables)
        gradient = distributed.mean(gradient, variables)
        value = self.require_finite(distributed.average(loss), gradient)
        return Evaluation(value, metrics, gradient)

    def backward(
        self, batch: Any, variables: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, float], tuple[Tensor | None, ...]]:
        """Loss, metrics and gradient of this process alone, unchecked; no ``.grad`` changes.

        Raises:
            ProblemError: see `evaluate`; one of ``variables`` was frozen after it was given, or
                has a sparse gradient.
        """
        if frozen := [tuple(v.shape) for v in variables if not v.requires_grad]:
            raise ProblemError(
                f"{self.name}: variables of shape {frozen} no longer require a gradient; freeze "
                "nothing that a level owns, or make the levels anew"
            )
        # The reducers of a distributed model wait for all of its parameters.
        alone = distributed.world_size() == 1 and not is_sharded(*variables)
        watch: AbstractContextManager[list[Tensor]]
        watch = nullcontext([]) if alone else seen_parameters()
        with watch as sharded:
            loss, metrics = self.evaluate(batch)
        reached = list(variables) if alone else [*graph_leaves(loss), *sharded]
        touched = list({id(x): x for x in (*variables, *reached)}.values())
        held = [tensor.grad for tensor in touched]
        for tensor in touched:
            tensor.grad = None
        try:
            loss.backward(inputs=reached if alone else None)
            gradient = tuple(variable.grad for variable in variables)
        finally:
            for tensor, grad in zip(touched, held, strict=True):
                tensor.grad = grad
        if sparse := [
            tuple(part.shape) for part in gradient if part is not None and part.is_sparse
        ]:
            raise ProblemError(
                f"{self.name}: the gradients of variables of shape {sparse} are sparse; make their "
                "embeddings with sparse=False"
            )
        return loss.detach(), metrics, gradient

    def require_finite(self, loss: Tensor, gradient: Sequence[Tensor | None]) -> float:
        """The value of ``loss``.

        Raises:
            NonFiniteError: it is NaN or infinite, or an entry of ``gradient`` is.
        """
        parts = [part for part in gradient if part is not None]
        value, *summed = to_floats([loss, *sums(parts)])
        if not math.isfinite(value):
            raise NonFiniteError(f"{self.name}: the loss is {value}")
        if not math.isfinite(total(summed, parts)) and not all_finite(parts):
            raise NonFiniteError(f"{self.name}: the gradient is not finite at loss {value:.6g}")
        return value

    def step(self, gradient: Sequence[Tensor | None]) -> float:
        """One step of the optimizer, and of the scheduler, along ``gradient``.

        A variable whose part is None is left alone. Returns the 2-norm before clipping.

        Raises:
            NonFiniteError: the norm is NaN or infinite; nothing has moved.
        """
        if self.optimizer is None:
            raise ProblemError(f"{self.name}: give the level an optimizer to train it")
        norm = norm_of(part for part in gradient if part is not None)
        if not math.isfinite(norm):
            raise NonFiniteError(f"{self.name}: the gradient's norm is {norm}")
        write_options(self)
        factor = self.clipping(norm)
        for variable, part in zip(self.variables, gradient, strict=True):
            if part is not None and factor != 1:
                part = part * factor
            variable.grad = None if part is None else part.to(variable.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        return norm

    def clipping(self, norm: float) -> float:
        """What a step multiplies a gradient of 2-norm ``norm`` by, as `clip_grad_norm_` does."""
        limit = self.max_grad_norm
        return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))

    def optimizer_snapshot(self, *, with_state: bool) -> dict[str, Any]:
        """The optimizer's kind, options and, if asked for, state; see `optimizer_state_copy`."""
        if self.optimizer is None:
            return {"kind": None, "groups": [], "state": {}}
        options = present_options(self)
        return optimizer_state_copy(
            self.optimizer, self.variables, with_state=with_state, options=options
        )

    def state_dict(self) -> dict[str, Any]:
        """Copies of the variables, and the states of optimizer, scheduler and data."""
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler, "batches": self.batches}
        return {
            "variables": {
                name: variable.detach().clone()
                for name, variable in zip(self.names, self.variables, strict=True)
            },
            **{key: deepcopy(part.state_dict()) for key, part in parts.items() if part is not None},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ProblemError where ``state`` is not that of a level like this one."""
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler, "batches": self.batches}
        expected = {"variables"} | {k for k, part in parts.items() if part is not None}
        if not isinstance(state, Mapping) or set(state) != expected:
            found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ProblemError(
                f"{self.name}: the state must have {sorted(expected)}, it has {found}"
            )
        for key, part in (("optimizer", self.optimizer), ("scheduler", self.scheduler)):
            if part is not None and _form(state[key]) != _form(part.state_dict()):
                raise ProblemError(
                    f"{self.name}: the state is that of another {key} than the level's "
                    f"{type(part).__name__}, or has other parameter groups"
                )
        if self.batches is not None:
            self.batches.check_state(state["batches"])
        shapes = {name: tuple(v.shape) for name, v in zip(self.names, self.variables, strict=True)}
        for name in shapes.keys() ^ state["variables"].keys():
            raise ProblemError(f"{self.name}: variable {name!r} is only in one of level and state")
        for name, shape in shapes.items():
            if tuple(state["variables"][name].shape) != shape:
                raise ProblemError(
                    f"{self.name}: variable {name!r} has shape {shape}, "
                    f"the state {tuple(state['variables'][name].shape)}"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Return to ``state``; nothing is changed where it does not fit (ProblemError)."""
        self.check_state(state)
        with torch.no_grad():
            for name, variable in zip(self.names, self.variables, strict=True):
                variable.copy_(state["variables"][name])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(deepcopy(state["optimizer"]))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(deepcopy(state["scheduler"]))
        if self.batches is not None:
            self.batches.load_state_dict(state["batches"])


def require_read(
    level: Problem, gradient: Sequence[Tensor | None], besides: Set[str] | None = None
) -> None:
    """Raise ProblemError for a variable without gradient, of ``besides`` only if given."""
    for name, part in zip(level.names, gradient, strict=True):
        if part is None and (besides is None or name in besides):
            raise ProblemError(
                f"{level.name}: no gradient reaches the variable {name!r} at the first step; use "
                "it in the loss, or do not give it to the level"
            )


def devices_of(*levels: Problem) -> list[torch.device]:
    """The devices that hold the variables of ``levels``, each once."""
    return list(dict.fromkeys(device for level in levels for device in level.devices))


def _form(state: Mapping[str, Any]) -> Any:
    """What two states of one kind of optimizer or scheduler have in common."""
    groups = state.get("param_groups", [])
    return set(state), [(len(group["params"]), set(group) - {"params"}) for group in groups]
