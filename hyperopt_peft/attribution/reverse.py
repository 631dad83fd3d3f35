"""Differentiates a whole run by one backward sweep."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hyperopt_peft.attribution.run import Checkpoints, Point, Run
from hyperopt_peft.core.problem import Problem, devices_of
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.products import Passes, ProductKind
from hyperopt_peft.utils.random_state import RandomState
from hyperopt_peft.utils.restore import assign_, perturbed
from hyperopt_peft.utils.vector import Vector


class Sweep:
    """(dz_T/dv)ᵀλ for each λ in ``adjoints``; z are the run's variables, v the row weights.

    A step of level k moves its variables, z_k ← Φ_k(z_k, g_k) with g_k = ∂f_k(z, v)/∂z_k. So

        λ_k ← (∂Φ_k/∂z_k)ᵀλ_k,   λ ← λ + (∂g_k/∂z)ᵀ(∂Φ_k/∂g_k)ᵀλ_k,   s ← s + (∂g_k/∂v)ᵀ(…)ᵀλ_k

    with the step's batch, random state, moments and clipping. A level and a λ need one second
    backward pass. Steps between two checkpoints are repeated. Reverse-mode differentiation:
    arXiv:1502.03492; for row weights: arXiv:2503.13751.

    Args:
        adjoints: gradients of functions of z_T, each with one tensor per variable.
        product: how second derivatives are computed.
    """

    def __init__(
        self,
        run: Run,
        adjoints: Sequence[Sequence[Tensor]],
        passes: Passes,
        product: ProductKind = "exact",
    ) -> None:
        self.run, self.product, self.passes = run, product, passes
        self.adjoints = [list(adjoint) for adjoint in adjoints]
        self.moments: list[list[list[Tensor] | None]] = [[None] * len(run.levels) for _ in adjoints]
        self.products = [torch.zeros_like(run.weights) for _ in adjoints]
        # For each level, the indices of the variables that it does not own, but its loss may read.
        self.others = [
            [index for index in range(len(run.variables)) if index not in owned]
            for owned in map(set, run.indices)
        ]
        fixed = RandomState.seeded(devices_of(*run.levels), "attribution")
        self.oracles = []
        for level, indices in zip(run.levels, self.others, strict=True):
            others = [run.variables[index] for index in indices]
            upper = Problem([run.weights, *others], name="row weights")
            self.oracles.append(Oracle(upper, level, None, None, fixed, fixed, passes=passes))

    def back(
        self, checkpoints: Checkpoints, *, last_steps: int | None = None, progress: bool = False
    ) -> list[Tensor]:
        """(dz_T/dv)ᵀλ for each λ, ``(n,)``, through the ``last_steps`` last steps; None for all.

        ``checkpoints`` must belong to the run at whose end the adjoints were computed.
        """
        run, total, every = self.run, len(self.run.steps), checkpoints.every
        first = 0 if last_steps is None else max(0, total - last_steps)
        with ExitStack() as stack:
            for oracle in self.oracles:
                stack.enter_context(oracle.open())
            stack.enter_context(perturbed(run.variables))
            bar = tqdm(total=total - first, disable=not progress, desc="backward")
            stack.enter_context(bar)
            for begin in reversed(range(first // every * every, total, every)):
                end = min(begin + every, total)
                points = [checkpoints.get(begin)]
                for number in range(begin, end - 1):
                    points.append(run.advance(number, points[-1]))
                    self.passes.gradients += len(run.steps[number])
                for number in reversed(range(max(begin, first), end)):
                    self._pull(number, points.pop())
                    bar.update()
        return self.products

    def _pull(self, number: int, point: Point) -> None:
        """Replace the adjoints after the step ``number`` by those before it."""
        values = self.run.begin(number, point)
        assign_(self.run.variables, values)
        before = [list(adjoint) for adjoint in self.adjoints]
        terms: list[list[tuple[int, Tensor]]] = [[] for _ in self.adjoints]
        for update in self.run.steps[number]:
            level = update.level
            owned, others = self.run.indices[level], self.others[level]
            optimizer, state = self.run.optimizer(level), point[1].get(level, {})
            at = self.run.step_record(update, values, state)
            with self.oracles[level].product(self.product, at=at) as product:
                record = self.run.step_record(update, values, state, product.lower_gradient())
                for k, adjoint in enumerate(self.adjoints):
                    moments, of_level = self.moments[k], Vector(adjoint[index] for index in owned)
                    w_bar, g_bar, moments[level], _ = optimizer.vjp(
                        record, of_level, moments[level]
                    )
                    hessian, mixed = product.both(g_bar)
                    of_weights, *of_others = mixed
                    self.products[k] = self.products[k] + of_weights
                    for index, bar in zip(owned, w_bar, strict=True):
                        before[k][index] = bar
                    terms[k] += zip((*owned, *others), (*hessian, *of_others), strict=True)
        for adjoint, level_terms in zip(before, terms, strict=True):
            for index, term in level_terms:
                adjoint[index] = adjoint[index] + term
            for index in self.run.assigned[number]:
                adjoint[index] = torch.zeros_like(adjoint[index])
        self.adjoints = before
