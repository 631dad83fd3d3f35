"""EK-FAC, alone and as a preconditioner, against gradients of single rows and dense algebra."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap
from torch.nested import nested_tensor

from hyperopt_peft import Nested, NonFiniteError, Problem, ProblemError, hypergradient
from hyperopt_peft.adapters import use_fast_dora
from hyperopt_peft.core.data import DataStream
from hyperopt_peft.hypergradients.contrib import KFAC, kronecker
from hyperopt_peft.hypergradients.contrib.kfac import layer_samples
from hyperopt_peft.hypergradients.contrib.kronecker import RELATIVE_DAMPING, empirical_fisher
from hyperopt_peft.hypergradients.estimate import open_oracle
from tests.support.adapted_models import randomise, wrap
from tests.support.quadratic import FunctionLevel, flat, normal, program, relative_error
from tests.support.weighted_levels import Layers, sequences, weighted

DAMPING = 0.3


def over(variables: Sequence[Tensor], loss: Callable[[], Tensor]) -> tuple[Problem, Problem]:
    """A lower level with a mean loss over rows, and an upper one that reads w and a number."""
    u = torch.ones((), dtype=torch.float64, requires_grad=True)
    goals = [normal(*w.shape, seed=7) for w in variables]

    def upper_loss(_: Any) -> Tensor:
        return sum((u * w * goal).sum() for w, goal in zip(variables, goals, strict=True))

    upper = FunctionLevel(upper_loss, [u], name="upper")
    return upper, FunctionLevel(lambda _: loss() * u.exp(), list(variables), name="lower")


def solution(levels: tuple[Problem, Problem], **options: Any) -> Tensor:
    """What the approximation alone makes of b = ∂F/∂w."""
    oracle = open_oracle(*levels)
    with oracle.open():
        solver = KFAC(steps=0, **options)
        actual = solver.solve(lambda v: v, oracle.upper_gradient.b, solver.inverse(oracle))
    assert actual.residual is None and actual.steps == 0
    return flat(actual.v)


def b_of(levels: tuple[Problem, Problem]) -> Tensor:
    return flat(open_oracle(*levels).upper_gradient.b)


def row_gradients(rows: Sequence[Tensor], variables: Sequence[Tensor]) -> Tensor:
    """∂f_i/∂w, ``(rows, n)``, times the e of `over`."""
    actual = [torch.autograd.grad(row, variables, retain_graph=True) for row in rows]
    return torch.e * torch.stack([flat(parts) for parts in actual])


def dense(gradients: Tensor, damping: float, b: Tensor) -> Tensor:
    """(mean ggᵀ + damping·I)⁻¹ b."""
    fisher = gradients.T @ gradients / len(gradients)
    return torch.linalg.solve(fisher + damping * torch.eye(len(b), dtype=b.dtype), b)


@pytest.mark.parametrize("bias", [True, False])
def test_where_the_fisher_matrix_is_a_product_the_solution_is_exact(bias: bool) -> None:
    """Each of 5 inputs with each of 4 residuals: the one is independent of the other."""
    layer = nn.Linear(3, 2, bias=bias).double()
    x, residuals = normal(5, 3).repeat_interleave(4, 0), normal(4, 2, seed=1).repeat(5, 1)
    y = (layer(x) - residuals).detach()

    def rows() -> Tensor:
        return (layer(x) - y).square().sum(1) / 2

    variables = list(layer.parameters())
    levels = over(variables, lambda: rows().mean())
    expected = dense(row_gradients(list(rows()), variables), DAMPING, b_of(levels))
    torch.testing.assert_close(solution(levels, damping=DAMPING), expected, rtol=1e-10, atol=1e-12)


class Sequences(nn.Module):
    """One layer over tokens, with a nonlinear loss for each row."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 4, bias=bias).double()
        self.x, self.y = normal(6, 5, 3), normal(6, 5, 4, seed=1)

    def rows(self) -> Tensor:
        return (self.layer(self.x).tanh() - self.y).square().sum((1, 2))


@pytest.mark.parametrize("max_size", [0, 3, 2048])
@pytest.mark.parametrize("bias", [True, False])
def test_corrected_eigenvalues_are_the_second_moments_of_the_rows_gradients(
    bias: bool, max_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the bases of the factors; a side of more than ``MAX_SIDE`` has none."""
    monkeypatch.setattr(kronecker, "MAX_SIDE", max_size)
    net = Sequences(bias)
    variables = list(net.layer.parameters())
    _, samples = layers_of(*over(variables, lambda: net.rows().mean()))
    (block,) = empirical_fisher(samples, variables)

    out = net.layer(net.x)
    delta = torch.autograd.grad((out.tanh() - net.y).square().sum() * torch.e, out)[0]
    x = torch.cat([net.x, torch.ones(6, 5, 1).double()], -1) if bias else net.x
    bases = []
    for side, factor in (
        (block.left, delta.flatten(0, 1) / 6**0.5),
        (block.right, x.flatten(0, 1)),
    ):
        size = factor.shape[1]
        if size > max_size:
            assert side is None
            bases.append(torch.eye(size).double())
        else:
            assert side is not None
            rotated = side.T @ factor.T @ factor @ side
            torch.testing.assert_close(rotated, rotated.diagonal().diag(), rtol=0, atol=1e-10)
            bases.append(side)
    gradients = delta.mT @ x  # (rows, out, in + 1)
    moments = (bases[0].T @ gradients @ bases[1]).square().mean(0)
    torch.testing.assert_close(block.values, moments, rtol=1e-10, atol=1e-12)


def test_variables_of_no_layer_have_the_mean_eigenvalue() -> None:
    net, scale = Sequences(), normal(4, seed=4).requires_grad_()

    def loss() -> Tensor:
        return (net.layer(net.x).tanh() * scale - net.y).square().sum((1, 2)).mean()

    variables = [scale, *net.layer.parameters()]
    levels = over(variables, loss)
    _, samples = layers_of(*levels)
    (block,) = empirical_fisher(samples, variables)
    mean, b = block.values.mean(), b_of(levels)[:4]
    for damping, shift in ((0.3, 0.3), (None, RELATIVE_DAMPING * mean)):
        actual = solution(levels, damping=damping)[:4]
        torch.testing.assert_close(actual, b / (mean + shift), rtol=1e-10, atol=1e-12)


def test_a_layer_without_a_gradient_has_the_mean_eigenvalue_of_the_others() -> None:
    """LoRA's A where B is zero: neither has curvature that a row shows, nor may v be infinite."""
    net, idle = Sequences(), nn.Linear(3, 2).double()
    variables = [*net.layer.parameters(), *idle.parameters()]
    levels = over(variables, lambda: (net.rows() + 0 * idle(net.x).sum((1, 2))).mean())
    actual = solution(levels)
    assert actual.isfinite().all()
    b = b_of(levels)
    ratios = actual[16:] / b[16:]
    torch.testing.assert_close(ratios, ratios[:1].expand(8), rtol=1e-10, atol=0)


def adapted(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Problem, Problem]:
    """An adapter and a head below; weights of eight rows above."""
    options = {"target_modules": ["first"], "modules_to_save": ["head"], **options}
    model = randomise(wrap(Layers(), lora_dropout=0.2, **options)).to(dtype)
    rows = [sequences(8, seed) for seed in range(2)]
    with torch.no_grad():
        for values in (*model.parameters(), *(each["x"] for each in rows)):
            values.copy_(values.bfloat16())  # of the same value in every dtype
    levels = weighted("index", model, 8, dtype)
    for level, each in zip(levels, rows, strict=True):
        level.batches = DataStream([{**each, "x": each["x"].to(dtype)}], level.name)
    return levels


def layers_of(upper: Problem, lower: Problem) -> tuple[set[str], Any]:
    """The names of the variables of layers, and the rows of each layer."""
    oracle = open_oracle(upper, lower, seed=0)
    with oracle.open():
        samples = layer_samples(oracle)
    numbers = {k for layer in samples for k in (layer.weight, layer.bias) if k is not None}
    return {lower.names[k] for k in numbers}, samples


def test_the_fast_dora_layer_has_the_factors_of_the_plain_one() -> None:
    """The fast layer is one autograd function, whose matrix products nobody sees."""
    levels = adapted()
    plain = layers_of(*levels)[1]
    use_fast_dora(levels[1].model)
    fast = layers_of(*levels)[1]
    assert plain.keys() == fast.keys() and len(plain) == 3
    for layer, pairs in plain.items():
        for (x, delta), (x_fast, delta_fast) in zip(pairs, fast[layer], strict=True):
            torch.testing.assert_close(x_fast, x)
            assert delta_fast.shape == delta.shape  # it has the norm in its graph


@pytest.mark.parametrize("product", ["exact", "difference"])
def test_half_precision_has_the_factors_of_single_precision(product: str) -> None:
    actual = []
    for dtype in (torch.bfloat16, torch.float32):
        upper, lower = adapted(dtype, use_dora=False)
        h = hypergradient(upper, lower, f"kfac:steps=0,product={product}", seed=0)
        actual.append([part.double() for part in h])
        names, samples = layers_of(upper, lower)
        assert names == set(lower.names)
        assert all(x.dtype != torch.bfloat16 for pairs in samples.values() for x, _ in pairs)
    assert relative_error(*actual) < 5e-2


def badly_scaled() -> tuple[Problem, Problem]:
    """Least squares whose features have sizes between 1 and 10: H has eigenvalues of 1 to 100."""
    layer = nn.Linear(8, 2, bias=False).double()
    x, y = normal(100, 8) * torch.logspace(0, 1, 8).double(), normal(100, 2, seed=1)
    return over([layer.weight], lambda: (layer(x) - y).square().sum(1).mean() / 2)


@pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")
def test_as_a_preconditioner_it_saves_products() -> None:
    levels = badly_scaled()
    exact = flat(hypergradient(*levels, "exact"))
    kfac, cg = (
        relative_error(hypergradient(*levels, f"{name}:steps=4"), exact) for name in ("kfac", "cg")
    )
    assert kfac < cg


@pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")
@pytest.mark.parametrize("method", ["kfac:steps=1", "kfac:steps=5"])
def test_scaling_f_changes_nothing_after_a_step(method: str) -> None:
    upper, lower = badly_scaled()
    expected = flat(hypergradient(upper, lower, method))
    scaled = FunctionLevel(lambda _: 2.0**20 * lower.function(None), lower.variables)
    actual = flat(hypergradient(upper, scaled, method))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


def test_without_layers_it_is_conjugate_gradients_or_an_error() -> None:
    levels = program(0).levels()
    actual = flat(hypergradient(*levels, "kfac:steps=6"))
    assert torch.equal(actual, flat(hypergradient(*levels, "cg:steps=6")))
    with pytest.raises(ProblemError, match=r"kfac: Level .*no linear layer.*steps=10"):
        hypergradient(*levels, "kfac:steps=0")


def test_numbers_that_are_not_finite_are_errors() -> None:
    net = Sequences()
    upper, lower = over(list(net.layer.parameters()), lambda: net.rows().mean())
    net.y[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"kfac: lower: the loss is nan"):
        hypergradient(upper, lower, "kfac")
    upper, lower = over(
        list(net.layer.parameters()), lambda: torch.where(net.y > 1e9, net.layer(net.x), 1.0).mean()
    )
    lower.evaluate(None)  # a level looks at its precision when it is first evaluated
    net.x[0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"kfac: .*linear layer"):
        hypergradient(upper, lower, "kfac")


def test_a_chain_is_refused() -> None:
    net = Sequences()
    upper, lower = over(list(net.layer.parameters()), lambda: net.rows().mean())
    top = FunctionLevel(lambda _: upper.variables[0].square(), [torch.ones(1).requires_grad_()])
    chain = Nested(upper, lower, "cg:product=difference")
    with pytest.raises(ProblemError, match=r"kfac supports two levels.*cg.*product"):
        hypergradient(top, chain, "kfac:product=difference")


def test_at_negative_curvature_the_factored_matrix_is_inverted_alone() -> None:
    """And not b's solution 0, with which no row would count."""
    net, scale = Sequences(), normal(4, seed=4).requires_grad_()
    levels = over([*net.layer.parameters(), scale], lambda: (net.rows() * scale.sum()).mean())
    alone = solution(levels)
    oracle = open_oracle(*levels)
    with oracle.open():
        solver = KFAC(steps=3)
        actual = solver.solve(lambda v: -v, oracle.upper_gradient.b, solver.inverse(oracle))
    torch.testing.assert_close(flat(actual.v), alone)
    assert "negative curvature" in actual.note and actual.residual == 1


@pytest.mark.parametrize(
    "slopes",
    [
        lambda net, x: vmap(grad(lambda row: net(row)[0]))(x),
        lambda net, x: vmap(jacrev(net))(x)[:, 0],
        lambda net, x: net(nested_tensor([x[:2], x[2:]], layout=torch.jagged)).values(),
    ],
)
def test_layers_inside_of_a_transform_or_on_nested_tensors(slopes: Callable[..., Tensor]) -> None:
    """As in a loss of a network's derivatives; kfac is then cg."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    w, x = list(net.parameters()), normal(6, 3)

    def loss() -> Tensor:
        return slopes(net, x).square().mean() + sum(p.square().sum() for p in w)

    kfac, cg = (
        flat(hypergradient(*over(w, loss), name)) for name in ("kfac:steps=9", "cg:steps=9")
    )
    torch.testing.assert_close(kfac, cg)
    with pytest.raises(ProblemError, match="calls no linear layer"):
        hypergradient(*over(w, loss), "kfac:steps=0")
