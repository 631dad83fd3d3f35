"""One optimizer step of a `BilevelTrainer`: what the variables move by, and what is logged."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_peft.core.problem import Problem, devices_of, require_read
from hyperopt_peft.engine import checkpoint
from hyperopt_peft.engine.step import BilevelStep
from hyperopt_peft.errors import NON_FINITE_ADVICE, NonFiniteError, ProblemError
from hyperopt_peft.trainer.accumulation import Accumulated, MicroBatch
from hyperopt_peft.trainer.data import UpperBatches, collating
from hyperopt_peft.trainer.sealed_trainer import SealedTrainer
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.distributed import full
from hyperopt_peft.utils.random_state import RandomState


class StepTrainer(SealedTrainer):
    """A `SealedTrainer` whose steps are of the levels' losses.

    The micro-batches' backward passes fill each ``.grad``; after the last one they are made what
    the optimizer is to move the variables by.
    """

    _upper_batches: UpperBatches | None
    _checked = False  # whether f reads every lower variable of a run of one level

    def _take_levels(self) -> None:
        """Note the levels' variables, which FSDP2 puts shards in the place of, and the optimizer.

        Raises:
            ProblemError: the estimator does not know the optimizer's step.
        """
        limit = self.args.max_grad_norm or None
        self._accumulated = Accumulated(self.lower, self.optimizer, limit)
        if self.upper is not None:
            self._step = BilevelStep(
                self.upper, self._accumulated, self.estimator, seed=self.args.seed
            )
        self._devices = devices_of(*self._levels)

    def _begin_run(self) -> None:
        """Begin without anything of an earlier run."""
        self._micro: list[MicroBatch] = []
        self._losses: list[Tensor] = []
        self._metrics: list[dict[str, float]] = []
        self._noted = {}
        self._kept, self._packed = {}, None
        self._window, self._signalled, self.skipped = None, False, 0

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """A step's micro-batches, as `transformers.Trainer.get_batch_samples`.

        None where a stream ends with too few: the Trainer would take no step, and add them to the
        first step of the next epoch.
        """
        with collating("train_dataset"):
            batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batches) < num_batches:
            return [], None
        self._begin_step()
        return batches, items

    def _begin_step(self) -> None:
        """Begin without the micro-batches of a step that a callback broke off."""
        self._micro.clear()
        self._losses.clear()
        self._metrics.clear()
        # The Trainer empties the model's, and a level's variable may be outside it.
        self._clear_gradients()
        self._begun = self._unlogged(), self.current_flos, self.state.num_input_tokens_seen

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """In training the lower level's loss; otherwise the model's own."""
        if return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss, metrics = self.lower.evaluate(inputs)
        self._metrics.append(metrics)
        return loss

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; after a step's last one each ``.grad`` is what the variable moves by."""
        inputs = self._prepare_inputs(inputs)
        self._micro.append(MicroBatch(inputs, RandomState.capture(self._devices)))
        loss = distributed.average(super().training_step(model, inputs, *args, **kwargs))
        self._losses.append(loss)
        if self.accelerator.sync_gradients:
            try:
                self._set_gradients()
            except NonFiniteError as error:
                self._non_finite(error)
        return loss

    def _set_gradients(self) -> None:
        """Leave ∂f/∂w in the lower variables, and the hypergradient, or None, in the upper ones."""
        w = self.lower.variables
        u = () if self.upper is None else self.upper.variables
        gradient = distributed.mean([x.grad for x in (*w, *u)], (*w, *u))
        below, of_upper = gradient[: len(w)], gradient[len(w) :]
        for variable in u:
            variable.grad = None
        self.lower.require_finite(torch.stack(self._losses).sum(), below)
        self._note({f"lower_{k}": v for k, v in distributed.means(self._metrics).items()})
        if self.upper is None:
            if not self._checked:
                require_read(self.lower, below)
                self._checked = True
        else:
            self._accumulated.half = self.lower.half
            done = self.state.global_step
            number = done + done // self.args.lower_steps
            self._step.forget()
            with self.compute_loss_context_manager():
                below = self._step.record_lower(
                    list(self._micro),
                    self._micro[0].random_state,
                    (*below, *of_upper),
                    number=done + 1,
                    next_upper_batch=lambda: self._upper_batch(number),
                )
        for variable, part in zip(w, below, strict=True):
            variable.grad = part
        if self.upper is not None and (self.state.global_step + 1) % self.args.lower_steps == 0:
            self._set_hypergradient(self.upper)

    def _upper_batch(self, number: int) -> Any:
        assert self._upper_batches is not None
        return self._prepare_inputs(self._upper_batches.batch(number))

    def _set_hypergradient(self, upper: Problem) -> None:
        step = self.state.global_step + 1
        # Where the lower steps read F, they have taken a batch each.
        taken = step if self._step.requirements.upper_weight else 0
        batch = self._upper_batch(taken + step // self.args.lower_steps - 1)
        self._step.state = self._estimator_state()
        with self.compute_loss_context_manager():
            above = self._step.hypergradient(batch, number=step)
        self._kept, self._packed = self._step.state, None
        for variable, part in zip(upper.variables, above.hypergradient, strict=True):
            variable.grad = part
        limit = self.args.upper_max_grad_norm or float("inf")
        norm = float(full(self.accelerator.clip_grad_norm_(upper.variables, limit)))
        metrics = {f"upper_{key}": value for key, value in above.metrics.items()}
        own = {
            "upper_loss": above.log["upper_loss"],
            "upper_grad_norm": norm,
            "upper_learning_rate": self._learning_rate(upper),
            "implicit_ratio": above.log["implicit_ratio"],
            "residual": above.log["residual"],
        }
        self._note({**metrics, **own})

    def _non_finite(self, error: NonFiniteError) -> None:
        """Skip the step and count it, or write a checkpoint of where it began and stop."""
        self._clear_gradients()
        if self.args.non_finite == "skip":
            self.skipped += 1
            return
        step = self.state.global_step + 1
        where = f"step {step} (epoch {self.state.epoch or 0:.2f}, {len(self._micro)} micro-batches)"
        # A run that resumes at an epoch's begin draws what the epoch's begin draws.
        first = self._epoch.step == self.state.global_step
        (self._epoch if first else self._micro[0]).random_state.restore()
        unlogged, self.current_flos, self.state.num_input_tokens_seen = self._begun
        self._set_unlogged(unlogged)
        written = "no checkpoint could be written"
        with suppress(ProblemError):
            folder = Path(self.args.output_dir) / f"{checkpoint.PREFIX}{step - 1}"
            if not (folder / checkpoint.SEAL).exists():
                self._save_checkpoint(self.model, None)
            written = f"the state before it is in {folder}"
        raise NonFiniteError(f"{where}: {error}; {NON_FINITE_ADVICE}; {written}") from error

    def _clear_gradients(self) -> None:
        for level in self._levels:
            for variable in level.variables:
                variable.grad = None

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        limit = self.args.max_grad_norm
        norm: Tensor = self.accelerator.clip_grad_norm_(self.lower.variables, limit)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            grad_norm = self.accelerator.clip_grad_norm_(self.lower.variables, float("inf"))
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `transformers.Trainer.log`, with the levels' own numbers beside the loss."""
        if "loss" in logs:
            self._average_notes()
            means = {key: sum(values) / len(values) for key, values in self._noted.items()}
            if "upper_learning_rate" in self._noted:
                means["upper_learning_rate"] = self._noted["upper_learning_rate"][-1]
            if self.skipped:
                means["skipped"] = self.skipped
            logs.update({key: value for key, value in means.items() if key not in logs})
            self._noted.clear()
        if "train_loss" in logs:  # of the whole run, wherever it was resumed
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _note(self, values: Mapping[str, float | None]) -> None:
        for key, value in values.items():
            # ‖implicit‖/‖direct‖ is infinite where F does not read u itself.
            if value is not None and value != float("inf"):
                self._noted.setdefault(key, []).append(value)

    def _get_learning_rate(self) -> Any:
        """The lower level's, whose groups need not be a user's optimizer's first."""
        return self._learning_rate(self.lower)

    def _learning_rate(self, level: Problem) -> float | None:
        """That of the level's first group."""
        own = {id(variable) for variable in level.variables}
        groups = [g for g in self.optimizer.param_groups if own & {id(p) for p in g["params"]}]
        rate = groups[0]["lr"]
        return None if rate is None else float(rate)  # Adafactor may have none
