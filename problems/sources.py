"""Weights of data sources, learned on trusted rows.

    upper: min over u   L(w*(u); trusted rows) + ½·τ·mean‖u‖²
    lower: w*(u) = argmin over the adapter w   Σ_k p_k L_k(w),   p = softmax(u)

L_k is the mean loss of source k over its n_k labels. The trusted rows are the last source. Each
label of source k has the weight v_k = p_k·N/n_k in the mean over all N labels. The mean weight is
1, so that the weights cannot act as a learning rate. Published variants:

    ScaleBiO   arXiv:2406.19976   softmax         f2sa, λ = 10 to 100; w trains on trusted rows
    FastMix    arXiv:2606.14971   softmax         dot products of the output layer's gradients
    DreamPRM   arXiv:2505.20241   softplus        darts with ξ = 1 after five lower steps

DreamPRM has v_k = softplus(u_k)/mean softplus(u) whatever n_k, so that rows start alike, and not
sources; its losses for a process reward model are left out. FastMix's code draws sources alike and
weights their losses by p_k: 1/K of this loss. In these two papers trusted rows are no source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import softplus

from hyperopt_peft.method import (
    GaussianPrior,
    Problem,
    TaskLoss,
    WeightedRows,
    option,
    require_examples,
)
from hyperopt_peft.problems.data_plans import SOURCE, EqualSources

#: Form and arguments of each paper.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "scalebio": ("softmax", {"hypergradient": "f2sa:growth=0.0,inner_steps=5", "lower_steps": 1}),
    "fastmix": ("softmax", {"hypergradient": "fastmix", "lower_steps": 20}),
    "dreamprm": ("softplus", {"hypergradient": "darts:xi=1.0", "lower_steps": 5}),
}


@dataclass
class Sources(EqualSources):
    """A share of each source, learned on the trusted rows; then these shares, fixed.

    A step needs about ten rows of each source: see ``gradient_accumulation_steps``.

    Raises:
        ProblemError: there are no trusted rows; as `EqualSources`; the trainer's loss is no known
            mean over labels and no ``row_losses`` are given.

    Example:
        >>> from datasets import Dataset
        >>> method, trusted = Sources(), Dataset.from_dict({"x": [3]})
        >>> rows = Dataset.from_dict({"x": [1, 2], "source": ["web", "books"]})
        >>> lower, upper = method.rows(rows, trusted)
        >>> method.prepare(torch.nn.Linear(1, 1))
        >>> method.shares()
        {'web': 0.33..., 'books': 0.33..., 'trusted': 0.33...}
    """

    prior: float | None = option(
        None, help="τ; K/(8n) for n trusted rows, a variance of 8 a logit, or 0 with ``paper``"
    )
    form: Literal["softmax", "softplus"] | None = option(
        None, help="p of u, softmax or of ``paper``; softplus: v, and p_k is v_k·n_k by its sum"
    )
    paper: Literal["scalebio", "fastmix", "dreamprm"] | None = option(
        None, help="whose form, estimator and steps are the defaults"
    )

    one_level = False  # the source of least loss gets all of the share
    # An upper step after each lower one would take most of the passes.
    defaults = {"hypergradient": "darts:product=dots", "lower_steps": 4}

    @property
    def published_defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Estimator and steps of ``paper``."""
        return PUBLISHED[self.paper or ""][1]

    @classmethod
    def published(cls, paper: Literal["scalebio", "fastmix", "dreamprm"], **options: Any) -> Self:
        """The sources with ``paper``: its form, estimator and steps, without a prior.

        Example:
            >>> Sources.published("dreamprm").defaults["lower_steps"]
            5
        """
        return cls(paper=paper, **options)

    @property
    def weighs_rows(self) -> bool:
        """Whether u gives the weights of rows, by softplus, and not the shares."""
        return (self.form or PUBLISHED.get(self.paper or "", ("softmax",))[0]) == "softplus"

    def rows(self, train: Any, upper: Any) -> tuple[Any, Any]:
        """As `EqualSources.rows`."""
        require_examples("upper_dataset", upper)
        self.trusted = len(upper)
        return super().rows(train, upper)

    def prepare(self, model: Any) -> None:
        """Begin with equal shares."""
        device = next(model.parameters()).device
        self.logits = torch.zeros(len(self.names), device=device, requires_grad=True)

    def p(self) -> Tensor:
        """softmax(u), or the shares that DreamPRM's weights give, ``(K,)``."""
        if not self.weighs_rows:
            return self.logits.softmax(0)
        shares = softplus(self.logits) * self.counts.to(self.logits)
        return shares / shares.sum()

    def weights(self, batch: Any) -> Tensor:
        """As `EqualSources.weights`, or softplus(u) by its mean over the sources."""
        if not self.weighs_rows:
            return super().weights(batch)
        return (softplus(self.logits) / softplus(self.logits).mean())[batch[SOURCE]]

    def upper_variables(self, model: Any) -> dict[str, Tensor]:
        """u, a logit a source."""
        return {"logits": self.logits}

    def lower(self, model: Any, task_loss: TaskLoss) -> WeightedRows:
        """As `EqualSources.lower`; the shares are logged."""
        level = super().lower(model, task_loss)
        level.metrics = lambda: {f"share_{k}": p for k, p in zip(self.names, self.p().detach())}
        return level

    def upper(self, model: Any, task_loss: TaskLoss) -> Problem:
        """The mean loss of the trusted rows, and the prior."""
        level = super().upper(model, task_loss)
        default = 0.0 if self.paper else len(self.names) / (8 * self.trusted)
        level.prior = GaussianPrior(default if self.prior is None else self.prior, level.variables)
        return level

    def finish(self, model: Any) -> Any:
        """``model``; the shares stay as they are."""
        self.logits.requires_grad_(False)
        return model
