"""The plain loop over two levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm.auto import trange

from hyperopt_peft.core.chain import levels_of
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.engine import checkpoint
from hyperopt_peft.engine.step import BilevelStep, LowerStep
from hyperopt_peft.errors import NON_FINITE_ADVICE, NonFiniteError, ProblemError
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.oracle import check_ownership
from hyperopt_peft.hypergradients.registry import get_estimator
from hyperopt_peft.hypergradients.state import unpacked
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.random_state import (
    RandomState,
    host_random_state,
    restore_host_random_state,
)
from hyperopt_peft.utils.validation import require_count, require_settings

StepLog = dict[str, Any]
T = TypeVar("T")


class Engine:
    """Trains two levels: ``lower_steps`` steps of the lower one, then one of the upper one.

    Args:
        upper, lower: the levels; both need an optimizer, and they may not own the same tensor.
            ``lower`` may stand on further levels: see `Nested`.
        hypergradient: an estimator or its name, with options (``"cg:steps=20"``). Where it
            has an ``upper_weight``, each lower step takes a batch of the upper level's data too.
        lower_steps: lower steps before each upper step.
        warmup_steps: further lower steps before the very first upper step.
        seed: of the upper loss's random numbers (dropout), which are a function of it and
            the step, so that the upper level does not disturb the lower one's.
        non_finite: ``"raise"`` on a NaN or infinite loss, gradient or curvature, or
            ``"skip"`` the step and count it in ``skipped``.
        callbacks: called as ``callback(engine, record)`` after each upper step; ``stop()``
            ends the run.
        progress: whether to show a bar.

    A loss must not write to parameters through ``.data``, which autograd does not see.

    ``history`` has one record an upper step: ``step``, ``upper_loss``, ``lower_loss``,
    ``lower_grad_norm``, ``upper_grad_norm`` (of the hypergradient), ``implicit_ratio``
    (‖implicit‖/‖direct‖), ``residual`` and ``solver_steps`` (None where the estimator has none),
    ``gradients`` and ``products`` (the hypergradient's forward+backward passes and second backward
    passes), ``note``, and each level's own metrics as ``upper_…`` and ``lower_…``.

    Raises:
        ProblemError: a level without optimizer, a tensor owned by both, an unknown
            estimator or option, or (at the first step) a variable that no loss reads.
    """

    def __init__(
        self,
        upper: Problem,
        lower: Problem,
        hypergradient: str | Estimator = "cg",
        *,
        lower_steps: int = 1,
        warmup_steps: int = 0,
        seed: int = 0,
        non_finite: Literal["raise", "skip"] = "raise",
        callbacks: Sequence[Callable[[Engine, StepLog], object]] = (),
        progress: bool = True,
    ) -> None:
        check_ownership(upper, lower)
        for level in (upper, *levels_of(lower)):
            if level.optimizer is None:
                raise ProblemError(
                    f"{level.name}: the level has no optimizer; give one to train the level"
                )
        require_count("lower_steps", lower_steps, least=1)
        require_count("warmup_steps", warmup_steps, least=0)
        if non_finite not in ("raise", "skip"):
            raise ProblemError(f'non_finite must be "raise" or "skip", got {non_finite!r}')
        self.upper, self.lower = upper, lower
        self.estimator = get_estimator(hypergradient)
        self._step = BilevelStep(upper, lower, self.estimator, seed=seed)
        _require_history(self.estimator, lower_steps)
        self.lower_steps, self.warmup_steps, self.seed = lower_steps, warmup_steps, seed
        self.non_finite, self.callbacks, self.progress = non_finite, list(callbacks), progress
        self.history: list[StepLog] = []
        self.step = self.lower_step = self.skipped = 0
        self._lower_log = LowerStep(float("nan"), float("nan"), {})
        self._stopped = False

    def run(self, steps: int) -> list[StepLog]:
        """Do ``steps`` more upper steps; returns their records.

        Raises:
            NonFiniteError: see ``non_finite``; the message names the step.
            ProblemError: at the first step, a variable that no loss reads.
        """
        require_count("steps", steps, least=0)
        self._stopped = False
        begin = len(self.history)
        progress = trange(steps, disable=not self.progress, desc="upper steps")
        with progress as bar:
            if self.lower_step == 0:
                self._lower_steps(self.warmup_steps)
            for _ in bar:
                self._step.forget()
                self._lower_steps(self.lower_steps)
                record = self._guarded(self._step_upper, f"upper step {self.step + 1}")
                if record is not None:
                    losses = {key: f"{record[f'{key}_loss']:.4f}" for key in ("upper", "lower")}
                    bar.set_postfix(losses, refresh=False)
                    for callback in self.callbacks:
                        callback(self, record)
                if self._stopped:
                    break
        return self.history[begin:]

    def stop(self) -> None:
        """End the current ``run`` after this upper step."""
        self._stopped = True

    def state_dict(self) -> dict[str, Any]:
        """What a bit-identical continuation needs, as tensors and plain values.

        Not what neither level owns: a model's buffers (BatchNorm's statistics) and frozen
        weights belong into the model's own checkpoint.
        """
        return {
            "settings": self._settings(),
            "step": self.step,
            "lower_step": self.lower_step,
            "skipped": self.skipped,
            "upper": self.upper.state_dict(),
            "lower": self.lower.state_dict(),
            "estimator": self._step.state_dict(),
            "random": dict(RandomState.capture(self._step.devices).states),
            "host_random": host_random_state(),
            "history": [dict(record) for record in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Return to ``state``; nothing is changed where it does not fit.

        Raises:
            ProblemError: ``state`` is incomplete, of other levels or of other settings.
        """
        expected = {"settings", "step", "lower_step", "skipped", "upper", "lower", "random"}
        expected |= {"host_random", "history", "estimator"}
        if not isinstance(state, Mapping) or not expected <= state.keys():
            missing = sorted(expected - (state.keys() if isinstance(state, Mapping) else set()))
            raise ProblemError(f"this is not an Engine's state: it lacks {missing}")
        require_settings("the state", state["settings"], "this Engine", self._settings())
        self.upper.check_state(state["upper"])
        self.lower.check_state(state["lower"])
        unpacked(state["estimator"], self.lower.variables)  # before anything changes
        self.upper.load_state_dict(state["upper"])
        self.lower.load_state_dict(state["lower"])
        self._step.load_state_dict(state["estimator"])
        self.step, self.lower_step = state["step"], state["lower_step"]
        self.skipped = state["skipped"]
        self.history = [dict(record) for record in state["history"]]
        RandomState(state["random"]).restore()
        restore_host_random_state(state["host_random"])

    def save(self, path: str | Path) -> None:
        """Write ``state_dict()`` to the file ``path``, all or nothing, in a callback for example.

        Raises:
            ProblemError: it could not be written (a full disk); an older file is still whole.
        """
        checkpoint.write_state(Path(path), self.state_dict())

    def load(self, path: str | Path) -> None:
        """Continue from what ``save`` wrote, bit for bit; nothing in the file is executed.

        Raises:
            ProblemError: no such file, a damaged one, one with more than tensors and plain
                values, or one that ``load_state_dict`` refuses. Nothing has changed then.
        """
        self.load_state_dict(checkpoint.read_state(Path(path)))

    def _settings(self) -> dict[str, Any]:
        return {
            "hypergradient": repr(self.estimator),
            "lower_steps": self.lower_steps,
            "warmup_steps": self.warmup_steps,
            "seed": self.seed,
        }

    def _lower_steps(self, steps: int) -> None:
        for _ in range(steps):
            self._guarded(self._step_lower, f"lower step {self.lower_step + 1}")

    def _step_lower(self) -> None:
        self.lower_step += 1
        self._lower_log = self._step.train_lower(number=self.lower_step)

    def _step_upper(self) -> StepLog:
        batch = self.upper.next_batch()
        self.step += 1
        above, below = self._step.hypergradient(batch, number=self.step), self._lower_log
        norm = self.upper.step(above.hypergradient)
        record: StepLog = {
            "step": self.step,
            "lower_loss": below.loss,
            "lower_grad_norm": below.grad_norm,
            "upper_grad_norm": norm,
            **above.log,
        }
        metrics = {f"upper_{key}": value for key, value in above.metrics.items()}
        metrics |= {f"lower_{key}": value for key, value in below.metrics.items()}
        for key, value in distributed.averages(metrics).items():
            record.setdefault(key, value)
        self.history.append(record)
        return record

    def _guarded(self, step: Callable[[], T], where: str) -> T | None:
        """Do ``step``; name it in a NonFiniteError, or count it where steps may be skipped."""
        try:
            return step()
        except NonFiniteError as error:
            if self.non_finite == "raise":
                raise NonFiniteError(f"{where}: {error}; {NON_FINITE_ADVICE}") from error
            self.skipped += 1
            return None


def _require_history(estimator: Estimator, lower_steps: int) -> None:
    """Raise ProblemError where the lower steps between upper ones do not suit ``estimator``."""
    needs = estimator.requirements
    if needs.history > lower_steps:
        raise ProblemError(
            f"{estimator.name} looks back on {needs.history} lower steps, but only "
            f"lower_steps={lower_steps} come between upper steps; raise lower_steps"
        )
    if needs.every_step and needs.history < lower_steps:
        raise ProblemError(
            f"{estimator.name} carries over what each lower step did, but looks back on "
            f"{needs.history} of lower_steps={lower_steps}; give steps={lower_steps}"
        )
