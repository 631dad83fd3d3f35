"""A training run that can be differentiated, and repeated with other row weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.attribution.checkpoints import Checkpoints, Point
from hyperopt_peft.attribution.training import Training
from hyperopt_peft.core.problem import Problem, StepRecord, devices_of
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.hypergradients.unrolled.optimizer_step import DifferentiableStep
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.restore import assign_, perturbed, preserve_state

#: Steps between two checkpoints where not every step is one.
SEGMENT = 16
GIB = 2**30


@dataclass(frozen=True)
class ParameterUpdate:
    """What repeats a level's update: batch, random numbers and optimizer options, without tensors.

    ``read`` says which of the level's variables the loss read, and so the optimizer moved.
    """

    level: int
    batch: Any
    random_state: RandomState
    optimizer: Mapping[str, Any]
    read: tuple[bool, ...]


@dataclass(frozen=True)
class RecordedStep:
    """The updates of one step, all from the same point.

    ``assigned`` has values that variables, by their index in the run, get before the step.
    """

    updates: tuple[ParameterUpdate, ...]
    assigned: Mapping[int, Tensor] = field(default_factory=dict)

    def begin(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``values`` with those that are assigned."""
        return tuple(self.assigned.get(index, value) for index, value in enumerate(values))


class Run(Training):
    """T steps of levels whose losses read a weight for each training row.

    Each level moves its own variables by its own optimizer, along the gradient of its own loss.
    Two levels may own the same variables, one after the other, as in a training of two phases.
    Batches, order, random numbers and the optimizers' options are those of the run that was
    recorded, in every repetition and in the derivative.

    Args:
        levels: the levels that are trained, each with an optimizer.
        weights: the rows' weights v, ``(n,)``, a leaf that requires a gradient.
        length: T.
        memory_limit: the memory in GiB that checkpoints may take. Where those of all steps fit, a
            derivative costs two passes a step; otherwise every 16th step has a checkpoint, in
            temporary files, and a derivative costs three.
        differentiated: whether the steps are differentiated. Otherwise only the begin has a
            checkpoint, nothing is required of optimizer and memory, and a run whose optimizer has
            no known derivative cannot be repeated.

    Raises:
        ProblemError: of a run that is differentiated, an optimizer's step has no known derivative,
            or even 16 steps do not fit.
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
        self.differentiated, self.length = differentiated, length
        self.levels: list[Problem] = []
        #: Of each level, the indices of its variables in ``variables``.
        self.indices: list[list[int]] = []
        self._optimizers: list[DifferentiableStep | ProblemError] = []
        for level in levels:
            self.add(level)
        self.checkpoints = Checkpoints(self._interval(memory_limit) if differentiated else length)

    def add(self, level: Problem) -> None:
        """Add a level, which moves in later steps.

        Raises:
            ProblemError: as `Run`.
        """
        try:
            step = DifferentiableStep(level, level.optimizer_snapshot(with_state=False))
            self._optimizers.append(step)
        except ProblemError as error:
            if self.differentiated or level.optimizer is None:
                raise
            self._optimizers.append(error)
        index_of = {id(variable): index for index, variable in enumerate(self.variables)}
        new = [variable for variable in level.variables if id(variable) not in index_of]
        self.variables = (*self.variables, *new)
        index_of |= {id(v): len(index_of) + k for k, v in enumerate(new)}
        self.indices.append([index_of[id(variable)] for variable in level.variables])
        self.levels.append(level)

    def _interval(self, limit: float) -> int:
        """The number of steps between two checkpoints of a run that is differentiated."""
        size = sum(
            (1 + len(self.optimizer(number).moment_names)) * v.numel() * v.element_size() / GIB
            for number, level in enumerate(self.levels)
            for v in level.variables
        )
        every = 1 if self.length * size <= limit else min(SEGMENT, self.length)
        if every * size > limit:
            raise ProblemError(
                f"memory_limit: {every} steps of {self.levels[0].name} take {every * size:.2f} "
                f"GiB, more than the limit of {limit:g}; raise the limit, train fewer variables, "
                'or choose an estimator of the end of the run, such as "minres"'
            )
        return every

    def optimizer(self, level: int) -> DifferentiableStep:
        """The step of a level's optimizer as a function.

        Raises:
            ProblemError: it is not known.
        """
        step = self._optimizers[level]
        if isinstance(step, ProblemError):
            raise ProblemError(f"{step}, or leave out what repeats the run")
        return step

    @property
    def devices(self) -> list[torch.device]:
        """The devices that hold the variables."""
        return devices_of(*self.levels)

    def record(
        self, *updates: ParameterUpdate, assigned: Mapping[int, Tensor] | None = None
    ) -> None:
        """Record a step, before the optimizers take it.

        Args:
            updates: see `update`, one for each level that moves.
            assigned: see `RecordedStep`; the variables have these values already.
        """
        number = len(self.steps)
        if self.checkpoints.due(number):
            copies = tuple(v.detach().clone() for v in self.variables)
            repeatable = not any(isinstance(step, ProblemError) for step in self._optimizers)
            states = {
                k: level.optimizer_snapshot(with_state=repeatable)["state"]
                for k, level in enumerate(self.levels)
            }
            self.checkpoints.put(number, (copies, states))
        self.steps.append(RecordedStep(updates, assigned or {}))

    def update(
        self,
        level: int,
        batch: Any,
        random_state: RandomState,
        gradient: Sequence[Tensor | None],
        seen: Tensor | None = None,
    ) -> ParameterUpdate:
        """The update that a level is about to make; the rows of its batch are counted.

        Args:
            level: the number of the level in the run.
            batch: the batch.
            random_state: the generator states before the loss was evaluated.
            gradient: one entry for each variable of the level, then that of the row weights.
            seen: which rows are in the batch, ``(n,)``; by default those of a share in the loss.

        Raises:
            ProblemError: the loss does not read the weights.
        """
        problem, (*of_w, of_v) = self.levels[level], gradient
        if of_v is None:
            raise ProblemError(
                f"{problem.name}: the loss does not read the row weights; multiply the loss of "
                "each row in the batch by the row's weight"
            )
        share = of_v.detach().to("cpu", torch.float64)
        visited = share != 0 if seen is None else seen.cpu()
        self.visits += visited
        self.losses += share * visited.sum()
        optimizer = {**problem.optimizer_snapshot(with_state=False), "state": {}}
        read = tuple(entry is not None for entry in of_w)
        return ParameterUpdate(level, batch, random_state, optimizer, read)

    @contextmanager
    def repeated(self, weights: Tensor, *, keep: bool = False) -> Iterator[Checkpoints]:
        """The run again, with ``weights`` for v: in the body variables and v are those of its end.

        Args:
            weights: the rows' weights, ``(n,)``.
            keep: whether the checkpoints that are yielded have the points of the new run.

        Raises:
            ProblemError: an optimizer's step is not known.
            NonFiniteError: the run diverges.
        """
        checkpoints = Checkpoints(self.checkpoints.every) if keep else self.checkpoints
        tensors = (self.weights, *self.variables)
        with preserve_state(tensors, self.devices), perturbed(tensors):
            assign_((self.weights,), (weights.to(self.weights),))
            point = self.checkpoints.get(0)
            for number in range(len(self.steps)):
                if keep and checkpoints.due(number):
                    checkpoints.put(number, point)
                point = self.advance(number, point)
            assign_(self.variables, point[0])
            if not all(bool(v.isfinite().all()) for v in self.variables):
                raise NonFiniteError(
                    f"{self.levels[0].name}: the run diverges with these row weights"
                )
            yield checkpoints

    def points(self, begin: int, end: int, checkpoints: Checkpoints) -> list[Point]:
        """The points before the steps from ``begin``, a checkpoint, to ``end``."""
        points = [checkpoints.get(begin)]
        for number in range(begin, end - 1):
            points.append(self.advance(number, points[-1]))
        return points

    def advance(self, number: int, point: Point) -> Point:
        """The point after the step ``number`` from ``point``; the variables stay at ``point``."""
        step, states = self.steps[number], dict(point[1])
        values = step.begin(point[0])
        after = list(values)
        assign_(self.variables, values)
        for update in step.updates:
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
        record = StepRecord(
            update.batch,
            update.random_state,
            tuple(values[index] for index in self.indices[update.level]),
            optimizer={**update.optimizer, "state": state},
        )
        if not gradient:
            return record
        pairs = zip(gradient, update.read, strict=True)
        return replace(record, gradient=tuple(g if read else None for g, read in pairs))
