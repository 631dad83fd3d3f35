"""One optimizer step of a `BilevelTrainer`: from its micro-batches to each ``.grad``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from hyperopt_peft.core.labels import label_weights, labels_are_shifted
from hyperopt_peft.core.validation import require_read
from hyperopt_peft.engine.step import BilevelStep, Gradient, prior_of
from hyperopt_peft.errors import NON_FINITE_ADVICE, NonFiniteError, ProblemError
from hyperopt_peft.trainer.accumulation import MicroBatch
from hyperopt_peft.trainer.checks import divides_by_items
from hyperopt_peft.trainer.optimizer import learning_rate
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.distributed import gather
from hyperopt_peft.utils.random_state import RandomState

if TYPE_CHECKING:
    from hyperopt_peft.trainer.trainer import BilevelTrainer

#: The logged numbers of an upper step.
UPPER_NUMBERS = ("upper_loss", "implicit_ratio", "residual", "solver_steps")


class OptimizerStep:
    """A step of both levels at one point: the lower gradient, and the hypergradient when due.

    The gradients of the levels' variables are cleared, since a variable need not be a parameter of
    the model, whose gradients the Trainer clears.

    Args:
        trainer: the owner of the levels and the optimizer.
        batches: the micro-batches of the step.
    """

    def __init__(self, trainer: BilevelTrainer, batches: Sequence[Any]) -> None:
        self.trainer, self.expected = trainer, len(batches)
        self.micro: list[MicroBatch] = []
        #: The upper level's batch, in a step that moves it.
        self.upper: list[MicroBatch] = []
        self._losses: list[Tensor] = []
        self._metrics: list[dict[str, float]] = []
        self._weights = self._label_weights(batches)
        #: The Trainer's counters at the beginning of the step.
        self.begun = trainer.current_flos, trainer.state.num_input_tokens_seen
        self.clear_gradients()

    @property
    def whole(self) -> bool:
        """Whether all micro-batches were evaluated."""
        return len(self.micro) == self.expected

    def clear_gradients(self) -> None:
        """Set each ``.grad`` of the levels' variables to None."""
        for _, variable in self.trainer.named_variables():
            variable.grad = None

    @property
    def last_prior(self) -> float:
        """The lower level's prior in the loss of the last micro-batch."""
        return prior_of(self.trainer.lower, self._metrics[-1]) / self.expected

    def loss(self, inputs: Any) -> Tensor:
        """The lower loss of the next micro-batch divided by their number, with its graph."""
        trainer = self.trainer
        batch = self._on_device(inputs, self._weights[len(self.micro)])
        self.micro.append(MicroBatch(batch, RandomState.capture(trainer.devices)))
        with trainer.compute_loss_context_manager():
            loss, metrics = trainer.lower.evaluate(batch)
        self._losses.append(loss.detach() / self.expected)
        self._metrics.append(metrics)
        return loss / self.expected

    def set_gradients(self, save: Callable[[RandomState], str]) -> None:
        """Set each ``.grad`` to the clipped direction of the step; None for no move.

        Args:
            save: writes a checkpoint of the state before the step, from the random states at its
                beginning; returns where, in words.

        Raises:
            NonFiniteError: a loss, a gradient or a curvature is NaN or infinite, unless
                ``args.non_finite`` skips the step.
        """
        try:
            self._set_gradients()
        except NonFiniteError as error:
            self.clear_gradients()
            trainer, state = self.trainer, self.trainer.state
            if trainer.args.non_finite == "skip":
                trainer.skipped += 1
                return
            trainer.current_flos, state.num_input_tokens_seen = self.begun
            written = save(self.micro[0].random_state)
            raise NonFiniteError(
                f"step {state.global_step + 1} (epoch {state.epoch or 0:.2f}, {self.expected} "
                f"micro-batches): {error}; {NON_FINITE_ADVICE}; {written}"
            ) from error

    def _set_gradients(self) -> None:
        trainer, log = self.trainer, self.trainer.step_log
        w = trainer.lower.variables
        u = () if trainer.upper is None else trainer.upper.variables
        gradient = distributed.mean([x.grad for x in (*w, *u)], (*w, *u))
        loss = distributed.average(torch.stack(self._losses).sum())
        trainer.lower.require_finite(loss, gradient[: len(w)])
        for variable in u:
            variable.grad = None
        numbers = {f"lower_{k}": v for k, v in distributed.means(self._metrics).items()}
        descent = gradient[: len(w)]
        if trainer.bilevel_step is not None:
            descent = self._upper(trainer.bilevel_step, gradient, numbers)
        elif trainer.state.global_step == 0:
            require_read(trainer.lower, descent)
        norm = self._move(w, descent, trainer.max_grad_norm)
        log.add({**numbers, "lower_grad_norm": norm})
        log.last["grad_norm"] = norm
        log.last["learning_rate"] = learning_rate(trainer.optimizer, trainer.lower)

    def _upper(self, bilevel: BilevelStep, gradient: Gradient, numbers: dict[str, Any]) -> Gradient:
        """The lower level's direction; each ``lower_steps``-th step sets the ``.grad`` of u too."""
        trainer, step = self.trainer, self.trainer.state.global_step + 1
        every, shared = trainer.args.lower_steps, bilevel.requirements.upper_weight > 0
        bilevel.lower.half = trainer.lower.half
        with trainer.compute_loss_context_manager():
            descent = bilevel.record_lower(
                list(self.micro),
                self.micro[0].random_state,
                gradient,
                number=step,
                next_upper_batch=lambda: self._upper_batch(step - 1 + (step - 1) // every),
            )
        if step % every == 0:
            # With an upper weight each lower step has read an upper batch.
            self.upper = self._upper_batch((step if shared else 0) + step // every - 1)
            with trainer.compute_loss_context_manager():
                upper = bilevel.hypergradient(self.upper, number=step)
            numbers |= {key: upper.log[key] for key in UPPER_NUMBERS}
            numbers |= {f"upper_{key}": value for key, value in upper.metrics.items()}
            u, limit = bilevel.upper.variables, trainer.args.upper_max_grad_norm
            numbers["upper_grad_norm"] = self._move(u, upper.hypergradient, limit)
            rate = learning_rate(trainer.optimizer, bilevel.upper)
            trainer.step_log.last["upper_learning_rate"] = rate
            bilevel.forget()
        return descent

    def _move(
        self, variables: Sequence[Tensor], gradient: Sequence[Tensor | None], limit: float | None
    ) -> Tensor:
        """Set each ``.grad`` and clip them together; returns their norm before clipping."""
        for variable, part in zip(variables, gradient, strict=True):
            variable.grad = part
        clip = self.trainer.accelerator.clip_grad_norm_
        return gather(clip(variables, limit or float("inf")))

    def _upper_batch(self, number: int) -> list[MicroBatch]:
        """Batch ``number`` of the upper level; F is a mean over its labels, or else its rows."""
        trainer = self.trainer
        assert trainer.upper_batches is not None
        pieces, shares = zip(*trainer.upper_batches.pieces(number), strict=True)
        of_labels = self._label_weights(pieces)
        seed = ("upper", trainer.args.seed, number, *distributed.rank_key())
        return [
            MicroBatch(
                self._on_device(piece, of_label),
                RandomState.seeded(trainer.devices, *seed, k),
                1.0 if of_label else share,
            )
            for k, (piece, share, of_label) in enumerate(zip(pieces, shares, of_labels))
        ]

    def _label_weights(self, batches: Sequence[Any]) -> list[dict[str, Tensor]]:
        trainer = self.trainer
        if not trainer.trainer_loss:
            return [{} for _ in batches]
        own_loss = trainer.own_loss or bool(trainer.compute_loss_func)
        return label_weights(
            batches,
            shifted=self._labels_are_shifted(batches[0], own_loss),
            items=own_loss or divides_by_items(trainer.model),
            across_processes=trainer.args.average_tokens_across_devices,
        )

    def _labels_are_shifted(self, batch: Any, own_loss: bool) -> bool:
        if not isinstance(batch, Mapping):
            return False
        batch = send_to_device(batch, self.trainer.args.device)
        try:
            with self.trainer.compute_loss_context_manager():
                return labels_are_shifted(self.trainer.model, batch)
        except ProblemError:
            if own_loss:  # which may be of a model without one
                return False
            raise

    def _on_device(self, inputs: Any, weight: Mapping[str, Tensor]) -> Any:
        batch = send_to_device(inputs, self.trainer.args.device, non_blocking=True)
        return {**batch, **weight} if weight else batch


class StepLog:
    """The numbers of the steps since the last log: to be averaged, and the last of others.

    Example:
        >>> log = StepLog()
        >>> log.add({"loss": 1.0}), log.add({"loss": 3.0, "residual": None})
        (None, None)
        >>> log.read()
        ({'loss': 2.0}, {})
    """

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}
        self._values: dict[str, list[Any]] = {}

    def add(self, values: Mapping[str, Any]) -> None:
        """Add a step's numbers without None and infinity (‖implicit‖/‖direct‖ with direct = 0)."""
        for key, value in values.items():
            if value is not None and value != float("inf"):
                self._values.setdefault(key, []).append(value)

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """The means over steps and processes, and the last numbers; both are then cleared."""
        each = {(key, i): float(v) for key, vs in self._values.items() for i, v in enumerate(vs)}
        means: dict[str, list[float]] = {}
        for (key, _), value in distributed.averages(each).items():
            means.setdefault(key, []).append(value)
        last = {key: float(value) for key, value in self.last.items() if value is not None}
        self._values, self.last = {}, {}
        return {key: sum(values) / len(values) for key, values in means.items()}, last
