"""A training run of one level that can be differentiated, and repeated with other row weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm, trange

from hyperopt_peft.core.problem import Problem, StepRecord
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.products import ProductKind
from hyperopt_peft.hypergradients.unrolled.optimizer_step import OptimizerStep
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.restore import assign_, perturbed, preserve_state
from hyperopt_peft.utils.vector import Vector, zeros_like

#: Steps between two checkpoints where not every step is one.
SEGMENT = 16
GIB = 2**30
Point = tuple[tuple[Tensor, ...], dict[int, Any]]


@dataclass(frozen=True)
class RunStep:
    """One step of a run: its batch, random numbers and optimizer options, without tensors of w."""

    batch: Any
    random_state: RandomState
    optimizer: Mapping[str, Any]
    read: tuple[bool, ...]


class Checkpoints:
    """The variables and the optimizer's state before each ``every``-th step.

    They are in memory where ``every`` is 1, and in files of a temporary folder otherwise, so that
    the memory of a run does not grow with its length.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._points: dict[int, Point] = {}
        self._folder = None if every == 1 else TemporaryDirectory(prefix="attribution-")

    def due(self, step: int) -> bool:
        """Whether the point before ``step`` is kept."""
        return step % self.every == 0

    def put(self, step: int, point: Point) -> None:
        """Keep ``point``, where w and the optimizer were before ``step``."""
        if self._folder is None:
            self._points[step] = point
        else:
            torch.save(point, Path(self._folder.name) / f"{step}.pt")

    def get(self, step: int) -> Point:
        """The point before ``step``, which was kept."""
        if self._folder is None:
            return self._points[step]
        point: Point = torch.load(Path(self._folder.name) / f"{step}.pt", weights_only=True)
        return point


class Run:
    """T optimizer steps of a level, whose loss reads a weight for each training row.

    Batches, order, random numbers and the optimizer's options are those of the run that was
    recorded, in every repetition and in the derivative.

    Args:
        level: the level that is trained, with an optimizer.
        weights: the rows' weights v, ``(n,)``, a leaf that requires a gradient.
        steps: T.
        memory_limit: the memory in GiB that checkpoints may take. Where those of all steps fit, a
            derivative costs two passes a step; otherwise every 16th step is kept, in temporary
            files, and a derivative costs three.
        points: how many points of the run are read, without derivatives of its steps; None for
            a run that is differentiated. Then nothing is required of optimizer and memory, and a
            run whose optimizer is not known cannot be repeated.

    Raises:
        ProblemError: without ``points``, the optimizer's step has no known derivative, or even 16
            steps do not fit.
    """

    def __init__(
        self,
        level: Problem,
        weights: Tensor,
        steps: int,
        *,
        memory_limit: float = 1.0,
        points: int | None = None,
    ) -> None:
        self._optimizer: OptimizerStep | ProblemError
        try:
            self._optimizer = OptimizerStep(level, level.optimizer_snapshot(with_state=False))
        except ProblemError as error:
            if points is None or level.optimizer is None:
                raise
            self._optimizer = error
        self.level, self.weights, self.length = level, weights, steps
        self.center = weights.detach().clone()
        self.steps: list[RunStep] = []
        #: Per row: how many steps saw the row, and the sum of its losses in them.
        self.visits = torch.zeros(len(weights), dtype=torch.int64)
        self.losses = torch.zeros(len(weights), dtype=torch.float64)
        self.every = self._interval(memory_limit) if points is None else max(1, steps // points)
        self.checkpoints = Checkpoints(self.every)

    def _interval(self, limit: float) -> int:
        """The number of steps between two checkpoints of a run that is differentiated."""
        width = 1 + len(self.optimizer.moment_names)
        size = width * sum(v.numel() * v.element_size() for v in self.level.variables) / GIB
        every = 1 if self.length * size <= limit else min(SEGMENT, self.length)
        if every * size > limit:
            raise ProblemError(
                f"memory_limit: {every} steps of {self.level.name} take {every * size:.2f} GiB, "
                f"more than the limit of {limit:g}; raise the limit, train fewer variables, or "
                'choose a method of the end of the run, such as "minres"'
            )
        return every

    @property
    def optimizer(self) -> OptimizerStep:
        """The optimizer's step as a function.

        Raises:
            ProblemError: it is not known.
        """
        if isinstance(self._optimizer, ProblemError):
            raise ProblemError(f"{self._optimizer}, or leave out what repeats the run")
        return self._optimizer

    def record(
        self,
        batch: Any,
        random_state: RandomState,
        gradient: Sequence[Tensor | None],
        seen: Tensor | None = None,
    ) -> None:
        """Record a step, before the optimizer takes it.

        Args:
            batch: the batch.
            random_state: the generator states before the loss was evaluated.
            gradient: ∂f/∂w, one entry for each variable, then ∂f/∂v.
            seen: which rows are in the batch, ``(n,)``; by default those of a share in the loss.

        Raises:
            ProblemError: the loss does not read the weights.
        """
        *of_w, of_v = gradient
        if of_v is None:
            raise ProblemError(
                f"{self.level.name}: the loss does not read the row weights; multiply the loss of "
                "each row in the batch by the row's weight"
            )
        due = self.checkpoints.due(len(self.steps))
        repeatable = not isinstance(self._optimizer, ProblemError)
        snapshot = self.level.optimizer_snapshot(with_state=due and repeatable)
        if due:
            copies = tuple(v.detach().clone() for v in self.level.variables)
            self.checkpoints.put(len(self.steps), (copies, snapshot["state"]))
        read = tuple(g is not None for g in of_w)
        if self.steps and _same(random_state, self.steps[-1].random_state):
            random_state = self.steps[-1].random_state  # 5 kB a step where none is drawn
        self.steps.append(RunStep(batch, random_state, {**snapshot, "state": {}}, read))
        share = of_v.detach().to("cpu", torch.float64)
        visited = share != 0 if seen is None else seen.cpu()
        self.visits += visited
        self.losses += share * visited.sum()

    @contextmanager
    def repeated(self, weights: Tensor, *, keep: bool = False) -> Iterator[Checkpoints]:
        """The run again, with ``weights`` for v: in the body w and v are those of its end.

        Args:
            weights: the rows' weights, ``(n,)``.
            keep: whether the checkpoints that are yielded have the points of the new run.

        Raises:
            ProblemError: the optimizer's step is not known.
            NonFiniteError: the run diverges.
        """
        checkpoints = Checkpoints(self.every) if keep else self.checkpoints
        everything = (self.weights, *self.level.variables)
        with preserve_state(everything, self.level.devices), perturbed(everything):
            assign_((self.weights,), (weights.to(self.weights),))
            point = self.checkpoints.get(0)
            for number in range(len(self.steps)):
                if keep and checkpoints.due(number):
                    checkpoints.put(number, point)
                point = self._advance(number, point)
            assign_(self.level.variables, point[0])
            if not all(bool(v.isfinite().all()) for v in self.level.variables):
                raise NonFiniteError(f"{self.level.name}: the run diverges with these row weights")
            yield checkpoints

    @contextmanager
    def without(self, rows: Sequence[int] | Tensor) -> Iterator[None]:
        """The run again, with the weight 0 for ``rows``; otherwise as `repeated`."""
        weights = self.center.clone()
        weights[rows] = 0.0
        with self.repeated(weights):
            yield

    def backward(
        self,
        oracle: Oracle,
        adjoints: Sequence[Vector],
        checkpoints: Checkpoints,
        *,
        product: ProductKind = "exact",
        last: int | None = None,
        progress: bool = False,
    ) -> list[Vector]:
        """(dw_T/dv)ᵀλ for each λ of ``adjoints``, by one sweep from the run's end.

        As `Unrolled`, with the steps between two checkpoints done again. λ is shaped like w, the
        result like the variables of ``oracle.upper``, which are the weights.

        Args:
            oracle: of the level, opened.
            adjoints: the gradients of some functions of w_T.
            checkpoints: those of the run that is differentiated.
            product: how second derivatives are taken.
            last: how many steps, from the end; None for all.
            progress: whether to show a progress bar.
        """
        found = [zeros_like(Vector(oracle.upper.variables)) for _ in adjoints]
        adjoints, moments = list(adjoints), [None for _ in adjoints]
        first = 0 if last is None else max(0, len(self.steps) - last)
        with tqdm(total=len(self.steps) - first, disable=not progress, desc="backward") as bar:
            for begin in reversed(range(0, len(self.steps), self.every)):
                end = min(begin + self.every, len(self.steps))
                points = self._points(begin, end, checkpoints) if end > first else []
                oracle.passes.gradients += max(0, len(points) - 1)
                for number in reversed(range(max(begin, first), end)):
                    self._pull(oracle, number, points.pop(), product, adjoints, moments, found)
                    bar.update()
        return found

    def _pull(
        self,
        oracle: Oracle,
        number: int,
        point: Point,
        kind: ProductKind,
        adjoints: list[Vector],
        moments: list[Any],
        found: list[Vector],
    ) -> None:
        record = self._record(number, point)
        with oracle.product(kind, at=record) as product:
            gradient = product.lower_gradient()
            record = replace(record, gradient=_read(gradient, self.steps[number].read))
            for k, adjoint in enumerate(adjoints):
                w_bar, g_bar, moments[k], _ = self.optimizer.vjp(record, adjoint, moments[k])
                hessian, mixed = product.both(g_bar)
                adjoints[k] = w_bar + hessian
                found[k] = found[k] + mixed

    def _points(self, begin: int, end: int, checkpoints: Checkpoints) -> list[Point]:
        """The points before the steps from ``begin`` to ``end``."""
        points = [checkpoints.get(begin)]
        with perturbed(self.level.variables):
            for number in range(begin, end - 1):
                points.append(self._advance(number, points[-1]))
        return points

    def _advance(self, number: int, point: Point) -> Point:
        """The point after the step ``number`` from ``point``; w stays at ``point``."""
        step, w = self.steps[number], self.level.variables
        assign_(w, point[0])
        with replay(step.random_state):
            _, _, gradient = self.level.differentiate(step.batch, w)
        record = replace(self._record(number, point), gradient=_read(gradient, step.read))
        after, snapshot = self.optimizer.advance(record)
        moved = tuple(x.to(v.dtype) for x, v in zip(after, w, strict=True))
        return moved, snapshot["state"]

    def _record(self, number: int, point: Point) -> StepRecord:
        step = self.steps[number]
        snapshot = {**step.optimizer, "state": point[1]}
        return StepRecord(step.batch, step.random_state, point[0], (), None, snapshot)


def train(
    level: Problem,
    weights: Tensor,
    steps: int,
    *,
    memory_limit: float = 1.0,
    points: int | None = None,
    progress: bool = False,
) -> Run:
    """Train ``level`` for ``steps`` steps, and return the run.

    Raises:
        ProblemError: see `Run`; or the loss does not read the weights.
        NonFiniteError: a loss or a gradient is NaN or infinite; the message names the step.
    """
    run = Run(level, weights, steps, memory_limit=memory_limit, points=points)
    for step in trange(steps, disable=not progress, desc=level.name):
        batch, random_state = level.next_batch(), RandomState.capture(level.devices)
        try:
            evaluation = level.gradient(batch, (*level.variables, weights))
        except NonFiniteError as error:
            raise NonFiniteError(f"step {step + 1}: {error}") from error
        run.record(batch, random_state, evaluation.gradient)
        level.step(evaluation.gradient[:-1], math.hypot(*evaluation.norms[:-1]))
    return run


def _same(one: RandomState, other: RandomState) -> bool:
    return one.states.keys() == other.states.keys() and all(
        torch.equal(state, other.states[name]) for name, state in one.states.items()
    )


def _read(gradient: Sequence[Tensor | None], read: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """``gradient`` with None for the variables that the step left alone."""
    return tuple(g if known else None for g, known in zip(gradient, read, strict=True))
