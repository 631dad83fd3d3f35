"""A training with a weight for each row, recorded so that it can be repeated and differentiated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.core.problem import Problem, StepRecord, devices_of
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.hypergradients.unrolled.optimizer_step import DifferentiableStep
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.restore import assign_, perturbed, preserve_state

#: The steps between two checkpoints, if checkpoints of all steps need too much memory.
SEGMENT = 16
GIB = 2**30
#: The values of a run's variables, and the optimizer's state.
Point = tuple[tuple[Tensor, ...], Mapping[int, Any]]


class Training(ABC):
    """A training that can be repeated with other row weights.

    Attributes:
        weights: the rows' weights v, ``(n,)``, a leaf that requires a gradient.
        row_weights: the values of ``weights`` in this training.
        steps: the optimizer's steps.
        visits: the number of steps that saw each row, ``(n,)``.
        losses: the sum of each row's losses over its visits, ``(n,)`` in float64.
        settings: metadata of the training; ``seconds`` is its wall time.
    """

    def __init__(self, weights: Tensor, variables: Sequence[Tensor] = ()) -> None:
        self.weights = weights
        self.row_weights = weights.detach().clone()
        self.variables = tuple(variables)
        self.steps = list[Any]()
        self.visits = torch.zeros(len(weights), dtype=torch.int64)
        self.losses = torch.zeros(len(weights), dtype=torch.float64)
        self.settings = dict[str, Any]()

    @abstractmethod
    def repeated(self, weights: Tensor) -> AbstractContextManager[Any]:
        """Train again with ``weights`` for v; the body sees the resulting variables and v.

        Raises NonFiniteError if the training diverges.
        """

    def without(self, rows: Sequence[int] | Tensor) -> AbstractContextManager[Any]:
        """As `repeated`, with the weight 0 for ``rows``."""
        weights = self.row_weights.clone()
        weights[rows] = 0.0
        return self.repeated(weights)


class Checkpoints:
    """The variables and the optimizer's state before each ``every``-th step.

    Checkpoints are in memory if ``every`` is 1, otherwise in files of a temporary folder.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._points: dict[int, Any] = {}
        self._folder = None if every == 1 else TemporaryDirectory(prefix="attribution-")

    def put(self, step: int, point: Point) -> None:
        """Store ``point`` as the checkpoint before ``step``."""
        self._points[step] = point
        if self._folder is not None:
            self._points[step] = Path(self._folder.name) / f"{step}.pt"
            torch.save(point, self._points[step])

    def get(self, step: int) -> Point:
        """The checkpoint before ``step``."""
        at = self._points[step]
        point: Point = torch.load(at, weights_only=True) if isinstance(at, Path) else at
        return point


@dataclass(frozen=True)
class ParameterUpdate:
    """A step without the variables' values: enough to repeat it from a `Point`.

    Attributes:
        random_state: the generator states before the loss was evaluated.
        optimizer: the optimizer's options.
        read: for each variable, whether the loss read it and the optimizer moved it.
    """

    batch: Any
    random_state: RandomState
    optimizer: Mapping[str, Any]
    read: tuple[bool, ...]


class Run(Training):
    """T recorded steps of ``level``, whose loss reads a weight for each training row.

    Repetitions and derivatives use the recorded batches, order, random states and optimizer
    options.

    Args:
        level: the trained level, with an optimizer.
        length: T.
        memory_limit: the memory in GiB that checkpoints may take. If checkpoints of all steps fit,
            a derivative costs two passes per step. Otherwise every 16th step has a checkpoint, in
            temporary files, and a derivative costs three.
        differentiated: whether the steps are differentiated. Otherwise only the first step has a
            checkpoint. A repetition needs a known optimizer step in either case.

    Raises:
        ProblemError: if ``differentiated``, the optimizer's step has no known derivative, or even
            16 steps do not fit.
    """

    def __init__(
        self,
        level: Problem,
        weights: Tensor,
        length: int,
        memory_limit: float = 1.0,
        *,
        differentiated: bool = True,
    ) -> None:
        super().__init__(weights, level.variables)
        self.level = level
        self.checkpoints = Checkpoints(
            self._interval(length, memory_limit) if differentiated else length
        )

    def _interval(self, length: int, limit: float) -> int:
        """The number of steps between two checkpoints, for a run that is differentiated."""
        copies = 1 + len(self.optimizer.moment_names)
        size = sum(copies * v.numel() * v.element_size() / GIB for v in self.variables)
        every = 1 if length * size <= limit else min(SEGMENT, length)
        if every * size > limit:
            raise ProblemError(
                f"memory_limit: {every} steps of {self.level.name} take {every * size:.2f} GiB, "
                f"more than the limit of {limit:g}; raise the limit, train fewer variables, or "
                'choose an estimator of the end of the run, such as "minres"'
            )
        return every

    @cached_property
    def optimizer(self) -> DifferentiableStep:
        """The optimizer step as a function; ProblemError if it is not known."""
        return DifferentiableStep(self.level, self.level.optimizer_snapshot(with_state=False))

    def record(
        self,
        batch: Any,
        random_state: RandomState,
        gradient: Sequence[Tensor | None],
        parts: Tensor | None = None,
    ) -> None:
        """Record the step that the optimizer is about to make.

        ``gradient`` has one entry per variable, then one for the row weights. The loss of the batch
        is the sum of the rows' losses, each times its entry of ``parts``, ``(n,)``; by default the
        mean over the rows whose weights have a gradient.
        """
        level, (*of_w, of_v) = self.level, gradient
        if of_v is None:
            raise ProblemError(
                f"{level.name}: the loss does not read the row weights; multiply each row's loss "
                "by its weight"
            )
        share = of_v.detach().to("cpu", torch.float64)
        parts = (share != 0) / share.count_nonzero() if parts is None else parts.cpu()
        self.visits += parts > 0
        self.losses += torch.where(parts > 0, share / parts, 0.0)
        if len(self.steps) % self.checkpoints.every == 0:
            copies = tuple(v.detach().clone() for v in self.variables)
            state = level.optimizer_snapshot(with_state=True)["state"]
            self.checkpoints.put(len(self.steps), (copies, state))
        optimizer = {**level.optimizer_snapshot(with_state=False), "state": {}}
        read = tuple(entry is not None for entry in of_w)
        self.steps.append(ParameterUpdate(batch, random_state, optimizer, read))

    @contextmanager
    def repeated(self, weights: Tensor, *, keep: bool = False) -> Iterator[Checkpoints]:
        """As `Training.repeated`; yields the recorded checkpoints, or with ``keep`` new ones."""
        checkpoints = Checkpoints(self.checkpoints.every) if keep else self.checkpoints
        tensors = (self.weights, *self.variables)
        with preserve_state(tensors, devices_of(self.level)), perturbed(tensors):
            assign_((self.weights,), (weights.to(self.weights),))
            point = self.checkpoints.get(0)
            for number in range(len(self.steps)):
                if keep and number % checkpoints.every == 0:
                    checkpoints.put(number, point)
                point = self.advance(number, point)
            assign_(self.variables, point[0])
            if not all(bool(v.isfinite().all()) for v in self.variables):
                name = self.level.name
                raise NonFiniteError(f"{name}: the run diverges with these row weights")
            yield checkpoints

    def advance(self, number: int, point: Point) -> Point:
        """The point after the step ``number`` from ``point``; the variables remain at ``point``."""
        update = self.steps[number]
        assign_(self.variables, point[0])
        with replay(update.random_state):
            _, _, gradient = self.level.differentiate(update.batch, self.variables)
        after, snapshot = self.optimizer.advance(self.step_record(number, point, gradient))
        values = (x.to(v.dtype) for x, v in zip(after, self.variables, strict=True))
        return tuple(values), snapshot["state"]

    def step_record(
        self, number: int, point: Point, gradient: Sequence[Tensor | None] = ()
    ) -> StepRecord:
        """The step ``number`` from ``point``, along ``gradient`` if given.

        A variable that the loss of the recorded step did not read has no gradient.
        """
        update, (values, state) = self.steps[number], point
        return StepRecord(
            update.batch,
            update.random_state,
            values,
            # `Sweep` gives no gradient: it only evaluates the loss at these values.
            tuple(g if read else None for g, read in zip(gradient, update.read, strict=False)),
            optimizer={**update.optimizer, "state": state},
        )
