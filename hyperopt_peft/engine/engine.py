"""The training loop of two levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm.auto import trange

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.engine import checkpoint
from hyperopt_peft.engine.fit import lbfgs
from hyperopt_peft.engine.step import BilevelStep, require_history
from hyperopt_peft.errors import NON_FINITE_ADVICE, NonFiniteError, ProblemError
from hyperopt_peft.hypergradients.estimate import LARGE_RESIDUAL, check_ownership
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.registry import DEFAULT, EstimatorLike, get_estimator
from hyperopt_peft.hypergradients.state import unpacked
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.random_state import RandomState
from hyperopt_peft.utils.validation import require_count, require_settings

Record = dict[str, Any]
T = TypeVar("T")
#: The entries of an Engine's state.
ENTRIES = {"settings", "step", "lower_step", "skipped", "upper", "lower", "estimator", "random"}
ENTRIES |= {"callbacks", "history"}


class Engine:
    """min over u of F(u, w*),  w*(u) = argmin over w of f(u, w): the training of two levels.

    Before each upper step u ← step(u, dF/du), the lower level takes ``lower_steps`` steps
    w ← step(w, ∂f/∂w), or is solved to its minimum. Each level has its own optimizer.

    Args:
        upper: the level with loss F and variables u.
        lower: the level with loss f and variables w; a `Nested` level in a chain.
        hypergradient: an estimator of dF/du; its name with options (``"cg:steps=20"``); or a
            solver, any function ``(matvec, b) → v`` with v ≈ [∂²f/∂w²]⁻¹ b (`get_estimator`).
        lower_steps: the number of lower steps before each upper step; or ``"minimum"``, for a small
            level with a deterministic loss and no optimizer: L-BFGS minimises each batch's loss
            until no entry of the gradient exceeds 1e-4 (`lbfgs`).
        warmup_steps: the number of additional lower steps before the first upper step.
        seed: the seed of F's random numbers (dropout). They depend only on the seed and the step,
            so that F does not affect the random numbers of f.
        non_finite: ``"raise"`` raises NonFiniteError on a NaN or infinite loss, gradient or
            curvature; ``"skip"`` omits the step and adds 1 to ``skipped``.
        callbacks: each is called as ``callback(engine, record)`` after an upper step, and may call
            ``engine.stop()``, as `EarlyStopping` does. The Engine's state includes the states of
            callbacks with ``state_dict`` and ``load_state_dict``.
        progress: whether to show a progress bar.

    ``history`` has one record for each upper step:

    - ``step``, ``upper_loss`` (F), ``lower_loss`` (f of the last lower step), both without priors;
    - ``upper_grad_norm`` (‖dF/du‖), ``lower_grad_norm`` (‖∂f/∂w‖);
    - ``implicit_ratio`` (‖implicit term‖/‖direct term‖), ``residual``, ``solver_steps`` and
      ``note`` of the estimator, None if it does not report them;
    - ``gradients`` and ``products``, the forward+backward passes and the second backward passes
      of the hypergradient;
    - the metrics of each loss as ``upper_…`` and ``lower_…``, such as ``upper_prior``.

    A loss must not write to parameters through ``.data``, which autograd does not record.

    Raises:
        ProblemError: a level has no optimizer, or has one although ``"minimum"`` would not use it;
            two variables share memory; the estimator or an option is unknown; or, at the first
            step, no loss reads a variable.

    Example:
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> upper, lower = diabetes()
        >>> engine = Engine(upper, lower, "cg", warmup_steps=100, progress=False)
        >>> history = engine.run(20)
        >>> history[-1]["upper_loss"] < history[0]["upper_loss"]
        True
    """

    def __init__(
        self,
        upper: Problem,
        lower: Problem,
        hypergradient: EstimatorLike = DEFAULT,
        *,
        lower_steps: int | Literal["minimum"] = 1,
        warmup_steps: int = 0,
        seed: int = 0,
        non_finite: Literal["raise", "skip"] = "raise",
        callbacks: Sequence[Callable[[Engine, Record], object]] = (),
        progress: bool = True,
    ) -> None:
        check_ownership(upper, lower)
        solved = lower_steps == "minimum"
        for level in (upper,) if solved else (upper, *lower.levels):
            if level.optimizer is None:
                raise ProblemError(
                    f"{level.name}: the level has no optimizer; give one to train the level"
                )
        count = 1 if lower_steps == "minimum" else lower_steps
        require_count("lower_steps", count, least=1)
        require_count("warmup_steps", warmup_steps, least=0)
        if non_finite not in ("raise", "skip"):
            raise ProblemError(f'non_finite: must be "raise" or "skip", got {non_finite!r}')
        self.upper, self.lower = upper, lower
        self.estimator = get_estimator(hypergradient)
        if solved:
            _check_solved(lower, self.estimator)
        self._step = BilevelStep(upper, lower, self.estimator, seed=seed, recorded=count)
        require_history(self.estimator, lower_steps=count, recorded=count)
        self.lower_steps, self.warmup_steps, self.seed = lower_steps, warmup_steps, seed
        self.non_finite, self.callbacks, self.progress = non_finite, list(callbacks), progress
        self.history: list[Record] = []
        self.step = self.lower_step = self.skipped = 0
        self._lower_log = math.nan, math.nan, dict[str, float]()  # of `BilevelStep.train_lower`
        self._stopped = False

    def run(self, steps: int) -> list[Record]:
        """Do ``steps`` further upper steps; returns their records.

        Raises:
            NonFiniteError: a loss, a gradient or a curvature is NaN or infinite, and
                ``non_finite`` is ``"raise"``; the message names the step.
            ProblemError: at the first step, no loss reads a variable.
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
                self._lower_steps(1 if self.lower_steps == "minimum" else self.lower_steps)
                record = self._guarded(self._step_upper, f"upper step {self.step + 1}")
                if record is not None:
                    shown = {key: f"{record[f'{key}_loss']:.4f}" for key in ("upper", "lower")}
                    if (record["residual"] or 0.0) > LARGE_RESIDUAL:
                        shown["residual"] = f"{record['residual']:.2g}"
                    bar.set_postfix(shown, refresh=False)
                    for callback in self.callbacks:
                        callback(self, record)
                if self._stopped:
                    break
        return self.history[begin:]

    def stop(self) -> None:
        """End the current ``run`` after the current upper step."""
        self._stopped = True

    def upper_snr(self) -> float | None:
        """The signal-to-noise ratio of the hypergradients since the last call (`SignalToNoise`).

        None after fewer than two upper steps, or if all hypergradients are zero. A change from
        steps of u and w counts as noise. A ratio below 1 means that the upper level follows noise,
        or is near its minimum.
        """
        return self._step.signal.read()

    def state_dict(self) -> dict[str, Any]:
        """The state for a bit-identical continuation, as tensors and plain values.

        Save buffers (BatchNorm's statistics) and frozen weights with the model: the state has only
        tensors that a level owns.
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
            "callbacks": [callback.state_dict() for callback in self._stateful],
            "history": [dict(record) for record in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a result of `state_dict`.

        Raises:
            ProblemError: ``state`` is incomplete, or belongs to other levels or settings; nothing
                has changed.
        """
        if missing := ENTRIES - (state.keys() if isinstance(state, Mapping) else set()):
            raise ProblemError(
                f"state: the entries {sorted(missing)} are missing; use a state of an Engine"
            )
        require_settings("the state", state["settings"], "this Engine", self._settings())
        if len(state["callbacks"]) != len(self._stateful):
            raise ProblemError(
                f"callbacks: the state has {len(state['callbacks'])} callbacks with a state, this "
                f"Engine has {len(self._stateful)}; give it the same callbacks"
            )
        self.upper.check_state(state["upper"])
        self.lower.check_state(state["lower"])
        unpacked(state["estimator"], self.lower.variables)  # before anything changes
        self.upper.load_state_dict(state["upper"])
        self.lower.load_state_dict(state["lower"])
        self._step.load_state_dict(state["estimator"])
        self.step, self.lower_step = state["step"], state["lower_step"]
        self.skipped = state["skipped"]
        self.history = [dict(record) for record in state["history"]]
        for callback, saved in zip(self._stateful, state["callbacks"], strict=True):
            callback.load_state_dict(saved)
        RandomState(state["random"]).restore()

    def save(self, path: str | Path) -> None:
        """Write ``state_dict()`` to the file ``path``, atomically.

        Raises:
            ProblemError: the file could not be written; an earlier file at ``path`` is unchanged.
        """
        checkpoint.write_state(Path(path), self.state_dict())

    def load(self, path: str | Path) -> None:
        """Restore the state from a file by `save`, without executing code.

        Raises:
            ProblemError: the file does not exist, is damaged, or has objects other than tensors
                and plain values; or as `load_state_dict`. Nothing has changed.
        """
        self.load_state_dict(checkpoint.read_state(Path(path)))

    def _settings(self) -> dict[str, Any]:
        return {
            "hypergradient": repr(self.estimator),
            "lower_steps": self.lower_steps,
            "warmup_steps": self.warmup_steps,
            "seed": self.seed,
        }

    @property
    def _stateful(self) -> list[Any]:
        """The callbacks with a state."""
        return [callback for callback in self.callbacks if hasattr(callback, "load_state_dict")]

    def _lower_steps(self, steps: int) -> None:
        for _ in range(steps):
            self._guarded(self._step_lower, f"lower step {self.lower_step + 1}")

    def _step_lower(self) -> None:
        self.lower_step += 1
        solved = self.lower_steps == "minimum"
        if solved:
            lbfgs(self.lower, self.lower.peek_batch())
        self._lower_log = self._step.train_lower(solved=solved)

    def _step_upper(self) -> Record:
        batch = self.upper.next_batch()
        self.step += 1
        upper = self._step.hypergradient(batch, number=self.step)
        lower_loss, lower_norm, lower_metrics = self._lower_log
        norm = self.upper.step(upper.hypergradient, upper.grad_norm)
        record: Record = {
            "step": self.step,
            "lower_loss": lower_loss,
            "lower_grad_norm": lower_norm,
            "upper_grad_norm": norm,
            **upper.log,
        }
        metrics = {f"upper_{key}": value for key, value in upper.metrics.items()}
        metrics |= {f"lower_{key}": value for key, value in lower_metrics.items()}
        for key, value in distributed.averages(metrics).items():
            record.setdefault(key, value)
        self.history.append(record)
        return record

    def _guarded(self, step: Callable[[], T], where: str) -> T | None:
        """Do ``step``; add ``where`` to a NonFiniteError, or count the step in ``skipped``."""
        try:
            return step()
        except NonFiniteError as error:
            if self.non_finite == "raise":
                raise NonFiniteError(f"{where}: {error}; {NON_FINITE_ADVICE}") from error
            self.skipped += 1
            return None


def _check_solved(lower: Problem, estimator: Estimator) -> None:
    """Raise ProblemError if ``lower`` or ``estimator`` needs optimizer steps of the lower level."""
    where = 'lower_steps="minimum"'
    lower.require_single(f"{where} solves one level; give a number of steps")
    if lower.optimizer is not None:
        raise ProblemError(
            f"{lower.name}: {where} does not use the level's optimizer; remove the optimizer, or "
            "give a number of steps"
        )
    if estimator.requirements.optimizer_state:
        raise ProblemError(
            f"{estimator.name}: needs steps of the lower optimizer, and {where} takes none; choose "
            'a solver, such as "minres"'
        )
