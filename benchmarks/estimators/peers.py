"""Hypergradients of other libraries, and of a plain difference, for any two Problems.

Each library's own function gets the same losses and the same ∂F/∂w. Betty's wheel refuses newer
interpreters, so it is installed separately:
``pip install --no-deps --ignore-requires-python betty-ml==0.2.1``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.autograd import grad

from hyperopt_peft import Problem
from hyperopt_peft.hypergradients import Vector
from hyperopt_peft.utils.restore import assign_, perturbed

Peer = Callable[[Problem, Problem], Vector]


def _gradients(upper: Problem, lower: Problem) -> tuple[Vector, tuple[Tensor, ...]]:
    """∂F/∂u and ∂F/∂w."""
    u, w = upper.variables, lower.variables
    loss, _ = upper.evaluate(upper.peek_batch())
    gradient = grad(loss, (*u, *w), materialize_grads=True)
    return Vector(gradient[: len(u)]), gradient[len(u) :]


#: The options of Betty's Config for each of its functions.
CONFIGS: dict[str, dict[str, Any]] = {
    "darts": {"darts_alpha": 0.01, "darts_multitask": False},
    "neumann": {"neumann_iterations": 20, "neumann_alpha": 1.0},
    "cg": {"cg_iterations": 10, "cg_alpha": 1.0},
}
BETTY = f"Betty {version('betty-ml')}" if find_spec("betty") else ""


def betty_term(method: str, upper: Problem, lower: Problem, b: Sequence[Tensor]) -> Vector:
    """The implicit term by Betty's function ``method`` from ∂F/∂w; w may be displaced then."""
    from betty.hypergradient import jvp_fn_mapping

    below = SimpleNamespace(
        meta_trainable_parameters=lambda: lower.variables,
        trainable_parameters=lambda: lower.variables,
        parameters=lambda: lower.variables,
        training_step_exec=lambda batch: lower.evaluate(batch)[0],
        cur_batch=lower.peek_batch(),
        loss=None,
        paths=[],
        config=SimpleNamespace(**CONFIGS[method]),
        _strategy="default",
    )
    above = SimpleNamespace(trainable_parameters=lambda: upper.variables)
    return Vector(jvp_fn_mapping[method](b, below, above, False))


def betty(method: str, upper: Problem, lower: Problem) -> Vector:
    """The hypergradient by Betty's function ``method``."""
    direct, b = _gradients(upper, lower)
    with perturbed(lower.variables):
        return direct + betty_term(method, upper, lower, b)


def torchopt_cg(steps: int, upper: Problem, lower: Problem) -> Vector:
    """TorchOpt's conjugate gradients on the Hessian."""
    import torchopt

    solve = torchopt.linear_solve.solve_cg(maxiter=steps, rtol=0.0, atol=0.0)
    direct, b = _gradients(upper, lower)
    loss, _ = lower.evaluate(lower.peek_batch())
    slope = grad(loss, lower.variables, create_graph=True)
    v = solve(lambda v: grad(slope, lower.variables, tuple(v), retain_graph=True), b)
    return direct - Vector(grad(slope, upper.variables, tuple(v), materialize_grads=True))


def independent_difference(upper: Problem, lower: Problem) -> Vector:
    """The usual central difference, ε = 0.01/‖b‖; each pass has its own dropout masks."""
    direct, b = _gradients(upper, lower)
    length = Vector(b).norm()
    sides = []
    with perturbed(lower.variables) as point:
        for sign in (1, -1):
            assign_(lower.variables, point, b, sign * 0.01 / length)
            gradient = lower.gradient(lower.peek_batch(), upper.variables).gradient
            sides.append(Vector.of(gradient, upper.variables))
    return direct - (sides[0] - sides[1]) * (length / 0.02)


def peers() -> tuple[dict[str, Peer], list[str]]:
    """The installed peers, by a name with their known fault, and the missing ones."""
    installed: dict[str, Peer] = {"loop: difference, ε = 0.01/‖b‖": independent_difference}
    missing = []
    if BETTY:
        installed[f"{BETTY} darts: H⁻¹ = I"] = partial(betty, "darts")
        installed[f"{BETTY} neumann (20): step 1 by default"] = partial(betty, "neumann")
        installed[f"{BETTY} cg (10): wrong second direction"] = partial(betty, "cg")
    else:
        missing.append("Betty (pip install --no-deps --ignore-requires-python betty-ml==0.2.1)")
    if find_spec("torchopt"):
        installed[f"TorchOpt {version('torchopt')} cg (10)"] = partial(torchopt_cg, 10)
    else:
        missing.append("TorchOpt (pip install torchopt)")
    return installed, missing
