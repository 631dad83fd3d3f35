"""One optimizer step of a `BilevelTrainer`: from micro-batches to each ``.grad``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hyperopt_peft.core.labels import MICRO_BATCHES, NO_LABELS, WEIGHT, scored_labels
from hyperopt_peft.core.problem import Problem, devices_of, variables_of
from hyperopt_peft.core.validation import require_read
from hyperopt_peft.engine.step import BilevelStep, prior_of
from hyperopt_peft.errors import NON_FINITE_ADVICE, NonFiniteError
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.logs import StepLog
from hyperopt_peft.trainer.optimizer import learning_rate
from hyperopt_peft.trainer.upper_batches import UpperBatches
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.distributed import gather
from hyperopt_peft.utils.random_state import RandomState, replay

logger = logging.getLogger(__name__)
#: Entries of a micro-batch by which `task_loss` has weighted its loss already.
COUNTED = {WEIGHT, MICRO_BATCHES}
#: The logged numbers of an upper step.
UPPER_NUMBERS = ("upper_loss", "implicit_ratio", "residual", "solver_steps")


@dataclass(frozen=True)
class MicroBatch:
    """A part of a step's batch, and the random states before its loss is evaluated."""

    batch: Any
    random_state: RandomState
    weight: float = 1.0  # weights the loss; the mean over a step's micro-batches is 1


class Accumulated(Problem):
    """A level whose batch is a list of `MicroBatch`; its loss is the mean of ``level``'s losses.

        f(w) = 1/n Σ_i weight_i f_i(w)   over n micro-batches

    Given ``calls``, which counts evaluations of the Trainer's ``task_loss``, a loss without any is
    weighted by the labels of its micro-batch, as ``task_loss`` weights its own.

    Variables and prior are the level's. Every evaluation of a micro-batch draws the same random
    numbers, and first-order passes hold one graph at a time. ``optimizer`` may also own other
    tensors.
    """

    def __init__(
        self,
        level: Problem,
        optimizer: Any = None,
        max_grad_norm: float | None = None,
        calls: Callable[[], int] | None = None,
    ) -> None:
        self.level, self.calls = level, calls
        named = list(zip(level.names, level.variables, strict=True))
        super().__init__(named, max_grad_norm=max_grad_norm, name=level.name)
        self.optimizer, self.prior = optimizer, level.prior
        self.evaluated = level.evaluated

    @property
    def examples(self) -> Problem | None:
        """As the level's."""
        return self.level.examples

    def terms(self, batch: Sequence[MicroBatch]) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """Each micro-batch's contribution to the mean loss, and its metrics."""
        for micro in batch:
            weight = micro.weight
            calls = self.calls and self.calls()
            with replay(micro.random_state):
                ((loss, metrics),) = self.level.terms(micro.batch)
            if self.calls and self.calls() == calls and isinstance(micro.batch, Mapping):
                weight = micro.batch.get(WEIGHT, weight)
            yield loss * (weight / len(batch)), metrics


@dataclass(eq=False)
class OptimizerStep:
    """A step of both levels at one point: the lower gradient, and the hypergradient when due.

    One object serves all steps of a run, one after another.
    """

    lower: Problem
    bilevel: BilevelStep | None  # None trains the lower level alone
    args: BilevelTrainingArguments
    optimizer: Any  # over both levels
    accelerator: Accelerator
    upper_batches: UpperBatches | None
    with_entries: Callable[[Sequence[Any]], list[Any]]  # adds the entries of `core.labels`
    prepare: Callable[[Any], Any]  # moves a batch to the device
    autocast: Callable[[], AbstractContextManager[Any]]

    def __post_init__(self) -> None:
        upper = [] if self.bilevel is None else [self.bilevel.upper]
        self.u = variables_of(*upper)
        self.devices = devices_of(self.lower, *upper)
        self.log = StepLog()
        self._noted = False
        self.begin(0, 0)

    def begin(self, count: int, number: int) -> None:
        """Begin step ``number``, counted from 1, with ``count`` micro-batches.

        If the estimator observes the lower passes, F is differentiated first. Gradients are cleared
        here because the Trainer clears only the model's parameters.
        """
        self.count = count
        self.micro: list[MicroBatch] = []
        #: The upper level's batch, in a step that moves it.
        self.upper: list[MicroBatch] = []
        self._losses: list[Tensor] = []
        self._metrics: list[dict[str, float]] = []
        self._failure: NonFiniteError | None = None  # raised by F before the lower passes
        self._withheld: list[Tensor | None] = []
        self.clear_gradients()
        bilevel, every = self.bilevel, self.args.lower_steps
        if bilevel is None:
            return
        bilevel.forget()
        if count and bilevel.requirements.observe and number % every == 0:
            self.upper = self._upper_batch(number // every - 1)
            try:
                with self.autocast():
                    bilevel.look_ahead(self.upper, number=number)
            except NonFiniteError as error:
                self._failure = error

    def advice(self) -> str:
        """What to do about a loss, gradient or curvature that is not finite."""
        masks = (scored_labels(x.batch, shifted=False) for x in (*self.micro, *self.upper))
        unlabelled = any(mask is not None and not mask.any() for mask in masks)
        return NO_LABELS if unlabelled else NON_FINITE_ADVICE

    @property
    def complete(self) -> bool:
        """Whether all micro-batches were evaluated."""
        return len(self.micro) == self.count

    def clear_gradients(self) -> None:
        """Set each ``.grad`` of the levels' variables to None."""
        for variable in (*self.lower.variables, *self.u):
            variable.grad = None

    def withhold_gradients(self) -> None:
        """Hide each ``.grad`` from the Trainer, which would clip both levels together."""
        self._withheld = [x.grad for x in (*self.lower.variables, *self.u)]
        self.clear_gradients()

    def return_gradients(self) -> None:
        """Restore each ``.grad`` that was withheld."""
        for variable, gradient in zip((*self.lower.variables, *self.u), self._withheld):
            variable.grad = gradient
        self._withheld = []

    def evaluate(self, inputs: Any) -> Tensor:
        """Differentiate the next micro-batch's share of the loss; returns it without the prior."""
        batch = self.prepare(inputs)
        bilevel = self.bilevel
        self.micro.append(MicroBatch(batch, RandomState.capture(self.devices)))
        with nullcontext() if bilevel is None else bilevel.observe():
            with self.autocast():
                loss, metrics = self.lower.evaluate(batch)
            if bilevel is not None:
                bilevel.check_graph(loss)
            loss = loss / self.count
            # Accelerate divides by this number, which is 1 from Transformers 5.8 on.
            self.accelerator.backward(loss * self.accelerator.gradient_accumulation_steps)
        self._losses.append(loss.detach())
        self._metrics.append(metrics)
        return loss.detach() - prior_of(self.lower, metrics) / self.count

    def set_gradients(self, number: int) -> None:
        """Set each ``.grad`` for step ``number``, counted from 1: clipped, or None for no move."""
        if self._failure is not None:
            raise self._failure
        w, u = self.lower.variables, self.u
        gradient = distributed.mean([x.grad for x in (*w, *u)], (*w, *u))
        loss = distributed.average(torch.stack(self._losses).sum())
        self.lower.require_finite(loss, gradient[: len(w)])
        for variable in u:
            variable.grad = None
        means = distributed.means(self._metrics)
        numbers: dict[str, Any] = {f"lower_{key}": value for key, value in means.items()}
        descent = gradient[: len(w)]
        bilevel, every = self.bilevel, self.args.lower_steps
        if bilevel is not None:
            with self.autocast():
                bilevel.record_lower(list(self.micro), self.micro[0].random_state, gradient)
        elif number == 1:
            require_read(self.lower, descent)
        if bilevel is not None and number % every == 0:
            self.upper = self.upper or self._upper_batch(number // every - 1)
            with self.autocast():
                upper = bilevel.hypergradient(self.upper, number=number)
            if (note := upper.log["note"]) and not self._noted:
                self._noted = True
                logger.warning("step %d: %s: %s", number, bilevel.estimator.name, note)
            numbers |= {key: upper.log[key] for key in UPPER_NUMBERS}
            numbers |= {f"upper_{key}": value for key, value in upper.metrics.items()}
            limit = self.args.upper_max_grad_norm
            numbers["upper_grad_norm"] = self._move(u, upper.hypergradient, limit)
            rate = learning_rate(self.optimizer, bilevel.upper)
            self.log.last["upper_learning_rate"] = rate
            bilevel.forget()
        norm = self._move(w, descent, self.args.max_grad_norm)
        self.log.add({**numbers, "lower_grad_norm": norm})
        self.log.last["grad_norm"] = norm
        self.log.last["learning_rate"] = learning_rate(self.optimizer, self.lower)

    def _move(
        self, variables: Sequence[Tensor], gradient: Sequence[Tensor | None], limit: float
    ) -> Tensor:
        """Set each ``.grad``, clip them together and return their norm before clipping."""
        for variable, direction in zip(variables, gradient, strict=True):
            variable.grad = direction
        return gather(self.accelerator.clip_grad_norm_(variables, limit or float("inf")))

    def _upper_batch(self, number: int) -> list[MicroBatch]:
        """Batch ``number`` of the upper level; F is its mean over labels, or over rows."""
        assert self.upper_batches is not None
        pieces, shares = zip(*self.upper_batches.pieces(number), strict=True)
        batches = self.with_entries(pieces)
        seed = ("upper", self.args.seed, number, *distributed.rank_key())
        micro = []
        for k, (batch, share) in enumerate(zip(batches, shares, strict=True)):
            weight = 1.0 if isinstance(batch, Mapping) and batch.keys() & COUNTED else share
            with replay(RandomState.seeded(self.devices, *seed, k)):  # preparing may draw too
                batch = self.prepare(batch)
                micro.append(MicroBatch(batch, RandomState.capture(self.devices), weight))
        return micro
