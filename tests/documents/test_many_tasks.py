"""The mathematics of examples/methods/many_tasks.py, and the example made small."""

import random
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from hyperopt_peft import hypergradient
from tests.support.examples import EXAMPLES, example
from tests.support.process import python
from tests.support.quadratic import positive

TASKS, SIZES = 3, (3, 1)
EXAMPLE = example("methods/many_tasks.py")


def quadratics(heads: Any, batch: Any) -> Tensor:
    """½ φᵀHφ − cᵀφ of each task."""
    phi, (h, c) = torch.cat([*heads], 1), batch
    return torch.einsum("ti,tij,tj->t", phi, h, phi) / 2 - (c * phi).sum(1)


def solved(*penalties: float) -> tuple[Any, ...]:
    """Both levels, φ at the minimum, and the tasks' batches below and above."""
    drawn = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, dtype=torch.float64, generator=drawn)
    below, above = (
        (torch.stack([positive(4, drawn) for _ in range(TASKS)]), normal(TASKS, 4))
        for _ in range(2)
    )
    start = [normal(1, size).requires_grad_() for size in SIZES]
    logs = [torch.tensor(x).double().log().requires_grad_() for x in penalties]
    lower = EXAMPLE.Adapt(quadratics, start, logs, TASKS)
    minimum = closed_form(start, logs, below).detach().split(SIZES, 1)
    for variable, values in zip(lower.variables, minimum, strict=True):
        variable.data.copy_(values)
    return EXAMPLE.Query(lower), lower, below, above


def closed_form(start: Any, logs: Any, batch: Any) -> Tensor:
    """φ* = (H + Λ)⁻¹ (c + Λθ), with the graph of θ and log λ."""
    weights = torch.cat([x.exp().expand(size) for x, size in zip(logs, SIZES, strict=True)])
    h, c = batch
    return torch.linalg.solve(h + weights.diag(), c + weights * torch.cat(start, 1))


@pytest.mark.parametrize("estimator", ["exact", "cg:steps=40", "minres:steps=40"])
def test_start_and_penalties_have_the_gradient_of_the_minimum(estimator: str) -> None:
    upper, lower, below, above = solved(0.5, 3.0)
    phi = closed_form(lower.start, lower.log_penalties, below)
    expected = grad(quadratics([phi], above).mean(), upper.variables)
    found = hypergradient(upper, lower, estimator, upper_batch=above, lower_batch=below)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_start_is_that_of_the_paper() -> None:
    upper, lower, (h, c), above = solved(2.0, 2.0)
    slope = gradients(torch.cat(lower.variables, 1), above)
    each = torch.linalg.solve(torch.eye(4) + h / 2, slope)  # (I + H_i/λ)⁻¹ ∇L_te,i
    found = hypergradient(upper, lower, "exact", upper_batch=above, lower_batch=(h, c))
    torch.testing.assert_close(torch.cat(found[:2], 1)[0], each.mean(0), rtol=1e-9, atol=1e-12)


def test_heads_that_cannot_leave_the_start_learn_several_tasks_at_once() -> None:
    """λ → ∞: the mean of the tasks' gradients at θ."""
    upper, lower, below, above = solved(1e8, 1e8)
    expected = gradients(torch.cat(lower.start, 1).expand(TASKS, 4), above).mean(0)
    found = hypergradient(upper, lower, "exact", upper_batch=above, lower_batch=below)
    torch.testing.assert_close(torch.cat(found[:2], 1)[0], expected, rtol=1e-5, atol=1e-5)


def gradients(phi: Tensor, batch: Any) -> Tensor:
    """Of each task's loss, ``(tasks, 4)``."""
    return torch.einsum("tij,tj->ti", batch[0], phi.detach()) - batch[1]


@pytest.mark.slow  # it starts a process and loads the pretrained encoder
def test_the_example_runs_on_made_up_ratings() -> None:
    numbers = random.Random(0)
    lines = {"GroundTruth": "", "anonDataRatings": ""}
    for row in range(1, 121):
        ratings = [numbers.choice((-3, -1, 1, 3)) for _ in range(4)]
        lines["GroundTruth"] += f"{row}\t0\ta sentence with {row} words\n"
        lines["anonDataRatings"] += f"{row}\t0\t1\t{ratings}\n"
    files = {f"movieReviewSnippets_{name}.txt": text.encode() for name, text in lines.items()}
    program = f"""import sys
sys.path += [{str(EXAMPLES)!r}, {str(EXAMPLES / "methods")!r}]
import many_tasks, rated_text
rated_text.archive = lambda: {files}
many_tasks.main(seeds=2, blocks=4, steps=2)"""
    _, _, *rows, last = filter(None, python("-c", program).stdout.splitlines())
    found = [float(x) for row in rows for x in re.findall(r"\d+\.\d{3}", row)]
    assert len(found) == 3 * 3 and all(0 <= x <= 1 for x in found)
    assert re.fullmatch(r"learned − tuned: [+-]\d\.\d{3} ± \d\.\d{3}", last)
