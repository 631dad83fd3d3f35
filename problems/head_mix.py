"""Learns the weights of sources on a head: convex, solved to its minimum.

    upper: min over u   L(w*(u); trusted rows) + ½·τ·mean‖u − u0‖²
    lower: w*(u) = argmin over the head w   1/N Σ_i v_k(i)(u) ℓ_i(w) + ½·λ·‖W‖²

As in `data_sources`, with a linear head on frozen features in place of the adapter. The lower level
is solved to its minimum at each step, and the hypergradient by conjugate gradients with exact
products. The weights are then those of the adapter's training: a proxy, as in DoReMi
(Xie et al. 2023, arXiv:2305.10429), but with a hypergradient by implicit differentiation.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.engine.fit import lbfgs
from hyperopt_peft.hypergradients.estimate import estimate, open_oracle
from hyperopt_peft.problems.common import TaskLevel
from hyperopt_peft.problems.data_sources import Mixture, SourceWeights, default_prior
from hyperopt_peft.problems.example_weights import HeldOut, example_losses
from hyperopt_peft.problems.features import Features
from hyperopt_peft.problems.head import L2, Head, L2Penalty
from hyperopt_peft.problems.head_rows import HeadRows

#: Solves for the hypergradient of the head's minimum.
SOLVER = "cg:steps=8,tolerance=0.01"
#: The learning rate of a search, and its steps.
RATE, SEARCH_STEPS = 0.6, 15
#: The value of a for a source that is left out, and for one that counts as much as can be.
OUT, FULL = 1e-6, 1 - 1e-6


@dataclass(frozen=True)
class Plan:
    """What is trained: by which weights, on which rows, and what comes after.

    Attributes:
        a: σ(u) of each source and, last, of the trusted rows, ``(K + 1,)``, from 0 to 1; equal
            entries weight all rows alike.
        groups: in place of `HeadRows.groups`, without the rows or votes that are left out.
        then_trusted: whether a training on the trusted rows alone follows, near where the first
            one ended.
        penalty: the λ of a head's training on the trusted rows alone; `HeadMix.l2` with 0.
        passes: those of the search that found a.

    Example:
        >>> Plan(torch.tensor([1.0, 0.0, 1.0])).logits  # without the second source
        tensor([ 13.8..., -13.8...,  13.8...])
    """

    a: Tensor
    groups: Tensor | None = None
    then_trusted: bool = False
    penalty: float = 0.0
    passes: int = 0

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
        history: before each step of the last search the trusted loss, ``upper_loss``, the
            ``residual`` of the solve, and the sources' ``shares`` by name.

    Example:
        >>> from hyperopt_peft.problems.features import Features
        >>> x = torch.tensor([[1.0], [-1.0]]).repeat(9, 1)
        >>> labels = torch.tensor([0, 1] * 3 + [1, 0] * 3 + [0, 1] * 3)  # the second source errs
        >>> features = Features(x, labels, torch.arange(18))
        >>> groups = torch.arange(3).repeat_interleave(6)
        >>> names = ("web", "books", "trusted")
        >>> mix = HeadMix(HeadRows.of(names, features, groups, outputs=2), steps=5)
        >>> a = mix.learned.a
        >>> bool(a[0] > a[1])
        True
    """

    rows: HeadRows
    l2: float = L2
    prior: float | None = None
    rate: float = RATE
    steps: int = SEARCH_STEPS
    passes: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def fit(self, plan: Plan, start: Head | None = None) -> Head:
        """The head that ``plan`` trains, from the values of ``start``, which only save passes."""
        head = self._head()
        if start is not None:
            head.load_state_dict(start.state_dict())
        if not plan.trusted_only:
            self._solve(*self._lower(head, plan))
        if plan.trusted_only or plan.then_trusted:
            prior = L2Penalty(head, plan.penalty or self.l2, near=plan.then_trusted)
            level = TaskLevel(head, head.named_parameters(), prior=prior)
            self._solve(level, self.rows.trusted.batch())
        return head

    @torch.no_grad()
    def losses(self, head: Head, rows: HeadRows | None = None) -> Tensor:
        """The mean loss of each trusted row, ``(n,)``, of `rows` or of those given."""
        rows = rows or self.rows
        trusted, n = rows.trusted, rows.n
        each = self.losses_of(head, trusted)
        counts = trusted.row.bincount(minlength=n)
        return each.new_zeros(n).index_add(0, trusted.row, each) / counts.clamp(min=1)

    @torch.no_grad()
    def losses_of(self, head: Head, features: Features) -> Tensor:
        """The loss of each row, or token, of ``features``, ``(m,)``."""
        return example_losses(head, features.batch())

    def objective(self, plan: Plan) -> float:
        """F at the minimum of ``plan``: the loss of the trusted rows, which it trains on too."""
        return float(self.losses(self.fit(plan, self._equal_head)).mean())

    @torch.no_grad()
    def predicted(self, head: Head, x: Tensor) -> Tensor:
        """The most likely class of each row, ``(m,)``."""
        predicted: Tensor = head(x).logits.argmax(-1)
        return predicted

    def predictions(self) -> Tensor:
        """The most likely class of each of the sources' rows by `trusted_head`, ``(m,)``."""
        return self.predicted(self.trusted_head, self.rows.sources.x)

    def source_losses(self) -> Tensor:
        """The loss of each of the sources' rows by `trusted_head`, ``(m,)``."""
        return self.losses_of(self.trusted_head, self.rows.sources)

    def search(self) -> SourceWeights:
        """The weights that Adam finds; the lower level starts where the last step left it."""
        head, self.history = copy.deepcopy(self._equal_head), []
        lower, batch = self._lower(head, Plan(torch.full((len(self.rows.names),), 0.5)))
        weights = lower.weights.requires_grad_(True)
        optimizer = torch.optim.Adam([weights.logits], lr=self.rate, betas=(0.9, 0.99))
        prior = self.prior
        if prior is None:
            prior = default_prior(len(self.rows.names), self.rows.n)
        upper = HeldOut(head, weights, prior=prior, optimizer=optimizer)
        above = self.rows.trusted.batch()
        for _ in range(self.steps):
            self._solve(lower, batch)
            oracle = open_oracle(upper, lower, upper_batch=above, lower_batch=batch)
            result = estimate(oracle, SOLVER)
            self.passes += 2 * ((result.steps or 0) + 1)
            self.history.append(
                {
                    "shares": dict(zip(weights.names, weights.shares().tolist(), strict=True)),
                    "upper_loss": oracle.upper_gradient.evaluation.loss,
                    "residual": result.residual or 0.0,
                }
            )
            upper.step(result.hypergradient.parts)
        return weights.requires_grad_(False)

    @cached_property
    def learned(self) -> Plan:
        """The plan of the weights that `search` finds."""
        before = self.passes
        return Plan(self.search().logits.detach().sigmoid(), passes=self.passes - before)

    def row_weights(self, plan: Plan) -> dict[str, float]:
        """The weight of a row of each source in ``plan``, by name; the mean over all rows is 1."""
        weights = self._weights(plan)
        of_a_row = weights.shares() * weights.counts.sum() / weights.counts
        return dict(zip(weights.names, of_a_row.tolist(), strict=True))

    @cached_property
    def trusted_head(self) -> Head:
        """The head that is trained on the trusted rows alone."""
        return self.fit(Plan(torch.eye(len(self.rows.names))[-1]))

    @cached_property
    def _equal_head(self) -> Head:
        return self.fit(Plan(torch.ones(len(self.rows.names))))

    def _head(self) -> Head:
        rows = self.rows
        x = rows.sources.x
        return Head(x.shape[1], rows.outputs, problem_type=rows.problem_type, dtype=x.dtype)

    def _groups(self, plan: Plan) -> Tensor:
        return self.rows.groups if plan.groups is None else plan.groups

    def _weights(self, plan: Plan) -> SourceWeights:
        rows = self.rows
        numbers = rows.counts(self._groups(plan)).clamp(min=1).tolist()
        counts = dict(zip(rows.names, numbers, strict=True))
        weights = SourceWeights(counts, sampled=rows.sampled)
        weights.logits.data = plan.logits.clone()
        return weights.requires_grad_(False)

    def _lower(self, head: Head, plan: Plan) -> tuple[Mixture, Any]:
        """The level of ``plan``, and its only batch."""
        lower = Mixture(head, self._weights(plan), prior=L2Penalty(head, self.l2))
        return lower, self.rows.batch(self._groups(plan))

    def _solve(self, level: Problem, batch: Any) -> None:
        rows = self.rows
        share = len(batch["features"]) / (len(rows.sources.x) + len(rows.trusted.x))
        self.passes += math.ceil(share * lbfgs(level, batch))
