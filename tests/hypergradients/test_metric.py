"""Solving in the metric of the lower optimizer, against dense algebra and hand-made diagonals."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from hyperopt_peft import Engine, ProblemError, Solver, hypergradient
from hyperopt_peft.hypergradients import (
    ConjugateGradient,
    Exact,
    Matvec,
    Solution,
    Vector,
    get_estimator,
    registered,
    zeros_like,
)
from tests.support.by_hand import BATCHES, Options, f, make_levels, start, upper_f
from tests.support.quadratic import FunctionLevel, flat, program

METRICS: dict[str, tuple[type[Optimizer], Options]] = {
    "adam": (Adam, {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "adamw": (AdamW, {"lr": 0.05, "weight_decay": 0.3, "eps": 0.01}),
    "rmsprop": (RMSprop, {"lr": 0.02}),
    "rmsprop-centered": (RMSprop, {"lr": 0.02, "centered": True, "alpha": 0.7}),
}
CONVERGED = {
    "cg": "steps=60,tolerance=1e-13",
    "minres": "steps=60,tolerance=1e-13",
    "nystrom": "rank=5,steps=60,tolerance=1e-13",
    "neumann": "terms=2000,power_steps=30",
    "exact": "damping=0",
    "warm": "first_steps=3000",
}
each_metric = pytest.mark.parametrize("optimizer", METRICS)


def by_state(optimizer: Optimizer) -> Tensor:
    """√v̂ + eps, read from torch's own state."""
    parts = []
    for group in optimizer.param_groups:
        for w in group["params"]:
            state = optimizer.state[w]
            if isinstance(optimizer, RMSprop):
                v = state["square_avg"]
                v = v - state["grad_avg"].square() if group["centered"] else v
            else:
                v = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
            parts.append(v.sqrt() + group["eps"])
    return flat(parts)


def dense(w: Any, u: Any, batch: Any, damping: float, m: Tensor) -> Tensor:
    """The hypergradient with (H + damping·M)⁻¹ in the place of H⁻¹."""
    g = flat(torch.autograd.grad(f(w, u, batch), w, create_graph=True))
    unit = torch.eye(len(g), dtype=g.dtype)
    columns = [torch.autograd.grad(g, w, e, retain_graph=True) for e in unit]
    h = torch.stack([flat(column) for column in columns], 1)
    b = flat(torch.autograd.grad(upper_f(w, u), w))
    v = torch.linalg.solve(h + damping * torch.diag(m), b)
    direct = torch.autograd.grad(upper_f(w, u), u, materialize_grads=True)
    return flat(direct) - flat(torch.autograd.grad(g, u, v))


@each_metric
@pytest.mark.parametrize("solver", ["cg", "minres", "nystrom", "exact"])
def test_damping_is_that_of_the_optimizers_metric(optimizer: str, solver: str) -> None:
    """In training it is the state in which the last step has left the optimizer."""
    kind, options = METRICS[optimizer]
    w, u = start()
    made = kind(w, **options)
    levels = make_levels(made, w, u)
    before = [x.detach().clone().requires_grad_() for x in u]
    converged = CONVERGED[solver].replace("damping=0", "float64=True")
    method = f"{solver}:{converged},damping=20,metric=optimizer"
    Engine(*levels, method, warmup_steps=3, progress=False).run(1)
    found = flat(before) - flat(u)
    expected = dense(w, before, BATCHES[3 % len(BATCHES)], 20.0, by_state(made))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    other = dense(w, before, BATCHES[0], 20.0, torch.ones(7, dtype=torch.float64))
    assert (other - expected).norm() > 1e-2 * expected.norm()


@each_metric
@pytest.mark.parametrize("taken", [0, 2])
def test_outside_training_it_is_that_after_the_next_step(optimizer: str, taken: int) -> None:
    """A fresh optimizer has none before it."""
    kind, options = METRICS[optimizer]
    w, u = start()
    made = kind(w, **options)
    upper, lower = make_levels(made, w, u)
    for _ in range(taken):
        lower.step(lower.gradient(lower.next_batch(), w).gradient)
    found = flat(hypergradient(upper, lower, "exact:damping=20,metric=optimizer"))
    here = [x.detach().clone().requires_grad_() for x in w]
    batch = lower.next_batch()
    lower.step(lower.gradient(batch, w).gradient)
    expected = dense(here, u, batch, 20.0, by_state(made))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def adam_below(seed: int = 0) -> Any:
    """A quadratic program whose lower optimizer has met gradients of many sizes."""
    quadratic = program(seed)
    upper, lower = quadratic.levels()
    generator = torch.Generator().manual_seed(seed)
    lower.optimizer = Adam(lower.variables, lr=0.0)
    for _ in range(3):
        noise = [torch.randn(w.shape, dtype=w.dtype, generator=generator) for w in lower.variables]
        lower.step(noise)
    return quadratic, upper, lower


def test_every_solver_is_tested() -> None:
    solvers = {n for n, entry in registered().items() if issubclass(entry.estimator, Solver)}
    assert solvers == set(CONVERGED)


@pytest.mark.parametrize("solver", CONVERGED)
@pytest.mark.parametrize("seed", range(2))
def test_without_damping_the_converged_solution_is_the_same(solver: str, seed: int) -> None:
    quadratic, upper, lower = adam_below(seed)
    found = flat(hypergradient(upper, lower, f"{solver}:{CONVERGED[solver]},metric=optimizer"))
    expected = quadratic.direct + quadratic.exact_implicit
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_before_convergence_it_is_not() -> None:
    """The control: the metric does something."""
    quadratic, upper, lower = adam_below()
    found = [
        flat(hypergradient(upper, lower, f"cg:steps=3,metric={metric}"))
        for metric in ("identity", "optimizer")
    ]
    assert (found[0] - found[1]).norm() > 1e-3 * quadratic.exact_implicit.norm()


@pytest.mark.parametrize("product", ["exact", "difference"])
def test_a_hessian_proportional_to_the_metric_is_solved_in_one_step(product: str) -> None:
    """f = ½ Σ d w² − wᵀu, and gradients that are proportional to d: SHS is a multiple of I."""
    d = torch.logspace(-2, 2, 6, dtype=torch.float64)
    w = torch.ones(6, dtype=torch.float64, requires_grad=True)
    u = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    upper = FunctionLevel(lambda _: w.sum(), [u], optimizer=SGD([u], lr=1.0))
    lower = FunctionLevel(lambda _: (d * w * w / 2 - w * u).sum(), [w])
    steps = {}
    for metric in ("identity", "optimizer"):
        with torch.no_grad():
            w.fill_(1.0)
            u.zero_()
        lower.optimizer = Adam([w], lr=0.0, eps=1e-12)
        method = f"cg:steps=20,tolerance=1e-6,product={product},metric={metric}"
        (record,) = Engine(upper, lower, method, progress=False).run(1)
        steps[metric] = record["solver_steps"]
        torch.testing.assert_close(-u.detach(), 1 / d, rtol=1e-5, atol=0)
    assert steps["optimizer"] == 1 and steps["identity"] >= 6


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scaling_f_changes_nothing_with_damping_either(scale: float) -> None:
    """The metric is as large as the gradients are, and so its damping follows f."""
    found = []
    for factor in (1.0, scale):
        quadratic = program(0)
        upper, lower = quadratic.levels(scale=factor)
        lower.optimizer = Adam(lower.variables, lr=0.0, eps=1e-30)
        with torch.no_grad():
            quadratic.w[0].add_(0.5)
        found.append(flat(hypergradient(upper, lower, "exact:damping=2,metric=optimizer")))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", CONVERGED)
def test_that_of_gradient_descent_is_the_identity(solver: str) -> None:
    w, u = start()
    levels = make_levels(SGD(w, lr=0.1, momentum=0.9), w, u)
    found = [
        flat(hypergradient(*levels, f"{solver}:metric={metric}"))
        for metric in ("identity", "optimizer")
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("solver", CONVERGED)
def test_the_optimizers_state_is_kept_for_those_who_ask_for_it(solver: str) -> None:
    plain = get_estimator(solver)
    metric = get_estimator(f"{solver}:metric=optimizer")
    assert (plain.history, plain.needs_optimizer_state) == (0, False)
    assert (metric.history, metric.needs_optimizer_state) == (1, True)


def test_a_solver_of_the_user_has_it_too() -> None:
    """And sees nothing but a matrix and a right-hand side."""

    @dataclass(frozen=True)
    class Richardson(Solver):
        steps: int = 2000

        def solve(self, matvec: Matvec, b: Vector) -> Solution:
            v = zeros_like(b)
            for _ in range(self.steps):
                v = v + 0.02 * (b - matvec(v))
            return Solution(v)

    quadratic, upper, lower = adam_below()
    found = flat(hypergradient(upper, lower, Richardson(metric="optimizer")))
    expected = quadratic.direct + quadratic.exact_implicit
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_variable_that_a_batch_does_not_read_keeps_its_metric() -> None:
    """The step leaves its average of squares alone."""
    w, u = start()
    made = Adam(w, lr=0.0)

    def loss(reads_both: bool) -> Tensor:
        first = (w[0] * u[0][:, None]).square().sum()
        return first + (w[1] * u[1]).square() if reads_both else first

    upper = FunctionLevel(lambda _: w[0].sum() + 5 * w[1], u, optimizer=SGD(u, lr=1.0))
    lower = FunctionLevel(loss, w, data=[True, False], optimizer=made)
    before = flat(u).detach()
    gate, head = u[0].detach().clone(), w[0].detach().clone()
    method = Exact(damping=3.0, metric="optimizer")
    Engine(upper, lower, method, lower_steps=2, progress=False).run(1)
    m = by_state(made)[:6].reshape(3, 2)
    v = 1 / (2 * gate[:, None].square() + 3 * m)
    expected = torch.cat([-(4 * gate[:, None] * head * v).sum(1), torch.zeros(1).double()])
    torch.testing.assert_close(before - flat(u).detach(), expected, rtol=1e-10, atol=1e-12)


@dataclass(frozen=True)
class Keeper(Solver):
    """b at the first upper step, and that again ever after."""

    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        return Solution(b)

    def advance(self, matvec: Matvec, b: Vector, state: Any) -> Any:
        v = state.get("v", b)
        return Solution(v), {"v": v}


def test_what_is_kept_between_upper_steps_does_not_move_with_the_metric() -> None:
    """∂²f/∂u∂w = −I and F does not read u, so that the hypergradient is v."""
    w, u = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    upper = FunctionLevel(lambda _: weights @ w.square(), [u], optimizer=SGD([u], lr=0.0))
    lower = FunctionLevel(
        lambda _: weights @ w.square() - w @ u, [w], optimizer=Adam([w], lr=0.1, betas=(0.5, 0.5))
    )
    engine = Engine(upper, lower, Keeper(metric="optimizer"), progress=False)
    norms = [record["hypergradient_norm"] for record in engine.run(4)]
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-12)


def test_options_are_checked() -> None:
    assert ConjugateGradient(40).steps == 40  # it is no positional one
    with pytest.raises(ProblemError, match="metric must be 'identity' or 'optimizer', got 'adam'"):
        get_estimator("cg:metric=adam")
