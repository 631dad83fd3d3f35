"""A callback that ends an `Engine`'s run when the upper level begins to overfit its rows."""

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
    """A callback of `Engine` that ends the run when F on held-out rows no longer falls.

    After every ``every``-th upper step, the record of the step gets

    - ``held_out_loss``: F without the prior, the mean over the batches ``held_out``;
    - ``upper_gap``: ``held_out_loss`` minus the mean ``upper_loss`` of the last ``every`` steps;
    - ``upper_snr``: `Engine.upper_snr` of these steps.

    After ``patience`` evaluations without a smaller ``held_out_loss`` the run ends, and the
    variables of all levels are restored to the best evaluation. After a run that ends earlier,
    `restore` does this. The optimizers are not restored. In a Trainer use Transformers'
    ``EarlyStoppingCallback`` on ``eval_dataset`` with ``load_best_model_at_end``.

    Args:
        held_out: a re-iterable of batches of rows that no level trains on. Each process has its own
            batches.
        every: the number of upper steps from one evaluation to the next.
        patience: the number of evaluations without improvement that ends the run.

    Raises:
        ProblemError: ``held_out`` is empty or can be iterated only once, or a number is below 1.

    Example:
        >>> from hyperopt_peft import Engine
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> stopping = EarlyStopping([None], every=2)  # this loss ignores its batch
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
        """Evaluate after every ``every``-th upper step, and end the run if F no longer falls."""
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
        """Restore all variables to the evaluation with the smallest ``held_out_loss``.

        Raises:
            ProblemError: there was no evaluation.
        """
        if not self._values:
            raise ProblemError(
                f"held_out: no evaluation so far; run for at least {self.every} upper steps"
            )
        assign_(variables_of(engine.upper, engine.lower), self._values)

    def state_dict(self) -> dict[str, Any]:
        """The best loss, its step and variables, and the number of evaluations since."""
        numbers = {"best": self.best, "best_step": self.best_step, "failures": self.failures}
        return {**numbers, "values": [value.clone() for value in self._values]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a result of `state_dict`."""
        self.best, self.best_step = state["best"], state["best_step"]
        self.failures = state["failures"]
        self._values = [value.clone() for value in state["values"]]


def held_out_loss(
    upper: Problem, lower: Problem, batches: Iterable[Any], *, seed: int = 0
) -> float:
    """The mean of F without its prior over ``batches`` and the processes; nothing changes.

    Dropout masks are a function of ``seed``, so that only the variables change the result.
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
