"""Models and functions of `torch.compile` have the hypergradient of those that are not compiled."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hyperopt_peft import Engine, Problem, attribute, hypergradient
from tests.support.networks import Network, loader, network_levels
from tests.support.quadratic import FunctionLevel, flat, taken

# PyTorch warns that a hook of all modules sees a compiled model twice, which is harmless.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Using .torch.compile.module", "ignore:.* the relative residual is"
)

METHODS = ("direct", "darts", "minres:steps=3", "unrolled", "f2sa")
Way = Callable[[nn.Module], Callable[[Tensor], Tensor]]


def in_place(net: nn.Module) -> Callable[[Tensor], Tensor]:
    net.compile(backend="aot_eager")
    return net


def in_half(net: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float()

    return run


def other_masks(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
    """A backend whose random numbers are others than PyTorch's own, as inductor's are."""

    def run(*inputs: Any) -> Any:
        torch.rand(1)
        return graph(*inputs)

    return run


WAYS: dict[str, Way] = {
    "model.compile": in_place,
    "a compiled model": lambda net: torch.compile(net, backend="aot_eager"),
    "a compiled function": lambda net: torch.compile(lambda x: net(x), backend="aot_eager"),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    torch.compiler.reset()


def levels(way: Way, *, dropout: float = 0.3) -> tuple[Problem, Problem]:
    """Levels over a network with dropout and batch normalisation, which ``way`` calls."""
    above, below = network_levels(dropout=dropout)
    u, w = above.variables, below.variables
    call, (x, y) = way(above.net), next(iter(loader(18)))

    def loss(x: Tensor) -> Tensor:
        pull = sum(v.square().sum() for v in (*u, *w))
        return cross_entropy(call(x), y) + 0.05 * pull

    upper = FunctionLevel(lambda _: loss(x + 1), u, lr=0.0)
    return upper, FunctionLevel(lambda _: loss(x), w, lr=0.0)


def trained(method: str, way: Way, **options: Any) -> Tensor:
    """The hypergradient of an `Engine`, after a lower step with the rate 0."""
    engine = Engine(*levels(way, **options), method, progress=False)
    torch.manual_seed(5)
    return taken(engine)[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_hypergradients(method: str, way: str) -> None:
    expected = flat(hypergradient(*levels(lambda net: net), method, seed=0))
    made = levels(WAYS[way])
    assert torch.equal(flat(hypergradient(*made, method, seed=0)), expected)
    assert torch.equal(flat(hypergradient(*made, method, seed=0)), expected)  # buffers as before


def test_a_difference_subtracts_nothing_of_other_dropout_masks() -> None:
    """The ∂f/∂u of a compiled lower step has masks that no later pass can have."""
    method = "darts:scheme=forward"
    actual = trained(method, lambda net: torch.compile(net, backend=other_masks))
    torch.testing.assert_close(actual, trained(method, lambda net: net))


def scores(way: Way) -> Tensor:
    """Of four rows, after nine steps with dropout."""
    torch.manual_seed(0)
    net, v, (x, y) = Network(), torch.ones(4, requires_grad=True), next(iter(loader(18)))
    call, w = way(net), [p for p in net.parameters() if p.requires_grad]

    def losses(x: Tensor) -> Tensor:
        return cross_entropy(call(x), y, reduction="none")

    lower = FunctionLevel(lambda _: (v * losses(x)).mean(), w, lr=0.1)
    options: dict[str, Any] = {"training_steps": 9, "progress": False}
    return attribute(lower, v, lambda: losses(x.flip(0)).mean(), **options).scores


def test_attribution_differentiates_the_steps_of_the_run() -> None:
    """On the dropout masks that they had."""
    actual = scores(lambda net: torch.compile(net, backend=other_masks))
    torch.testing.assert_close(actual, scores(lambda net: net))


def test_half_precision_inside_of_a_compiled_function_is_seen() -> None:
    """Its part of autograd's graph is hidden, and a difference of eight bits would be rounding."""
    actual = trained("darts", lambda net: torch.compile(in_half(net), backend="aot_eager"))
    torch.testing.assert_close(actual, trained("darts", in_half))
