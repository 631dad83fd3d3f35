"""A training with a weight for each row, recorded so that it can be repeated and differentiated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
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
#: The values of a run's variables, and the state of each level's optimizer by the level's number.
Point = tuple[tuple[Tensor, ...], Mapping[int, Any]]


class Training(ABC):
    """A training that can be repeated with other row weights.

    Attributes:
        weights: the rows' weights v, ``(n,)``, a leaf that requires a gradient.
        row_weights: the values of ``weights`` in this training.
        steps: the optimizers' steps.
        visits: the number of steps that saw each row, ``(n,)``.
        losses: the sum of each row's losses over its visits, ``(n,)`` in float64.
        settings: metadata of the training; ``seconds`` is its wall time.
    """

    def __init__(self, weights: Tensor, variables: Sequence[Tensor] = ()) -> None:
        self.weights, self.row_weights = weights, weights.detach().clone()
        self.variables, self.steps = tuple(variables), list[Any]()
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
    """The variables and the optimizers' states before each ``every``-th step.

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
    """A level's update, without the variables' values: enough to repeat it from a `Point`.

    Attributes:
        level: the number of the level in the run.
        random_state: the generator states before the loss was evaluated.
        optimizer: the optimizer's options.
        read: for each variable of the level, whether the loss read it and the optimizer moved it.
    """

    level: int
    batch: Any
    random_state: RandomState
    optimizer: Mapping[str, Any]
    read: tuple[bool, ...]


class Run(Training):
    """T recorded steps of levels whose losses read a weight for each training row.

    Each level moves its own variables by its own optimizer, along the gradient of its own loss. In
    a training of two phases, two levels may own the same variables. Repetitions and derivatives use
    the recorded batches, order, random states and optimizer options.

    Args:
        levels: the trained levels, each with an optimizer.
        length: T.
        memory_limit: the memory in GiB that checkpoints may take. If checkpoints of all steps fit,
            a derivative costs two passes per step. Otherwise every 16th step has a checkpoint, in
            temporary files, and a derivative costs three.
        differentiated: whether the steps are differentiated. Otherwise only the first step has a
            checkpoint. A repetition needs a known optimizer step in either case.

    Raises:
        ProblemError: if ``differentiated``, an optimizer's step has no known derivative, or even 16
            steps do not fit.
    """

    def __init__(
        self,
        levels: Sequence[Problem],
        weights: Tensor,
        length: int,
        memory_limit: float = 1.0,
        *,
        differentiated: bool = True,
    ) -> None:
        super().__init__(weights)
        self.differentiated = differentiated
        self.levels: list[Problem] = []
        #: The indices of each level's variables in ``variables``.
        self.indices: list[list[int]] = []
        #: For each step, the values that variables got before it, by their index.
        self.assigned: list[Mapping[int, Tensor]] = []
        self._optimizers: dict[int, DifferentiableStep] = {}
        for level in levels:
            self.add(level)
        every = self._interval(length, memory_limit) if differentiated else length
        self.checkpoints = Checkpoints(every)

    def add(self, level: Problem) -> None:
        """Add a level for later steps."""
        self.variables = tuple({id(v): v for v in (*self.variables, *level.variables)}.values())
        index_of = {id(variable): index for index, variable in enumerate(self.variables)}
        self.indices.append([index_of[id(variable)] for variable in level.variables])
        self.levels.append(level)
        if self.differentiated:
            self.optimizer(len(self.levels) - 1)

    def _interval(self, length: int, limit: float) -> int:
        """The number of steps between two checkpoints, for a run that is differentiated."""
        size = sum(
            (1 + len(self.optimizer(number).moment_names)) * v.numel() * v.element_size() / GIB
            for number, level in enumerate(self.levels)
            for v in level.variables
        )
        every = 1 if length * size <= limit else min(SEGMENT, length)
        if every * size > limit:
            raise ProblemError(
                f"memory_limit: {every} steps of {self.levels[0].name} take {every * size:.2f} "
                f"GiB, more than the limit of {limit:g}; raise the limit, train fewer variables, "
                'or choose an estimator of the end of the run, such as "minres"'
            )
        return every

    def optimizer(self, level: int) -> DifferentiableStep:
        """The optimizer step of a level as a function; ProblemError if it is not known."""
        if level not in self._optimizers:
            snapshot = self.levels[level].optimizer_snapshot(with_state=False)
            self._optimizers[level] = DifferentiableStep(self.levels[level], snapshot)
        return self._optimizers[level]

    def record(
        self, *updates: ParameterUpdate, assigned: Mapping[int, Tensor] | None = None
    ) -> None:
        """Record a step, one update per level that moves, before the optimizers make it.

        ``assigned`` maps a variable's index in the run to the value that it got before the step.
        """
        number = len(self.steps)
        if number % self.checkpoints.every == 0:
            copies = tuple(v.detach().clone() for v in self.variables)
            states = {
                k: level.optimizer_snapshot(with_state=True)["state"]
                for k, level in enumerate(self.levels)
            }
            self.checkpoints.put(number, (copies, states))
        self.steps.append(updates)
        self.assigned.append(assigned or {})

    def update(
        self,
        level: int,
        batch: Any,
        random_state: RandomState,
        gradient: Sequence[Tensor | None],
        parts: Tensor | None = None,
    ) -> ParameterUpdate:
        """The update that a level is about to make; adds its rows to ``visits`` and ``losses``.

        ``gradient`` has one entry per variable of the level, then one for the row weights. The loss
        of the batch is the sum of the rows' losses, each times its entry of ``parts``, ``(n,)``; by
        default the mean over the rows whose weights have a gradient.
        """
        problem, (*of_w, of_v) = self.levels[level], gradient
        if of_v is None:
            raise ProblemError(
                f"{problem.name}: the loss does not read the row weights; multiply each row's loss "
                "by its weight"
            )
        share = of_v.detach().to("cpu", torch.float64)
        parts = (share != 0) / share.count_nonzero() if parts is None else parts.cpu()
        self.visits += parts > 0
        self.losses += torch.where(parts > 0, share / parts, 0.0)
        optimizer = {**problem.optimizer_snapshot(with_state=False), "state": {}}
        read = tuple(entry is not None for entry in of_w)
        return ParameterUpdate(level, batch, random_state, optimizer, read)

    @contextmanager
    def repeated(self, weights: Tensor, *, keep: bool = False) -> Iterator[Checkpoints]:
        """As `Training.repeated`; yields the recorded checkpoints, or with ``keep`` new ones."""
        checkpoints = Checkpoints(self.checkpoints.every) if keep else self.checkpoints
        tensors = (self.weights, *self.variables)
        with preserve_state(tensors, devices_of(*self.levels)), perturbed(tensors):
            assign_((self.weights,), (weights.to(self.weights),))
            point = self.checkpoints.get(0)
            for number in range(len(self.steps)):
                if keep and number % checkpoints.every == 0:
                    checkpoints.put(number, point)
                point = self.advance(number, point)
            assign_(self.variables, point[0])
            if not all(bool(v.isfinite().all()) for v in self.variables):
                name = self.levels[0].name
                raise NonFiniteError(f"{name}: the run diverges with these row weights")
            yield checkpoints

    def begin(self, number: int, point: Point) -> list[Tensor]:
        """The values of ``point``, after the assignments before the step ``number``."""
        return [self.assigned[number].get(index, value) for index, value in enumerate(point[0])]

    def advance(self, number: int, point: Point) -> Point:
        """The point after the step ``number`` from ``point``; the variables remain at ``point``."""
        values, states = self.begin(number, point), dict(point[1])
        after = list(values)
        assign_(self.variables, values)
        for update in self.steps[number]:
            level = self.levels[update.level]
            with replay(update.random_state):
                _, _, gradient = level.differentiate(update.batch, level.variables)
            record = self.step_record(update, values, states.get(update.level, {}), gradient)
            moved, snapshot = self.optimizer(update.level).advance(record)
            for index, value in zip(self.indices[update.level], moved, strict=True):
                after[index] = value.to(self.variables[index].dtype)
            states[update.level] = snapshot["state"]
        return tuple(after), states

    def step_record(
        self,
        update: ParameterUpdate,
        values: Sequence[Tensor],
        state: Any,
        gradient: Sequence[Tensor | None] = (),
    ) -> StepRecord:
        """``update`` from ``values`` and the optimizer's ``state``, along ``gradient`` if given.

        A variable that the loss of the recorded step did not read has no gradient.
        """
        return StepRecord(
            update.batch,
            update.random_state,
            tuple(values[index] for index in self.indices[update.level]),
            # `Sweep` gives no gradient: it only evaluates the loss at these values.
            tuple(g if read else None for g, read in zip(gradient, update.read, strict=False)),
            optimizer={**update.optimizer, "state": state},
        )
