"""`attribute`: how much each training row helps or hurts on the rows that a user cares about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hyperopt_peft.attribution.evaluation import Evaluation, Loss
from hyperopt_peft.attribution.methods import Method, Setting, scores
from hyperopt_peft.attribution.result import Attribution
from hyperopt_peft.attribution.run import train
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.engine.engine import Engine
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.unrolled.direct import Direct
from hyperopt_peft.trainer.accumulation import Accumulated, MicroBatch
from hyperopt_peft.utils.random_state import RandomState, replay


def attribute(
    training: Any,
    row_weights: Tensor | None = None,
    evaluation: Any = None,
    *,
    method: str | Estimator = "unrolled",
    steps: int | None = None,
    slices: str | None = None,
    memory_limit: float = 1.0,
    progress: bool = True,
) -> Attribution:
    """Train, and score each training row by its influence on the evaluation loss Φ.

        s_i = dΦ(w_T(v))/dv_i   at v = 1

    v_i is the weight of row i in the training loss. A positive score says that Φ rises where the
    row counts more: the row hurts. Leaving the row out changes Φ by about −s_i. The scores answer
    no other question: for wrong labels see `Attribution.suspects`. Call `Attribution.check` before
    relying on them: a rough run (high rate, small batches) has scores that predict little.

    Methods, by the name of an estimator with its options:

    * ``"unrolled"``: through every step of the run, with its batches, order, dropout masks and
      schedule (MAGIC, arXiv:2504.16430). ``"unrolled:steps=50"`` takes the last 50 alone.
    * ``"minres:damping=0.01"``, ``"cg:…"``, ``"nystrom:…"`` and the other implicit solvers: an
      influence function at the end of the run (Koh & Liang 2017, arXiv:1703.04730), with the
      Hessian of the mean loss over all training rows.
    * ``"gradient"``: the product of gradients at the end; ``"gradient:checkpoints=5"`` is TracIn.

    A bilevel run has rows at both levels, and a score for each, by ``"unrolled"``. Its upper level
    moves along ∂F/∂u (``hypergradient="direct"``), whose derivative is known; the derivatives of
    other estimators are not.

    Args:
        training: a level of one's own with data and optimizer; an `Engine` with two of them; or a
            `transformers.Trainer` or a `BiDoRATrainer` that has not trained yet (or a Trainer with
            ``model_init``, which begins anew). It is trained. Callbacks are not called, and
            nothing is evaluated, logged or saved.
        row_weights: of levels, v: ones ``(n,)``, a leaf that requires a gradient, which the loss of
            each level reads: 1/B Σ v_i ℓ_i over the rows of a batch. A Trainer needs none.
        evaluation: of levels, a function that returns Φ, a list of functions whose sum is Φ, or a
            mapping of these from the names of slices, whose mean is the whole Φ. Of a Trainer, a
            data set; by default its ``eval_dataset``.
        method: how, as above.
        steps: of a level, the number of steps T; of an Engine, of upper steps; of a Trainer, None.
        slices: of a Trainer, the column of ``evaluation`` that groups its rows: a Φ for each
            value, all from one run.
        memory_limit: the memory in GiB that checkpoints of the run may take; see `Run`.
        progress: whether to show progress bars.

    Raises:
        ProblemError: no rows to train on or to evaluate; weights that the loss does not read, or
            that are not one a row; an unknown method; for ``"unrolled"``, an optimizer without
            a known derivative, or more memory than the limit.
        NonFiniteError: a loss, a gradient or a score is NaN or infinite.

    Example:
        Two rows pull w to 1, one to −5; Φ wants w = 1.

        >>> import torch
        >>> targets = torch.tensor([1.0, 1.0, -5.0])
        >>> v, w = torch.ones(3, requires_grad=True), torch.zeros((), requires_grad=True)
        >>> class Fit(Problem):
        ...     def loss(self, batch):
        ...         return (v * (w - targets).square()).mean()
        >>> lower = Fit([w], optimizer=torch.optim.SGD([w], lr=0.1))
        >>> result = attribute(lower, v, lambda: (w - 1).square(), steps=50, progress=False)
        >>> [round(x, 2) for x in result.scores.tolist()]
        [-2.67, -2.67, 5.33]
    """
    how = Method.of(method)
    bilevel = isinstance(training, Engine) or getattr(training, "upper", None) is not None
    if bilevel:
        _check_bilevel(training, how)
    if isinstance(training, Problem | Engine):
        if slices is not None:
            raise ProblemError("slices: is of a Trainer; give a level a mapping of functions")
        setting = _of_levels(
            training, row_weights, evaluation, steps, memory_limit, how.points, progress
        )
        rows: Any = None
    else:
        from hyperopt_peft.attribution.trainer import of_trainer

        if row_weights is not None or steps is not None:
            raise ProblemError(
                "row_weights, steps: a Trainer has rows and steps of its own; leave them out"
            )
        setting, rows = of_trainer(
            training,
            evaluation,
            slices,
            second_derivatives=how.estimator.requirements.second_derivatives,
            points=how.points,
            memory_limit=memory_limit,
            progress=progress,
        )
    by_slice, report = scores(setting, how, setting.run.checkpoints, progress=progress)
    return Attribution.of(setting, how, by_slice, report, rows)


def _check_bilevel(training: Any, method: Method) -> None:
    """Raise ProblemError for a run of two levels that is not known here."""
    if not method.whole_run:
        raise ProblemError(
            "method: a bilevel run is at the minimum of no single loss at its end; choose unrolled"
        )
    if not isinstance(training.estimator, Direct):
        raise ProblemError(
            f"hypergradient: the derivative of {training.estimator.name} is not known; give a "
            'bilevel run hypergradient="direct", or attribute the training of one level'
        )


def _of_levels(
    training: Problem | Engine,
    weights: Tensor | None,
    evaluation: Loss | Mapping[str, Loss] | None,
    steps: int | None,
    memory_limit: float,
    points: int | None,
    progress: bool,
) -> Setting:
    leaf = isinstance(weights, Tensor) and weights.dim() == 1 and weights.is_leaf
    if weights is None or not leaf or not weights.requires_grad or len(weights) == 0:
        raise ProblemError(
            "row_weights: must be a leaf tensor (n,) that requires a gradient, with a weight for "
            "each training row; use torch.ones(n, requires_grad=True)"
        )
    if evaluation is None:
        raise ProblemError("evaluation: give a function that returns the loss to explain")
    if not isinstance(steps, int) or steps < 1:
        raise ProblemError(f"steps: must be the number of steps to train, from 1, got {steps}")
    above = Evaluation(weights, evaluation)
    if isinstance(training, Problem):
        levels, order, seed = [training], [0] * steps, 0
    else:
        if training.lower_step:
            raise ProblemError(
                "training: the Engine has trained already, and the run has to begin where it "
                "began; give a new one"
            )
        levels, seed = [training.lower, training.upper], training.seed
        order = [0] * training.warmup_steps + ([0] * training.lower_steps + [1]) * steps
    run = train(
        levels,
        weights,
        order,
        seed=seed,
        memory_limit=memory_limit,
        points=points,
        progress=progress,
    )
    shares = {name: 1 / len(above.slices) for name in above.slices}
    return Setting(run, above, shares, Accumulated(levels[0]), lambda: _epoch(levels[0]))


def _epoch(level: Problem) -> Sequence[MicroBatch]:
    """One pass over the data of ``level``, each batch with random numbers of its own."""
    data: Any = [None] if level.batches is None else level.batches.data
    with replay(RandomState.capture()):
        batches = [level.on_device(batch) for batch in data]
    return [
        MicroBatch(batch, RandomState.seeded(level.devices, "attribution", number))
        for number, batch in enumerate(batches)
    ]
