"""`attribute`: how much each training row helps or hurts on the rows that a user cares about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from hyperopt_peft.attribution.estimators import (
    HEAD_ESTIMATOR,
    parse_estimator,
    require_known_derivative,
)
from hyperopt_peft.attribution.levels import setup_from_levels
from hyperopt_peft.attribution.result import Attribution
from hyperopt_peft.attribution.scores import scores
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.engine.engine import Engine
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.utils.autograd import uncompiled


@uncompiled()  # steps of the run are done again, with their dropout masks
def attribute(
    training: Any,
    row_weights: Tensor | None = None,
    evaluation: Any = None,
    *,
    model: Literal["adapter", "head"] = "adapter",
    estimator: str | Estimator | None = None,
    training_steps: int | None = None,
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

    Estimators, by name with their options:

    * ``"unrolled"``: through every step of the run, with its batches, order, dropout masks and
      schedule (MAGIC, arXiv:2504.16430). ``"unrolled:steps=50"`` differentiates the last 50 alone.
    * ``"minres:damping=0.01"``, ``"cg:…"``, ``"nystrom:…"`` and the other implicit solvers: an
      influence function at the end of the run (Koh & Liang 2017, arXiv:1703.04730), with the
      Hessian of the mean loss over all training rows.
    * ``"gradient"``: s_i = −⟨∂Φ/∂w, ∂ℓ_i/∂w⟩/n at the end, by two forward passes over all rows.

    With a Trainer, ``model="head"`` gives the scores of another training, in seconds: that of a
    linear head on the features that the Trainer's model, as it is, makes of the rows. The head is
    at the minimum of a convex loss, so that an implicit solver's scores are exact to a tolerance.

    A bilevel run has rows at both levels, and a score for each, by ``"unrolled"``. Its upper level
    moves along ∂F/∂u (``hypergradient="direct"``), whose derivative is known.

    Args:
        training: a level of one's own with data and optimizer; an `Engine` with two of them; or a
            `transformers.Trainer`, or a `BilevelTrainer` with a `Method`, that has not trained yet
            (or a Trainer with ``model_init``, which begins anew). It is trained. A Trainer calls
            no callback, and evaluates, logs and saves nothing.
        row_weights: of levels, v: ones ``(n,)``, a leaf that requires a gradient, which the loss of
            each level reads: 1/B Σ v_i ℓ_i over the rows of a batch. A Trainer needs none.
        evaluation: for levels, a function that returns Φ, a list of functions whose sum is Φ, or a
            mapping of these from the names of slices, whose mean is the whole Φ. For a Trainer, a
            data set; by default its ``eval_dataset``.
        model: what is trained, the Trainer's adapter or a head on its features.
        estimator: how, as above; by default ``"unrolled"``, and for a head ``"cg"``.
        training_steps: the number T of a level's steps, or an Engine's upper steps.
        slices: a column of a Trainer's evaluation rows that groups them: a Φ for each value, all
            from one run.
        memory_limit: the memory in GiB that checkpoints of the run may take; see `Run`.
        progress: whether to show progress bars.

    Raises:
        ProblemError: no rows to train on or to evaluate; weights that the loss does not read, or
            that are not one a row; an unknown estimator; for ``"unrolled"``, an optimizer without
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
        >>> phi = lambda: (w - 1).square()
        >>> result = attribute(lower, v, phi, training_steps=50, progress=False)
        >>> [round(x, 2) for x in result.scores.tolist()]
        [-2.67, -2.67, 5.33]
    """
    if model not in ("adapter", "head"):
        raise ProblemError(f"model: must be adapter or head, got {model!r}")
    on_head = model == "head"
    parsed = parse_estimator(estimator or (HEAD_ESTIMATOR if on_head else "unrolled"))
    if on_head and parsed.differentiates_run:
        raise ProblemError("estimator: a head has no steps; choose cg, or leave it out")
    of_levels = isinstance(training, Problem | Engine)
    if of_levels and (slices is not None or on_head):
        raise ProblemError("slices, model: are of a Trainer; give a level a mapping of functions")
    if not of_levels and (row_weights is not None or training_steps is not None):
        raise ProblemError(
            "row_weights, training_steps: a Trainer has rows and steps of its own; leave them out"
        )
    if not on_head and getattr(training, "upper", None) is not None:
        require_known_derivative(training, parsed.differentiates_run)
    options: dict[str, Any] = {
        "differentiated": parsed.differentiates_run,
        "memory_limit": memory_limit,
        "progress": progress,
    }
    if of_levels:
        setup = setup_from_levels(training, row_weights, evaluation, training_steps, **options)
    elif on_head:
        from hyperopt_peft.attribution.head import setup_from_head

        setup = setup_from_head(training, evaluation, slices, progress=progress)
    else:
        from hyperopt_peft.attribution.trainer import setup_from_trainer

        exact = parsed.estimator.requirements.second_derivatives
        setup = setup_from_trainer(training, evaluation, slices, twice=exact, **options)
    setup = replace(setup, progress=progress)
    by_slice, cost = scores(setup, parsed)
    run = setup.run
    unseen = run.visits == 0
    by_slice = {name: s.masked_fill(unseen, torch.nan) for name, s in by_slice.items()}
    settings = {
        "estimator": parsed.name,
        "steps": len(run.steps),
        "rows": len(run.row_weights),
        "unseen": int(unseen.sum()),
        "variables": sum(v.numel() for v in run.variables),
        **run.settings,
        "model": model,
        **cost,
    }
    return Attribution(
        setup.total(by_slice),
        by_slice,
        run.losses / run.visits,
        setup.evaluation.values(),
        settings,
        setup.columns,
        _setup=setup,
        _estimator=parsed,
    )
