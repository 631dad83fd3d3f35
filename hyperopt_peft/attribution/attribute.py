"""`attribute`: how helpful or harmful each training row is on evaluation rows."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import Tensor
from transformers import Trainer

from hyperopt_peft.attribution.head import trained_head
from hyperopt_peft.attribution.level import trained_level
from hyperopt_peft.attribution.result import Attribution
from hyperopt_peft.attribution.rows import Rows, TrainerData
from hyperopt_peft.attribution.scores import HEAD_ESTIMATOR, Loss, parse_estimator
from hyperopt_peft.attribution.trainer import trained_by_trainer
from hyperopt_peft.core.labels import RowLosses
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.utils.autograd import uncompiled


@uncompiled()  # steps of the run are done again, with their dropout masks
def attribute(
    training: Problem | Trainer,
    row_weights: Tensor | None = None,
    evaluation: Loss | Rows | None = None,
    *,
    model: Literal["adapter", "head"] = "adapter",
    row_losses: RowLosses | None = None,
    estimator: str | Estimator | None = None,
    training_steps: int | None = None,
    memory_limit: float = 1.0,
    progress: bool = True,
) -> Attribution:
    """Train, and score each training row by its influence on the evaluation loss Φ.

        s_i = dΦ(w_T(v))/dv_i   at v = 1

    v_i is the weight of row i in the training loss. If s_i > 0, row i is harmful: more weight
    raises Φ. Leaving the row out changes Φ by about −s_i. To find wrong labels, see
    `Attribution.suspects`. Call `Attribution.check` before relying on the scores: after a rough run
    (high learning rate, small batches) they predict little.

    Estimators, by name with their options:

    * ``"unrolled"``: differentiates every step of the run, with its batches, order, dropout masks
      and schedule (MAGIC, arXiv:2504.16430); ``"unrolled:steps=50"`` only the last 50.
    * ``"minres:damping=0.01"``, ``"cg:…"``, ``"nystrom:…"`` and the other implicit solvers: an
      influence function at the end of the run (Koh & Liang 2017, arXiv:1703.04730), with the
      Hessian of the mean loss over all training rows.
    * ``"gradient"``: s_i = −⟨∂Φ/∂w, ∂ℓ_i/∂w⟩/n at the end, by two forward passes over all rows.

    With a Trainer, ``model="head"`` trains a linear head on features from the Trainer's model in
    its present state, and scores the rows for this head, in seconds. The head is at the minimum of
    a convex loss, so an implicit solver's scores are exact to its tolerance.

    Args:
        training: is trained: a level of your own with data and optimizer, a `transformers.Trainer`,
            or a `BilevelTrainer` with a `Method` without upper level. A Trainer must not have
            trained yet, unless it has ``model_init``. It calls no callback, and evaluates, logs and
            saves nothing.
        row_weights: for a level only: v, ones ``(n,)``, a leaf that requires a gradient. The loss
            must be 1/B Σ v_i ℓ_i over the rows of a batch.
        evaluation: for a level, a function that returns Φ, or a list of functions whose sum is Φ.
            For a Trainer, a data set; by default its ``eval_dataset``.
        row_losses: for a Trainer whose loss is the user's own, a function of (model, batch) that
            returns the losses of rows, as for `BilevelTrainer`; a head reads it too, on batches of
            ``features`` and ``labels``. Without it such a loss is refused.
        estimator: see above; by default ``"unrolled"``, and ``"cg"`` for a head.
        training_steps: for a level only: the number T of steps.
        memory_limit: the memory in GiB that checkpoints of the run may take; see `Run`.

    Raises:
        ProblemError: there are no rows to train on or to evaluate; the loss does not read the
            weights, or there is not one per row; the estimator is unknown; for ``"unrolled"``, the
            optimizer has no known derivative, or checkpoints take more memory than the limit.
        NonFiniteError: a loss, a gradient or a score is NaN or infinite.

    Example:
        Two rows pull w to 1, one row pulls it to −5; Φ is least at w = 1.

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
    of_level = isinstance(training, Problem)
    parsed = parse_estimator(estimator or (HEAD_ESTIMATOR if on_head else "unrolled"))
    if on_head and parsed.differentiates_run:
        raise ProblemError("estimator: a head has no steps; choose cg, or leave it out")
    if of_level and on_head:
        raise ProblemError("model: a head needs a Trainer; leave it out")
    if of_level and row_losses is not None:
        raise ProblemError("row_losses: a level has a loss of its own; leave row_losses out")
    if not of_level and (row_weights is not None or training_steps is not None):
        raise ProblemError(
            "row_weights, training_steps: only for a Problem, the level that is trained; "
            "a Trainer sets them itself, so leave them out"
        )
    options: dict[str, Any] = {
        "differentiated": parsed.differentiates_run,
        "memory_limit": memory_limit,
        "progress": progress,
    }
    if isinstance(training, Problem):
        phi = cast(Loss, evaluation)
        trained = trained_level(training, row_weights, phi, training_steps, **options)
    else:
        data = TrainerData(training, cast(Rows | None, evaluation), row_losses)
        options["twice"] = parsed.estimator.requirements.second_derivatives
        trained = trained_head(data, progress) if on_head else trained_by_trainer(data, **options)
    return Attribution.of(trained, parsed)
