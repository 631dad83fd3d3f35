"""Learns the weights of sources on a head: convex, exact, in seconds.

    upper: min over u   L(w*(u); trusted rows) + ½·τ·mean‖u − u0‖²
    lower: w*(u) = argmin over the head w   1/N Σ_i v_k(i)(u) ℓ_i(w) + ½·λ·‖W‖²

As in `data_sources`, with a linear head on frozen features in place of the adapter. The lower level
is solved to its minimum at each step, and the hypergradient by conjugate gradients with exact
products. The weights are then those of the adapter's training: a proxy, as in DoReMi
(Xie et al. 2023, arXiv:2305.10429), but one whose hypergradient is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.hypergradients.estimate import estimate, open_oracle
from hyperopt_peft.problems.common import TaskLevel
from hyperopt_peft.problems.data_sources import Mixture, SourceWeights
from hyperopt_peft.problems.example_weights import HeldOut, example_losses
from hyperopt_peft.problems.features import Features
from hyperopt_peft.problems.head import L2, Head, L2Penalty, solve
from hyperopt_peft.problems.head_rows import HeadRows

#: Solves for the hypergradient of the head's minimum.
SOLVER = "cg:steps=20,tolerance=0.01"
#: The steps of a search.
SEARCH_STEPS = 15
#: The value of a for a source that is left out, and for one that counts as much as can be.
OUT, FULL = 1e-6, 1 - 1e-6


@dataclass(frozen=True)
class Plan:
    """What is trained: by which weights, on which rows, and what comes after.

    Attributes:
        a: σ(u) of each source and, last, of the trusted rows, ``(K + 1,)``, from 0 to 1; equal
            entries weight all rows alike.
        groups: in place of `HeadRows.groups`, -1 where a row or vote is left out.
        then_trusted: whether a training on the trusted rows alone follows, near where the first
            one ended.
    """

    a: Tensor
    groups: Tensor | None = None
    then_trusted: bool = False

    @property
    def trusted_only(self) -> bool:
        """Whether no source is trained on."""
        return not bool(self.a[:-1].any())

    @property
    def logits(self) -> Tensor:
        """u."""
        return self.a.clamp(OUT, FULL).logit()


@dataclass
class HeadMix:
    """Trains a head on sources and trusted rows, by weights that are given or learned.

    Attributes:
        rows: the features.
        l2: λ.
        prior: τ; K/(8·n) of K logits and n trusted rows with None.
        rate, steps: of Adam on the logits u, at the upper level.
        passes: the evaluations over all rows until now; a product counts as two.
        history: of each step of the last search the trusted loss and the residual of the solve.
        shares: the sources' shares before each of these steps, by name.
    """

    rows: HeadRows
    l2: float = L2
    prior: float | None = None
    rate: float = 0.6
    steps: int = SEARCH_STEPS
    passes: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    shares: list[dict[str, float]] = field(default_factory=list)

    def fit(self, plan: Plan, penalty: float = 0.0) -> Head:
        """The head that ``plan`` trains.

        ``penalty`` is the λ of the training on the trusted rows alone; `l2` with 0.
        """
        head = self._head()
        if not plan.trusted_only:
            self._solve(*self._lower(head, plan)[1:])
        if plan.trusted_only or plan.then_trusted:
            prior = L2Penalty(head, penalty or self.l2, near=plan.then_trusted)
            level = TaskLevel(head, head.named_parameters(), prior=prior)
            self._solve(level, self.rows.trusted_batch())
        return head

    @torch.no_grad()
    def losses(self, head: Head, rows: HeadRows | None = None) -> Tensor:
        """The mean loss of each trusted row, ``(n,)``, of `rows` or of those given."""
        trusted = (rows or self.rows).trusted
        each, counts = self.losses_of(head, trusted), trusted.row.bincount()
        sums: Tensor = torch.zeros(len(counts)).index_add(0, trusted.row, each)
        return sums / counts.clamp(min=1)

    @torch.no_grad()
    def losses_of(self, head: Head, features: Features) -> Tensor:
        """The loss of each row, or token, of ``features``, ``(m,)``."""
        return example_losses(head, {"features": features.x, "labels": features.labels})

    def objective(self, plan: Plan) -> float:
        """F at the minimum of ``plan``: the loss of the trusted rows, which it trains on too."""
        self._solve(*self._lower(self._last, plan)[1:])
        return float(self.losses(self._last).mean())

    @cached_property
    def _last(self) -> Head:
        """The head of the last objective, from which the next one starts: most are near by."""
        return self._head()

    @torch.no_grad()
    def predicted(self, head: Head, x: Tensor) -> Tensor:
        """The most likely class of each row, ``(m,)``."""
        predicted: Tensor = head(x).logits.argmax(-1)
        return predicted

    def search(self) -> SourceWeights:
        """The weights that Adam finds; the lower level starts where the last step left it."""
        head, self.history = self._head(), []
        self.shares = []
        weights, lower, batch = self._lower(head, Plan(torch.full((len(self.rows.names),), 0.5)))
        weights.requires_grad_(True)
        optimizer = torch.optim.Adam([weights.logits], lr=self.rate, betas=(0.9, 0.99))
        n = len(self.rows.trusted.row.unique())
        prior = len(self.rows.names) / (8 * n) if self.prior is None else self.prior
        upper = HeldOut(head, weights, prior=prior, optimizer=optimizer)
        above = self.rows.trusted_batch()
        for _ in range(self.steps):
            self._solve(lower, batch)
            oracle = open_oracle(upper, lower, upper_batch=above, lower_batch=batch)
            result = estimate(oracle, SOLVER)
            self.passes += 2 * ((result.steps or 0) + 1)
            self.shares.append(dict(zip(weights.names, weights.shares().tolist(), strict=True)))
            self.history.append(
                {
                    "upper_loss": oracle.upper_gradient.evaluation.loss,
                    "residual": result.residual or 0.0,
                }
            )
            upper.step(result.hypergradient.parts)
        return weights.requires_grad_(False)

    @cached_property
    def learned(self) -> Plan:
        """The plan of the weights that `search` finds."""
        return Plan(self.search().logits.detach().sigmoid())

    def row_weights(self, plan: Plan) -> dict[str, float]:
        """The weight of a row of each source in ``plan``, by name; the mean over all rows is 1."""
        weights = self._lower(self._head(), plan)[0]
        return dict(zip(weights.names, weights().tolist(), strict=True))

    @cached_property
    def trusted_head(self) -> Head:
        """The head that is trained on the trusted rows alone."""
        return self.fit(Plan(torch.cat([torch.zeros(len(self.rows.names) - 1), torch.ones(1)])))

    def _head(self) -> Head:
        rows = self.rows
        x = rows.sources.x
        return Head(x.shape[1], rows.outputs, problem_type=rows.problem_type, dtype=x.dtype)

    def _lower(self, head: Head, plan: Plan) -> tuple[SourceWeights, Mixture, Any]:
        """The weights of ``plan``, the level, and its only batch."""
        rows = self.rows
        groups = rows.groups if plan.groups is None else plan.groups
        numbers = [*rows.counts(groups).clamp(min=1).tolist(), len(rows.trusted.x)]
        weights = SourceWeights(dict(zip(rows.names, numbers, strict=True)))
        weights.logits.data = plan.logits.clone()
        weights.requires_grad_(False)
        lower = Mixture(head, weights, prior=L2Penalty(head, self.l2))
        return weights, lower, rows.batch(groups)

    def _solve(self, level: Problem, batch: Any) -> None:
        self.passes += solve(level, batch)
