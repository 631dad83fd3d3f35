"""The solver for benchopt's bilevel benchmark.

It needs benchopt and JAX, which this project does not install.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

jax = pytest.importorskip("jax")
pytest.importorskip("benchopt")
#: Of the samples of the inner function.
HESSIAN = [1.0, 0.5, 2.0]


@pytest.fixture
def solver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the solver, where benchopt would load it."""
    constants = ModuleType("benchmark_utils.constants")
    constants.PATIENCE = 100  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmark_utils.constants", constants)
    package = importlib.import_module("benchmark_utils")
    monkeypatch.setattr(package, "constants", constants, raising=False)
    return importlib.import_module("solvers.hyperopt_peft")


def inner_function(inner_var: Any, outer_var: Any, start: int = 0, batch_size: int = 1) -> Any:
    hessian = jax.lax.dynamic_slice(jax.numpy.array(HESSIAN), (start,), (batch_size,)).mean()
    return 0.5 * hessian * ((inner_var["a"] + outer_var - 1) ** 2).sum()


def outer_function(inner_var: Any, outer_var: Any, start: int = 0, batch_size: int = 1) -> Any:
    return ((inner_var["a"] - 3) ** 2 + outer_var**2).sum() / 2


def test_derivatives_of_every_order(solver: Any) -> None:
    """Of sin(index·x)·y, in torch as they are in closed form."""
    function = solver.torch_from_jax(lambda k, x, y: (jax.numpy.sin(k * x) * y).sum())
    x = torch.linspace(0, 1, 3, requires_grad=True)
    y = torch.ones(3, requires_grad=True)
    value = function(2, x, y)
    torch.testing.assert_close(value, torch.sin(2 * x).sum())
    expected = [2 * torch.cos(2 * x), -4 * torch.sin(2 * x), -8 * torch.cos(2 * x)]
    for derivative in expected:
        (value,) = torch.autograd.grad(value, x, torch.ones_like(value), create_graph=True)
        torch.testing.assert_close(value, derivative)
    (mixed,) = torch.autograd.grad(value, y, torch.ones_like(value))
    torch.testing.assert_close(mixed, -8 * torch.cos(2 * x))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", ["full", 1])
@pytest.mark.parametrize("estimator", ["cg", "neumann", "nystrom", "f2sa", "exact"])
def test_reaches_the_minimum(solver: Any, estimator: str, batch_size: Any) -> None:
    """F(u) = ((−2 − u)² + u²)/2 has its minimum at u = −1, where inner = 2."""
    options = {"estimator": estimator, "batch_size": batch_size, "step_size": 0.4}
    made = solver.Solver.get_instance(**options)
    start = {"a": jax.numpy.zeros(2)}, jax.numpy.zeros(2)
    made.set_objective(inner_function, outer_function, 3, 3, *start)
    blocks = iter(range(6))
    made.run(lambda: next(blocks, None) is not None)
    result = made.get_result()
    assert jax.numpy.allclose(result["outer_var"], -1, atol=0.02)
    assert jax.numpy.allclose(result["inner_var"]["a"], 2, atol=0.02)
