"""The plain loop over two levels."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm.auto import trange

from hyperopt_peft.core.optimizer import read_by_options
from hyperopt_peft.core.problem import Problem, Step, devices_of, owned, require_read
from hyperopt_peft.engine import checkpoint
from hyperopt_peft.engine.upper_share import with_upper_share
from hyperopt_peft.errors import NON_FINITE_ADVICE, NonFiniteError, ProblemError
from hyperopt_peft.hypergradients.estimate import check_estimator, estimate, like
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.oracle import Oracle, State, check_ownership
from hyperopt_peft.hypergradients.registry import get_estimator
from hyperopt_peft.hypergradients.state import packed, unpacked
from hyperopt_peft.utils import distributed, versions
from hyperopt_peft.utils.random_state import (
    RandomState,
    host_random_state,
    restore_host_random_state,
)
from hyperopt_peft.utils.restore import Copies
from hyperopt_peft.utils.validation import require_count, require_settings

Record = dict[str, Any]
T = TypeVar("T")


class Engine:
    """Trains two levels: ``lower_steps`` steps of the lower one, then one of the upper one.

    Args:
        upper, lower: the levels; both need an optimizer, and they may not own the same tensor.
            ``lower`` may stand on further levels: see `Nested`.
        hypergradient: an estimator or its name, with options (``"cg:steps=20"``). Where it has an
            ``upper_share``, each lower step takes a batch of the upper level's data too.
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
    ``lower_gradient_norm``, ``hypergradient_norm``, ``implicit_ratio`` (‖implicit‖/‖direct‖),
    ``residual`` and ``solver_steps`` (None where the estimator has none), ``gradients`` and
    ``products`` (the hypergradient's forward+backward passes and second backward passes),
    ``note``, and each level's own metrics as ``upper_…`` and ``lower_…``.

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
        callbacks: Sequence[Callable[[Engine, Record], object]] = (),
        progress: bool = True,
    ) -> None:
        check_ownership(upper, lower)
        for level in (upper, *lower.levels):
            if level.optimizer is None:
                raise ProblemError(f"{level.name}: give the level an optimizer to train it")
        require_count("lower_steps", lower_steps, least=1)
        require_count("warmup_steps", warmup_steps, least=0)
        if non_finite not in ("raise", "skip"):
            raise ProblemError(f'non_finite must be "raise" or "skip", got {non_finite!r}')
        self.upper, self.lower = upper, lower
        self.estimator = get_estimator(hypergradient)
        check_estimator(self.estimator, upper, lower)
        if self.estimator.history > lower_steps:
            raise ProblemError(
                f"{self.estimator.name} looks back on {self.estimator.history} lower steps, but "
                f"only lower_steps={lower_steps} come between upper steps; raise lower_steps"
            )
        if self.estimator.needs_every_step and self.estimator.history < lower_steps:
            raise ProblemError(
                f"{self.estimator.name} carries over what each lower step did, but looks back on "
                f"{self.estimator.history} of lower_steps={lower_steps}; give steps={lower_steps}"
            )
        self.lower_steps, self.warmup_steps, self.seed = lower_steps, warmup_steps, seed
        self.non_finite, self.callbacks, self.progress = non_finite, list(callbacks), progress
        self.history: list[Record] = []
        self.step = self.lower_step = self.skipped = 0
        self._devices = devices_of(upper, lower)
        self._recent: deque[Step] = deque(maxlen=max(1, self.estimator.history))
        self._copies = Copies()
        self._state: State = {}  # the estimator's own
        self._lower_loss = self._lower_norm = float("nan")
        self._lower_metrics: dict[str, float] = {}
        self._lower_read = self._upper_read = False  # whether it was checked that losses read all
        self._unread: set[str] = set()  # upper variables that f does not read
        self._stopped = False

    def run(self, steps: int) -> list[Record]:
        """Do ``steps`` more upper steps; returns their records.

        Raises:
            NonFiniteError: see ``non_finite``; the message names the step.
            ProblemError: at the first step, a variable that no loss reads.
        """
        require_count("steps", steps, least=0)
        self._stopped = False
        begin = len(self.history)
        progress = trange(steps, disable=not self.progress, desc="upper steps")
        variables = owned(self.upper, self.lower)
        # Callbacks may write to parameters in any way.
        whole_run = nullcontext() if self.callbacks else versions.tracked(variables)
        with progress as bar, whole_run:
            if self.lower_step == 0:
                self._lower_steps(self.warmup_steps)
            for _ in bar:
                while self._recent:
                    self._forget()
                with versions.tracked(variables):
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
            "estimator": packed(self._state),
            "random": dict(RandomState.capture(self._devices).states),
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
        kept = unpacked(state["estimator"], self.lower.variables)
        self.upper.load_state_dict(state["upper"])
        self.lower.load_state_dict(state["lower"])
        self._state = kept
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
        self.lower.prepare()
        first = not self._lower_read
        w, u = self.lower.variables, self.upper.variables
        batch = self.lower.next_batch()
        random_state = RandomState.capture(self._devices)
        self.lower_step += 1
        both = self.estimator.reuses_lower_gradient or first
        evaluation = self.lower.gradient(batch, (*w, *u) if both else w)
        gradient = evaluation.gradient
        if first:
            require_read(self.lower, gradient[: len(w)])
            options = read_by_options(self.lower)
            pairs = zip(self.upper.names, u, gradient[len(w) :], strict=True)
            self._unread = {n for n, x, g in pairs if g is None and id(x) not in options}
            self._lower_read = True
        descent = gradient[: len(w)]
        if share := self.estimator.upper_share:
            own = RandomState.seeded(
                self._devices, self.seed, "lower step", self.lower_step, *distributed.own()
            )
            above = self.upper.next_batch()
            descent = with_upper_share(descent, share, self.upper, self.lower, above, own)
        step = Step(batch, random_state)
        if self.estimator.history:
            unroll = self.estimator.needs_optimizer_state
            # torch's Nesterov step over many tensors at once writes to the gradient.
            kept = [g if g is None else g.clone() for g in descent if unroll]
            step = Step(
                batch,
                random_state,
                variables=self._copies.take(w),
                gradient=tuple(kept),
                upper_gradient=gradient[len(w) :] if both else None,
                optimizer=self.lower.optimizer_snapshot(with_state=unroll),
            )
        self._lower_norm = self.lower.step(descent)
        self._lower_loss, self._lower_metrics = evaluation.loss, evaluation.metrics
        if len(self._recent) == self._recent.maxlen:
            self._forget()
        self._recent.append(step)

    def _forget(self) -> None:
        """Drop the oldest of the recent lower steps."""
        step = self._recent.popleft()
        if step.variables:
            self._copies.give_back(step.variables)

    def _step_upper(self) -> Record:
        upper_batch = self.upper.next_batch()
        self.step += 1
        if not self._recent:
            raise NonFiniteError("no lower step was possible since the last upper step")
        last = self._recent[-1]
        oracle = Oracle(
            self.upper,
            self.lower,
            upper_batch,
            last.batch,
            upper_random=RandomState.seeded(
                self._devices, self.seed, self.step, *distributed.own()
            ),
            lower_random=last.random_state,
            history=list(self._recent) if self.estimator.history else (),
            copies=self._copies,
            state=self._state,
        )
        result = estimate(oracle, self.estimator)
        self._state = result.state
        if not self._upper_read:
            direct = oracle.upper_gradient.evaluation.gradient[: len(self.upper.variables)]
            require_read(self.upper, direct, besides=self._unread)
            self._upper_read = True
        norm = self.upper.step(like(result.hypergradient, self.upper.variables))
        above = oracle.upper_gradient.evaluation
        record: Record = {
            "step": self.step,
            "upper_loss": above.loss,
            "lower_loss": self._lower_loss,
            "lower_gradient_norm": self._lower_norm,
            "hypergradient_norm": norm,
            "implicit_ratio": result.implicit_ratio,
            "residual": result.residual,
            "solver_steps": result.steps,
            "gradients": oracle.passes.gradients,
            "products": oracle.passes.products,
            "note": result.note,
        }
        metrics = {f"upper_{key}": value for key, value in above.metrics.items()}
        metrics |= {f"lower_{key}": value for key, value in self._lower_metrics.items()}
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
