"""Records the steps of a run of a `transformers.Trainer`, with a weight for each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hyperopt_peft.attribution.rows import INDEX, RowWeighted
from hyperopt_peft.attribution.run import ParameterUpdate, Run
from hyperopt_peft.trainer.step import Accumulated, MicroBatch
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.models import trainable


class Recorder(TrainerCallback):
    """Records the steps of a run as the Trainer takes them.

    Args:
        rows: the number of training rows.
        memory_limit, differentiated: see `Run`.
        twice: whether the losses are differentiated twice.
    """

    def __init__(
        self, rows: int, memory_limit: float, *, differentiated: bool, twice: bool
    ) -> None:
        self.rows, self.memory_limit = rows, memory_limit
        self.differentiated, self.twice = differentiated, twice
        self.runner: Any = None
        self.run: Run | None = None

    def __copy__(self) -> Recorder:
        """The recorder itself: both phases of a method are one run."""
        return self

    @property
    def trainer(self) -> Any:
        """The trainer of the present phase."""
        return getattr(self.runner, "retrainer", None) or self.runner

    def level(self, trainer: BilevelTrainer) -> RowWeighted:
        """The loss of ``trainer`` with a weight for each row, initially 1."""
        dtypes = [parameter.dtype for _, parameter in trainable(trainer.model)]
        dtype = torch.promote_types(dtypes[0], torch.float32) if dtypes else torch.float32
        device = trainer.args.device
        self.weights = torch.ones(self.rows, dtype=dtype, device=device, requires_grad=True)
        return RowWeighted(trainer, self.weights, twice=self.twice)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the run, or its second phase."""
        trainer, self._assigned = self.trainer, {}
        limit = args.max_grad_norm or None
        levels = [Accumulated(trainer.lower, trainer.optimizer, limit)]
        if trainer.upper is not None:
            limit = args.upper_max_grad_norm or None
            levels.append(Accumulated(trainer.upper, trainer.optimizer, limit))
        if self.run is None:
            self.first = 0
            self.run = Run(
                levels,
                self.weights,
                state.max_steps + _steps_of_retraining(trainer, self.rows),
                memory_limit=self.memory_limit,
                differentiated=self.differentiated,
            )
            return
        self.first = len(self.run.levels)
        for level in levels:
            self.run.add(level)
        if self.runner.args.retrain == "scratch":
            self._assigned = {
                index: self.run.variables[index].detach().clone()
                for index in self.run.indices[self.first]
            }

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the step that the optimizer is about to take."""
        run, step, weights = self.run, self.trainer.current_step, self.weights
        assert run is not None
        shares = (weights.grad, self._seen(step.micro))
        of_weights, visits = distributed.mean(shares, (weights, weights))
        assert visits is not None
        weights.grad = None
        gradient = [*(v.grad for v in run.levels[self.first].variables), of_weights]
        random_state = step.micro[0].random_state
        updates = [run.update(self.first, list(step.micro), random_state, gradient, visits > 0)]
        if step.upper:
            updates.append(self._upper_update(run, step.upper))
        run.record(*updates, assigned=self._assigned)
        self._assigned = {}

    def _upper_update(self, run: Run, batch: list[MicroBatch]) -> ParameterUpdate:
        """The upper level's: its gradient again, since a hypergradient has no rows' shares."""
        number, level = self.first + 1, run.levels[self.first + 1]
        _, _, gradient = level.differentiate(batch, (*level.variables, self.weights))
        (visits,) = distributed.mean((self._seen(batch),), (self.weights,))
        assert visits is not None
        return run.update(number, batch, batch[0].random_state, gradient, visits > 0)

    def _seen(self, batch: Sequence[MicroBatch]) -> Tensor:
        """1 for each row of ``batch``, ``(n,)``."""
        seen = torch.zeros_like(self.weights)
        for micro in batch:
            seen[micro.batch[INDEX]] = 1.0
        return seen


class RowWeightedBiDoRA(BilevelTrainer):
    """`BilevelTrainer` with a weight for each row, at both levels and in both phases."""

    def __init__(self, model: nn.Module, recorder: Recorder, **trainer: Any) -> None:
        super().__init__(model, **trainer)
        self.row_weighted = recorder.level(self)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Σ v_i s_i / Σ c_i, see `RowWeighted`."""
        return self.row_weighted.loss(inputs)


def _steps_of_retraining(trainer: Any, rows: int) -> int:
    """The steps of the second phase of a method, as its Trainer will count them."""
    if not getattr(trainer, "has_second_phase", False):
        return 0
    steps: int = trainer.args.for_retraining().steps_of(rows)
    return steps
