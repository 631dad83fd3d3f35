"""One level of a bilevel program: variables, loss, data and optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hyperopt_peft.core.data import DataStream, entrywise, to_device
from hyperopt_peft.core.prior import GaussianPrior, Prior, as_prior, prior_value
from hyperopt_peft.core.validation import (
    Variables,
    check_level_state,
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
from hyperopt_peft.utils.distributed import is_sharded, seen_parameters
from hyperopt_peft.utils.random_state import RandomState
from hyperopt_peft.utils.reductions import all_finite, to_floats
from hyperopt_peft.utils.reductions import norm as norm_of
from hyperopt_peft.utils.reductions import squares as squares_of

#: The loss of a batch.
TaskLoss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class LossGradient:
    """A loss at one point, and its gradient.

    ``gradient`` has one entry for each requested variable, in the variable's shape and dtype, or
    None if the loss does not read the variable. ``norms`` are the 2-norms of the entries, 0 for
    None. ``metrics`` are the other numbers that the loss returned.
    """

    loss: float
    metrics: dict[str, float]
    gradient: tuple[Tensor | None, ...]
    norms: tuple[float, ...]


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of the lower level, recorded for estimators that use past steps."""

    #: The batch of f.
    batch: Any
    #: The generator states before f was evaluated.
    random_state: RandomState
    #: Copies of w before the step.
    variables: tuple[Tensor, ...] = ()
    #: ∂f/∂w before clipping; None for a variable that f did not read.
    gradient: tuple[Tensor | None, ...] = ()
    #: ∂f/∂u from the same backward pass; None if the estimator does not require it.
    upper_gradient: tuple[Tensor | None, ...] | None = None
    #: `Problem.optimizer_snapshot` before the step.
    optimizer: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Evaluated:
    """Properties of a loss from its first uncompiled evaluation; a level's wrappers share them."""

    #: Whether the loss runs in half precision; None before that evaluation.
    half: bool | None = None
    #: The names of the variables that the prior reads and the loss does not.
    unread: frozenset[str] = frozenset()
    #: Whether the loss writes to its batch, and so gets a copy each time; None before.
    writes: bool | None = None


class Problem:
    """One level: minimise ``loss`` over ``variables``.

    A subclass defines ``loss``. The two levels of a bilevel program are two Problems, usually over
    the same model: a level *owns* its variables, and its loss may *read* any tensor.

    Args:
        variables: the tensors that the level owns, or ``(name, tensor)`` pairs such as
            ``model.named_parameters()``. Each is a leaf that requires a gradient. For a model
            under FSDP2 they are the parameters after ``fully_shard``, and the loss must read
            these through the model.
        data: a re-iterable of batches, such as a shuffled DataLoader; a new epoch begins after its
            last batch. Without data the batch is None.
        optimizer: a ``torch.optim.Optimizer`` over exactly ``variables``.
        scheduler: a learning rate schedule, stepped after each step of the optimizer.
        max_grad_norm: the largest 2-norm of a step's gradient; a longer gradient is scaled down.
        prior: a term that is added to ``loss`` in every evaluation. A number τ stands for
            ½·τ·mean‖u − u0‖² (`GaussianPrior`), with the mean over all entries of all variables
            u, and u0 their current values. A function takes the variables and returns a scalar.
            The metric ``prior`` is the term; training records have the loss without it.
        name: the level's name in errors and logs; by default the name of the class.

    Raises:
        ProblemError: a variable is not a leaf that requires a gradient, or is given twice; the
            optimizer holds other tensors; the prior is neither a number ≥ 0 nor a function; or the
            data are empty or can be iterated only once.

    Example:
        >>> class Fit(Problem):
        ...     def loss(self, batch):
        ...         return (self.variables[0] - batch).square().sum()
        >>> w = torch.zeros(2, requires_grad=True)
        >>> lower = Fit([w], data=[torch.ones(2)], optimizer=torch.optim.SGD([w], lr=0.5))
        >>> evaluation = lower.gradient(lower.next_batch(), lower.variables)
        >>> evaluation.loss, evaluation.gradient
        (2.0, (tensor([-2., -2.]),))
        >>> norm = lower.step(evaluation.gradient)
        >>> w
        tensor([1., 1.], requires_grad=True)
    """

    #: Entries of a batch that are columns of data, each with the name of the data, for errors.
    columns: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        variables: Variables,
        *,
        data: Iterable[Any] | None = None,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        max_grad_norm: float | None = None,
        prior: Prior | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or type(self).__name__
        self.names, self.variables = named_variables(variables, self.name)
        self.prior = as_prior(prior, self.variables, self.name)
        self.batches = None if data is None else DataStream(data, self.name)
        self.optimizer, self.scheduler = optimizer, scheduler
        if max_grad_norm is not None and not (is_number(max_grad_norm) and max_grad_norm > 0):
            raise ProblemError(
                f"{self.name}: max_grad_norm must be a positive number, got {max_grad_norm!r}"
            )
        self.max_grad_norm = max_grad_norm
        self.evaluated = Evaluated()
        if optimizer is not None:
            check_optimizer(optimizer, zip(self.names, self.variables), self.name)
        if scheduler is not None:
            check_scheduler(scheduler, optimizer, self.name)

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """The level's objective on ``batch``; a subclass defines this method.

        Returns a scalar tensor, or a mapping with the scalar under ``"loss"``, such as a Hugging
        Face ``ModelOutput``. Other entries of the mapping are logged if they are single numbers.
        """
        raise ProblemError(f"{self.name}: define loss(self, batch)")

    @property
    def examples(self) -> Problem | None:
        """The `WeightedRows` that this level is or evaluates; None if there is none."""
        return None

    def next_batch(self) -> Any:
        """The next batch of the level's data, on the level's device; None without data."""
        return None if self.batches is None else self.on_device(self.batches.next())

    def peek_batch(self) -> Any:
        """The batch that ``next_batch`` will return; the data's position does not change."""
        return None if self.batches is None else self.on_device(self.batches.peek())

    def on_device(self, batch: object) -> Any:
        """``batch`` on the device of the first variable; see `to_device`."""
        return to_device(batch, self.variables[0].device)

    def evaluate(self, batch: object) -> tuple[Tensor, dict[str, float]]:
        """The loss on this process, with the prior and the autograd graph, and the metrics.

        The loss may be NaN or infinite. ``batch`` is on the level's device (`on_device`).

        Raises:
            ProblemError: the loss or the prior is no scalar tensor with a gradient, or the loss
                needs an entry that ``batch`` does not have.
        """
        losses, metrics = zip(*self.terms(batch), strict=True)
        return sum(losses[1:], losses[0]), distributed.means(metrics)

    def terms(self, batch: Any) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """The loss as a sum of terms, each with its metrics, which `evaluate` averages.

        `gradient` differentiates a term before it evaluates the next one, so that memory holds one
        graph at a time. A level whose batch has several parts overrides this method.
        """
        copies: list[Tensor] = []

        def copied(entry: object) -> Tensor | None:
            if isinstance(entry, Tensor):
                copies.append(entry.clone())
            return copies[-1] if isinstance(entry, Tensor) else None

        if isinstance(batch, Mapping):  # a loss may remove entries, and the batch is used again
            batch = copy(batch)
        if self.evaluated.writes is not False:
            batch = entrywise(batch, copied)
        try:
            result = self.loss(batch)
        except (AttributeError, KeyError, TypeError) as error:
            if hint := missing_input_hint(batch, error, self.columns):
                raise ProblemError(f"{self.name}: {hint}") from error
            raise
        self.evaluated.writes = any(entry._version for entry in copies)
        loss, metrics = loss_and_metrics(result, self.name)
        if self.evaluated.half is None:
            self.evaluated.half = runs_in_half(loss, self.name)
            self.evaluated.unread = frozenset() if self.prior is None else self._unread(loss)
        if self.prior is not None:
            prior = prior_value(self.prior, self.variables, self.name)
            loss = loss + prior.to(loss.device)
            metrics["prior"] = float(prior.detach())
        yield loss, metrics

    def _unread(self, loss: Tensor) -> frozenset[str]:
        """The names of the variables that ``loss`` does not read; none if some are sharded."""
        if is_sharded(*self.variables):  # autograd's graph has the gathered parameters instead
            return frozenset()
        read = set(map(id, graph_leaves(loss)))
        return frozenset(n for n, v in zip(self.names, self.variables) if id(v) not in read)

    def gradient(self, batch: object, variables: Sequence[Tensor]) -> LossGradient:
        """The loss on ``batch`` and the gradient with respect to ``variables``.

        The method calls ``loss.backward``, so that hooks of a wrapped model run, and restores every
        ``.grad`` afterwards. Loss and gradient are averages over the processes.

        Raises:
            ProblemError: see `evaluate`.
            NonFiniteError: the loss or a gradient is NaN or infinite, on any process.
        """
        loss, metrics, gradient = self.differentiate(batch, variables)
        value, norms = self.require_finite(loss, gradient)
        return LossGradient(value, metrics, gradient, norms)

    def differentiate(
        self, batch: object, variables: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, float], tuple[Tensor | None, ...]]:
        """As `gradient`, but the loss stays on its device and may be NaN or infinite."""
        # A distributed model's reducers wait for the gradients of all of its parameters.
        alone = distributed.world_size() == 1 and not is_sharded(*variables)
        losses, metrics = [], []
        before: dict[int, tuple[Tensor, Tensor | None]] = {}
        terms = self.terms(batch)
        watch: AbstractContextManager[list[Tensor]]
        try:
            while True:
                watch = nullcontext([]) if alone else seen_parameters()
                with watch as sharded:
                    term = next(terms, None)
                if term is None:
                    break
                reached = variables if alone else [*variables, *graph_leaves(term[0]), *sharded]
                for tensor in reached:
                    if id(tensor) not in before:
                        before[id(tensor)] = tensor, tensor.grad
                        tensor.grad = None
                term[0].backward(inputs=list(variables) if alone else None)
                losses.append(term[0].detach())
                metrics.append(term[1])
            gradient = tuple(variable.grad for variable in variables)
        finally:
            for tensor, grad in before.values():
                tensor.grad = grad
        loss = distributed.average(torch.stack(losses).sum())
        return loss, distributed.means(metrics), distributed.mean(gradient, variables)

    def require_finite(
        self, loss: Tensor, gradient: Sequence[Tensor | None]
    ) -> tuple[float, tuple[float, ...]]:
        """The value of ``loss`` and the 2-norms of ``gradient``; raises NonFiniteError."""
        slopes = [slope for slope in gradient if slope is not None]
        value, *squares = to_floats([loss, *squares_of(slopes)])
        if not math.isfinite(value):
            raise NonFiniteError(f"{self.name}: the loss is {value}")
        if not math.isfinite(sum(squares)) and not all_finite(slopes):
            raise NonFiniteError(f"{self.name}: the gradient is not finite at loss {value:.6g}")
        norms = (square**0.5 for square in squares)
        return value, tuple(0.0 if slope is None else next(norms) for slope in gradient)

    def step(self, gradient: Sequence[Tensor | None], norm: float | None = None) -> float:
        """One step of the optimizer along ``gradient``, then one step of the scheduler.

        A variable whose gradient is None does not move. Returns the 2-norm of ``gradient`` before
        clipping; a caller that knows it passes it as ``norm``.

        Raises:
            ProblemError: the level has no optimizer.
            NonFiniteError: the norm is NaN or infinite; no variable has moved.
        """
        if self.optimizer is None:
            raise ProblemError(
                f"{self.name}: the level has no optimizer; give one to train the level"
            )
        if norm is None:
            norm = norm_of(slope for slope in gradient if slope is not None)
        if not math.isfinite(norm):
            raise NonFiniteError(f"{self.name}: the gradient's norm is {norm}")
        factor = self.clipping(norm)
        for variable, slope in zip(self.variables, gradient, strict=True):
            if slope is not None and factor != 1:
                slope = slope * factor
            variable.grad = None if slope is None else slope.to(variable.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        return norm

    def clipping(self, norm: float) -> float:
        """The factor min(1, max_grad_norm/(norm + 1e-6)), as in torch's ``clip_grad_norm_``."""
        limit = self.max_grad_norm
        return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))

    @property
    def levels(self) -> tuple[Problem, ...]:
        """This level, then its lower levels, from top to bottom."""
        return (self,)

    @property
    def differences(self) -> int:
        """How deeply finite differences nest in ``gradient``: 2 for a difference of differences."""
        return 0

    def anchored(self) -> AbstractContextManager[None]:
        """Within the body, lower levels follow perturbations of the variables of higher levels."""
        return nullcontext()

    def gradient_above(
        self, upper: Problem, batch: object, variables: Sequence[Tensor]
    ) -> LossGradient:
        """The loss of ``upper``, the next higher level, on ``batch``, and its gradient."""
        return upper.gradient(batch, variables)

    @property
    def nested(self) -> bool:
        """Whether the level has lower levels, so that ``loss`` cannot be differentiated twice."""
        return len(self.levels) > 1

    def require_single(self, reason: str) -> None:
        """Raise ProblemError with ``reason`` if the level has lower levels."""
        if self.nested:
            raise ProblemError(f"{self.name}: the level is Nested and has lower levels: {reason}")

    def optimizer_snapshot(self, *, with_state: bool) -> dict[str, Any]:
        """Copies of the optimizer's options and, optionally, its state.

        ``"kind"`` is the optimizer's class or None; ``"groups"`` has the options of each parameter
        group that is not empty, with the positions of its ``"variables"``; ``"state"`` has the
        state of each variable (such as its momentum), by the variable's position.
        """
        optimizer = self.optimizer
        if optimizer is None:
            return {"kind": None, "groups": [], "state": {}}
        position = {id(variable): index for index, variable in enumerate(self.variables)}
        groups = [
            {key: deepcopy(value) for key, value in group.items() if key != "params"}
            | {"variables": [position[id(x)] for x in group["params"] if id(x) in position]}
            for group in optimizer.param_groups
        ]
        states = optimizer.state.items() if with_state else ()
        return {
            "kind": type(getattr(optimizer, "optimizer", optimizer)),  # accelerate wraps it
            "groups": [group for group in groups if group["variables"]],
            "state": {position[id(x)]: deepcopy(state) for x, state in states if id(x) in position},
        }

    def state_dict(self) -> dict[str, Any]:
        """Copies of the variables, and the states of optimizer, scheduler, data and prior."""
        variables = zip(self.names, self.variables, strict=True)
        return {
            "variables": {name: variable.detach().clone() for name, variable in variables},
            **{key: deepcopy(x.state_dict()) for key, x in self._stateful().items()},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ProblemError if ``state`` does not fit this level."""
        check_level_state(self, state, self._stateful())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a result of `state_dict`; raises ProblemError if ``state`` does not fit."""
        self.check_state(state)
        with torch.no_grad():
            for name, variable in zip(self.names, self.variables, strict=True):
                variable.copy_(state["variables"][name])
        for key, stateful in self._stateful().items():
            stateful.load_state_dict(deepcopy(state[key]))

    def _stateful(self) -> dict[str, Any]:
        """The objects with a state, by their key in the level's state."""
        objects = {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "batches": self.batches,
            "prior": self.prior if isinstance(self.prior, GaussianPrior) else None,
        }
        return {key: x for key, x in objects.items() if x is not None}


def variables_of(*levels: Problem) -> tuple[Tensor, ...]:
    """The variables of ``levels`` and of all their lower levels."""
    return tuple(v for level in levels for each in level.levels for v in each.variables)


def devices_of(*levels: Problem) -> list[torch.device]:
    """The devices of the variables of ``levels``, each once."""
    return list(dict.fromkeys(variable.device for variable in variables_of(*levels)))
