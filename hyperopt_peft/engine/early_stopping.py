"""The end of an `Engine`'s run where the upper level begins to overfit its rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hyperopt_peft.core.data import require_batches
from hyperopt_peft.core.problem import Problem, devices_of, variables_of
from hyperopt_peft.engine.step import prior_of
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.restore import assign_, preserve_state
from hyperopt_peft.utils.validation import require_count

if TYPE_CHECKING:
    from hyperopt_peft.engine.engine import Engine


class EarlyStopping:
    """A callback of `Engine` that ends the run where F on held-out rows no longer falls.

    After every ``every``-th upper step, the record of the step gets

    - ``held_out_loss``: F without the prior, the mean over the batches ``held_out``;
    - ``upper_gap``: ``held_out_loss`` minus the mean ``upper_loss`` of the last ``every`` steps;
    - ``upper_snr``: `Engine.upper_snr` of these steps.

    After ``patience`` evaluations without a smaller ``held_out_loss`` the run ends, with the
    variables of all levels as they were at the smallest one. A run that ends earlier has the
    variables of its last step; `restore` returns to the best ones. The optimizers are not restored.

    In a Trainer the same idea is Transformers' ``EarlyStoppingCallback`` on ``eval_dataset`` with
    ``load_best_model_at_end``.

    Args:
        held_out: an iterable of batches that can be iterated again, of rows that no level trains
            on. Several processes each have batches of their own.
        every: the number of upper steps from one evaluation to the next.
        patience: the number of evaluations without improvement that ends the run.

    Raises:
        ProblemError: ``held_out`` is empty or can be iterated only once, or a number is below 1.

    Example:
        >>> from hyperopt_peft import Engine
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> stopping = EarlyStopping([None], every=2)  # a batch of a loss that has its rows
        >>> engine = Engine(*diabetes(), callbacks=[stopping], progress=False)
        >>> [step["step"] for step in engine.run(5) if "held_out_loss" in step]
        [2, 4]
    """

    def __init__(self, held_out: Iterable[Any], *, every: int = 10, patience: int = 5) -> None:
        require_batches("held_out", held_out)
        require_count("every", every, least=1)
        require_count("patience", patience, least=1)
        self.held_out, self.every, self.patience = held_out, every, patience
        self.best, self.best_step, self.failures = math.inf, 0, 0
        self._values: list[Tensor] = []

    def __call__(self, engine: Engine, record: dict[str, Any]) -> None:
        """Evaluate after every ``every``-th upper step, and end the run where F has not fallen."""
        if record["step"] % self.every:
            return
        loss = held_out_loss(engine.upper, engine.lower, self.held_out, seed=engine.seed)
        window = [step["upper_loss"] for step in engine.history[-self.every :]]
        record["held_out_loss"] = loss
        record["upper_gap"] = loss - sum(window) / len(window)
        record["upper_snr"] = engine.upper_snr()
        if loss < self.best:
            self.best, self.best_step, self.failures = loss, record["step"], 0
            self._values = [x.detach().clone() for x in variables_of(engine.upper, engine.lower)]
            return
        self.failures += 1
        if self.failures >= self.patience:
            self.restore(engine)
            engine.stop()

    def restore(self, engine: Engine) -> None:
        """Move all variables to where ``held_out_loss`` was smallest.

        Raises:
            ProblemError: there was no evaluation.
        """
        if not self._values:
            raise ProblemError(
                f"held_out: no evaluation so far; run for at least {self.every} upper steps"
            )
        assign_(variables_of(engine.upper, engine.lower), self._values)

    def state_dict(self) -> dict[str, Any]:
        """The best loss, its step and variables, and the evaluations since."""
        numbers = {"best": self.best, "best_step": self.best_step, "failures": self.failures}
        return {**numbers, "values": [value.clone() for value in self._values]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``, of `state_dict`."""
        self.best, self.best_step = state["best"], state["best_step"]
        self.failures = state["failures"]
        self._values = [value.clone() for value in state["values"]]


def held_out_loss(
    upper: Problem, lower: Problem, batches: Iterable[Any], *, seed: int = 0
) -> float:
    """F without its prior, the mean over ``batches`` and the processes; nothing changes.

    Dropout masks are a function of ``seed``, so that two losses differ by the variables alone.

    Raises:
        ProblemError: there are no batches.
        NonFiniteError: F is NaN or infinite.
    """
    devices, losses = devices_of(upper, lower), []
    with (
        preserve_state(variables_of(upper, lower), devices) as buffers,
        replay(RandomState.seeded(devices, seed, "held out")),
    ):
        for batch in batches:
            # A distributed model's reducers expect a backward pass after a forward pass.
            evaluation = upper.gradient(upper.on_device(batch), upper.variables)
            losses.append(evaluation.loss - prior_of(upper, evaluation.metrics))
            buffers.restore()
    if not losses:
        raise ProblemError("held_out: there are no batches; give at least one")
    return sum(losses) / len(losses)
