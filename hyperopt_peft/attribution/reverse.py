"""The derivative of a whole run, by one sweep from its end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hyperopt_peft.attribution.checkpoints import Checkpoints, Point
from hyperopt_peft.attribution.run import Run, RunStep
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.products import Passes, ProductKind
from hyperopt_peft.utils.random_state import RandomState
from hyperopt_peft.utils.restore import assign_, perturbed
from hyperopt_peft.utils.vector import Vector


class Sweep:
    """(dz_T/dv)ᵀλ for each λ of ``adjoints``: z are the run's variables, v the row weights.

    A step of level k moves its variables, z_k ← Φ_k(z_k, g_k) with g_k = ∂f_k(z, v)/∂z_k. So

        λ_k ← (∂Φ_k/∂z_k)ᵀλ_k,   λ ← λ + (∂g_k/∂z)ᵀ(∂Φ_k/∂g_k)ᵀλ_k,   s ← s + (∂g_k/∂v)ᵀ(…)ᵀλ_k

    with the step's batch, random numbers, moments and clipping; all products are one second
    backward pass a level and λ. Reverse-mode differentiation: arXiv:1502.03492; of a training run
    as here, arXiv:2503.13751. The steps between two checkpoints are done again.

    Args:
        run: the run.
        adjoints: the gradients of some functions of z_T, each a tensor for each variable.
        passes: counts the passes.
        product: how second derivatives are taken.
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
        self.moments: list[list[list[Tensor] | None]] = [
            [None for _ in run.levels] for _ in adjoints
        ]
        self.found = [torch.zeros_like(run.weights) for _ in adjoints]
        # Of each level, the places of the variables that it reads and does not own.
        self.others = [
            [place for place in range(len(run.variables)) if place not in own]
            for own in map(set, run.places)
        ]
        self.oracles = [self._oracle(level) for level in range(len(run.levels))]

    def _oracle(self, number: int) -> Oracle:
        run = self.run
        read = [run.variables[place] for place in self.others[number]]
        named = [(str(k), v) for k, v in enumerate((run.weights, *read))]
        fixed = RandomState.seeded(run.devices, "attribution")
        above = Problem(named, name="row weights")
        level = run.levels[number]
        return Oracle(above, level, None, None, fixed, fixed, passes=self.passes)

    def back(
        self, checkpoints: Checkpoints, *, last: int | None = None, progress: bool = False
    ) -> list[Tensor]:
        """(dz_T/dv)ᵀλ for each λ, ``(n,)``.

        Args:
            checkpoints: those of the run that is differentiated.
            last: how many steps, from the end; None for all.
            progress: whether to show a progress bar.
        """
        run, total = self.run, len(self.run.steps)
        first = 0 if last is None else max(0, total - last)
        with ExitStack() as stack:
            for oracle in self.oracles:
                stack.enter_context(oracle.open())
            stack.enter_context(perturbed(run.variables))
            bar = stack.enter_context(
                tqdm(total=total - first, disable=not progress, desc="backward")
            )
            for begin in reversed(range(0, total, run.every)):
                end = min(begin + run.every, total)
                points = run.points(begin, end, checkpoints) if end > first else []
                again = run.steps[begin : end - 1] if points else []
                self.passes.gradients += sum(len(step.moves) for step in again)
                for number in reversed(range(max(begin, first), end)):
                    self._pull(run.steps[number], points.pop())
                    bar.update()
        return self.found

    def _pull(self, step: RunStep, point: Point) -> None:
        """From the adjoints after ``step`` to those before."""
        values = step.begin(point[0])
        assign_(self.run.variables, values)
        before = [list(adjoint) for adjoint in self.adjoints]
        added: list[list[tuple[int, Tensor]]] = [[] for _ in self.adjoints]
        for move in step.moves:
            own, others = self.run.places[move.level], self.others[move.level]
            optimizer, state = self.run.optimizer(move.level), point[1].get(move.level, {})
            at = self.run.step_record(move, values, state)
            with self.oracles[move.level].product(self.product, at=at) as product:
                record = self.run.step_record(move, values, state, product.lower_gradient())
                for k, adjoint in enumerate(self.adjoints):
                    moments, of_own = self.moments[k], Vector(adjoint[place] for place in own)
                    w_bar, g_bar, moments[move.level], _ = optimizer.vjp(
                        record, of_own, moments[move.level]
                    )
                    hessian, mixed = product.both(g_bar)
                    of_weights, *of_others = mixed
                    self.found[k] = self.found[k] + of_weights
                    for place, bar in zip(own, w_bar, strict=True):
                        before[k][place] = bar
                    added[k] += zip((*own, *others), (*hessian, *of_others), strict=True)
        for k, parts in enumerate(added):
            for place, part in parts:
                before[k][place] = before[k][place] + part
            for place in step.assigned:
                before[k][place] = torch.zeros_like(before[k][place])
        self.adjoints = before
