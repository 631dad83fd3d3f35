"""A training run that can be differentiated, and repeated with other row weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hyperopt_peft.attribution.checkpoints import Checkpoints, Point
from hyperopt_peft.core.problem import Problem, StepRecord, devices_of
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.hypergradients.unrolled.optimizer_step import OptimizerStep
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.restore import assign_, perturbed, preserve_state

#: Steps between two checkpoints where not every step is one.
SEGMENT = 16
GIB = 2**30


@dataclass(frozen=True)
class Move:
    """A level's part in a step: its batch, random numbers and optimizer options, without tensors.

    ``read`` says which of the level's variables the loss read, and so the optimizer moved.
    """

    level: int
    batch: Any
    random_state: RandomState
    optimizer: Mapping[str, Any]
    read: tuple[bool, ...]


@dataclass(frozen=True)
class RunStep:
    """The moves of one step, all from the same point.

    ``assigned`` has values that variables, by their place in the run, get before the step.
    """

    moves: tuple[Move, ...]
    assigned: Mapping[int, Tensor] = field(default_factory=dict)

    def begin(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``values`` with those that are assigned."""
        return tuple(self.assigned.get(place, value) for place, value in enumerate(values))


@dataclass(frozen=True)
class Observed:
    """What the driver of a run knows of a level's part in a step.

    Attributes:
        level: the number of the level in the run.
        batch: the batch.
        random_state: the generator states before the loss was evaluated.
        gradient: one entry for each variable of the level, then that of the row weights.
        seen: which rows are in the batch, ``(n,)``; by default those of a share in the loss.
    """

    level: int
    batch: Any
    random_state: RandomState
    gradient: Sequence[Tensor | None]
    seen: Tensor | None = None


class Run:
    """T steps of levels whose losses read a weight for each training row.

    Each level moves its own variables by its own optimizer, along the gradient of its own loss.
    Two levels may own the same variables, one after the other, as in a training of two phases.
    Batches, order, random numbers and the optimizers' options are those of the run that was
    recorded, in every repetition and in the derivative.

    Args:
        levels: the levels that are trained, each with an optimizer.
        weights: the rows' weights v, ``(n,)``, a leaf that requires a gradient.
        steps: T.
        memory_limit: the memory in GiB that checkpoints may take. Where those of all steps fit, a
            derivative costs two passes a step; otherwise every 16th step is kept, in temporary
            files, and a derivative costs three.
        points: how many points of the run are read, without derivatives of its steps; None for
            a run that is differentiated. Then nothing is required of optimizer and memory, and a
            run whose optimizer is not known cannot be repeated.

    Raises:
        ProblemError: without ``points``, an optimizer's step has no known derivative, or even 16
            steps do not fit.
    """

    def __init__(
        self,
        levels: Sequence[Problem],
        weights: Tensor,
        steps: int,
        *,
        memory_limit: float = 1.0,
        points: int | None = None,
    ) -> None:
        self.differentiated = points is None
        self.weights, self.length = weights, steps
        self.center = weights.detach().clone()
        self.levels: list[Problem] = []
        self.variables: tuple[Tensor, ...] = ()
        #: Of each level, the places of its variables in ``variables``.
        self.places: list[list[int]] = []
        self._optimizers: list[OptimizerStep | ProblemError] = []
        for level in levels:
            self.add(level)
        self.steps: list[RunStep] = []
        #: Per row: how many steps saw the row, and the sum of its losses in them.
        self.visits = torch.zeros(len(weights), dtype=torch.int64)
        self.losses = torch.zeros(len(weights), dtype=torch.float64)
        self.every = self._interval(memory_limit) if points is None else max(1, steps // points)
        self.checkpoints = Checkpoints(self.every)

    def add(self, level: Problem) -> None:
        """Add a level, which moves in later steps.

        Raises:
            ProblemError: as `Run`.
        """
        try:
            step = OptimizerStep(level, level.optimizer_snapshot(with_state=False))
            self._optimizers.append(step)
        except ProblemError as error:
            if self.differentiated or level.optimizer is None:
                raise
            self._optimizers.append(error)
        known = {id(variable): place for place, variable in enumerate(self.variables)}
        new = [variable for variable in level.variables if id(variable) not in known]
        self.variables = (*self.variables, *new)
        known |= {id(v): len(known) + k for k, v in enumerate(new)}
        self.places.append([known[id(variable)] for variable in level.variables])
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
                'or choose a method of the end of the run, such as "minres"'
            )
        return every

    def optimizer(self, level: int) -> OptimizerStep:
        """The step of a level's optimizer as a function.

        Raises:
            ProblemError: it is not known.
        """
        known = self._optimizers[level]
        if isinstance(known, ProblemError):
            raise ProblemError(f"{known}, or leave out what repeats the run")
        return known

    @property
    def devices(self) -> list[torch.device]:
        """The devices that hold the variables."""
        return devices_of(*self.levels)

    def record(self, *observed: Observed, assigned: Mapping[int, Tensor] | None = None) -> None:
        """Record a step, before the optimizers take it.

        Args:
            observed: the part of each level that moves.
            assigned: see `RunStep`; the variables have these values already.

        Raises:
            ProblemError: a loss does not read the weights.
        """
        number = len(self.steps)
        if self.checkpoints.due(number):
            copies = tuple(v.detach().clone() for v in self.variables)
            repeatable = not any(isinstance(each, ProblemError) for each in self._optimizers)
            states = {
                k: level.optimizer_snapshot(with_state=repeatable)["state"]
                for k, level in enumerate(self.levels)
            }
            self.checkpoints.put(number, (copies, states))
        self.steps.append(RunStep(tuple(map(self._move, observed)), assigned or {}))

    def _move(self, observed: Observed) -> Move:
        level, (*of_w, of_v) = self.levels[observed.level], observed.gradient
        if of_v is None:
            raise ProblemError(
                f"{level.name}: the loss does not read the row weights; multiply the loss of "
                "each row in the batch by the row's weight"
            )
        share = of_v.detach().to("cpu", torch.float64)
        visited = share != 0 if observed.seen is None else observed.seen.cpu()
        self.visits += visited
        self.losses += share * visited.sum()
        random_state = observed.random_state
        if self.steps and _same(random_state, self.steps[-1].moves[0].random_state):
            random_state = self.steps[-1].moves[0].random_state  # 5 kB a step where none is drawn
        return Move(
            observed.level,
            observed.batch,
            random_state,
            {**level.optimizer_snapshot(with_state=False), "state": {}},
            tuple(gradient is not None for gradient in of_w),
        )

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
        checkpoints = Checkpoints(self.every) if keep else self.checkpoints
        everything = (self.weights, *self.variables)
        with preserve_state(everything, self.devices), perturbed(everything):
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

    @contextmanager
    def without(self, rows: Sequence[int] | Tensor) -> Iterator[None]:
        """The run again, with the weight 0 for ``rows``; otherwise as `repeated`."""
        weights = self.center.clone()
        weights[rows] = 0.0
        with self.repeated(weights):
            yield

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
        for move in step.moves:
            level = self.levels[move.level]
            with replay(move.random_state):
                _, _, gradient = level.differentiate(move.batch, level.variables)
            record = self.step_record(move, values, states.get(move.level, {}), gradient)
            moved, snapshot = self.optimizer(move.level).advance(record)
            for place, value in zip(self.places[move.level], moved, strict=True):
                after[place] = value.to(self.variables[place].dtype)
            states[move.level] = snapshot["state"]
        return tuple(after), states

    def step_record(
        self,
        move: Move,
        values: Sequence[Tensor],
        state: Any,
        gradient: Sequence[Tensor | None] = (),
    ) -> StepRecord:
        """``move`` from ``values`` and the optimizer's ``state``, along ``gradient`` if given.

        A variable that the loss of the recorded step did not read has no gradient.
        """
        record = StepRecord(
            move.batch,
            move.random_state,
            tuple(values[place] for place in self.places[move.level]),
            optimizer={**move.optimizer, "state": state},
        )
        if not gradient:
            return record
        read = zip(gradient, move.read, strict=True)
        return replace(record, gradient=tuple(g if known else None for g, known in read))


def train(
    levels: Sequence[Problem],
    weights: Tensor,
    order: Sequence[int],
    *,
    seed: int = 0,
    memory_limit: float = 1.0,
    points: int | None = None,
    progress: bool = False,
) -> Run:
    """Train ``levels``, and return the run.

    Args:
        levels: the lower level, and an upper one where there is one, each with an optimizer.
        weights: see `Run`.
        order: the number of the level that moves, step by step.
        seed: of the upper level's random numbers, as in `Engine`.
        memory_limit, points: see `Run`.
        progress: whether to show a progress bar.

    Raises:
        ProblemError: see `Run`; or a loss does not read the weights.
        NonFiniteError: a loss or a gradient is NaN or infinite; the message names the step.
    """
    run = Run(levels, weights, len(order), memory_limit=memory_limit, points=points)
    moves = [0 for _ in levels]
    for step, number in enumerate(tqdm(order, disable=not progress, desc=levels[0].name)):
        level, moves[number] = levels[number], moves[number] + 1
        batch, random_state = level.next_batch(), RandomState.capture(run.devices)
        above = number > 0  # whose random numbers are none of the training stream
        if above:
            key = (seed, moves[number], *distributed.rank_key())
            random_state = RandomState.seeded(run.devices, *key)
        try:
            with replay(random_state) if above else nullcontext():
                evaluation = level.gradient(batch, (*level.variables, weights))
        except NonFiniteError as error:
            raise NonFiniteError(f"step {step + 1}: {error}") from error
        run.record(Observed(number, batch, random_state, evaluation.gradient))
        level.step(evaluation.gradient[:-1], math.hypot(*evaluation.norms[:-1]))
    return run


def _same(one: RandomState, other: RandomState) -> bool:
    return one.states.keys() == other.states.keys() and all(
        torch.equal(state, other.states[name]) for name, state in one.states.items()
    )
