"""Cross-checks with Betty 0.2.1, where the two libraries compute the same thing.

Betty takes H⁻¹ = I in ``darts``; a step length has to be given to its ``neumann``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from hyperopt_peft import Problem, hypergradient
from tests.support.by_hand import BATCHES, f, start, upper_f
from tests.support.quadratic import FunctionLevel, flat

betty = pytest.importorskip("betty.hypergradient", reason="Betty is installed on its own")


@dataclass
class BettyProblem:
    """What Betty's hypergradient functions ask of a problem."""

    variables: Sequence[Tensor]
    loss: Any = None
    config: Any = None
    paths: list[Any] = field(default_factory=list)
    cur_batch: Any = None
    _strategy: str = "default"

    def trainable_parameters(self) -> Sequence[Tensor]:
        return self.variables

    meta_trainable_parameters = parameters = trainable_parameters

    def training_step_exec(self, batch: Any) -> Tensor:
        return self.loss(batch)


def of_betty(method: str, options: dict[str, Any]) -> Tensor:
    """Betty's implicit term."""
    w, u = start()
    lower = BettyProblem(w, lambda b: f(w, u, b), SimpleNamespace(**options), cur_batch=BATCHES[0])
    b = torch.autograd.grad(upper_f(w, u), w)
    return flat(betty.jvp_fn_mapping[method](b, lower, BettyProblem(u), False)).detach()


def ours(method: str) -> Tensor:
    """Our implicit term."""
    w, u = start()
    upper: Problem = FunctionLevel(lambda _: upper_f(w, u), u)
    lower = FunctionLevel(lambda b: f(w, u, b), w, data=BATCHES, optimizer=SGD(w, lr=0.1))
    return flat(hypergradient(upper, lower, method)) - flat(hypergradient(upper, lower, "direct"))


@pytest.mark.parametrize("scale", [1.0, 0.1, 3.0])
def test_darts_is_that_of_betty_times_its_scale(scale: float) -> None:
    found = ours(f"darts:xi={scale},epsilon=0.01")
    torch.testing.assert_close(
        found,
        scale * of_betty("darts", {"darts_alpha": 0.01, "darts_multitask": False}),
        rtol=1e-9,
        atol=1e-12,
    )


def test_darts_scaled_by_the_learning_rate_is_that_of_betty_times_it() -> None:
    """The two scales are different algorithms: here they differ by a factor of 10."""
    found = ours("darts:xi=lr")
    theirs = of_betty("darts", {"darts_alpha": 0.001, "darts_multitask": False})
    torch.testing.assert_close(found, 0.1 * theirs, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("terms", [0, 3, 20])
@pytest.mark.parametrize("step", [0.3, 1.0])
def test_neumann_is_that_of_betty_for_a_given_step(terms: int, step: float) -> None:
    theirs = of_betty("neumann", {"neumann_iterations": terms, "neumann_alpha": step})
    found = ours(f"neumann:terms={terms},step_size={step}")
    torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-12)


def test_conjugate_gradients_are_those_of_betty_for_one_step_only() -> None:
    """Betty's second direction is built from the first residual."""

    def distance(steps: int) -> float:
        theirs = of_betty("cg", {"cg_iterations": steps, "cg_alpha": 1.0})
        return float((ours(f"cg:steps={steps},tolerance=0.0") - theirs).norm() / theirs.norm())

    assert distance(1) < 1e-9
    assert distance(2) > 0.01
