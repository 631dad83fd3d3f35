"""Half precision: perturbations and products happen in float32, and nothing drifts."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from hyperopt_peft import Engine, Problem, ProblemError, hypergradient
from hyperopt_peft.hypergradients import Vector
from hyperopt_peft.hypergradients.estimate import open_oracle
from hyperopt_peft.hypergradients.products import Scheme
from hyperopt_peft.utils.precision import SinglePrecision
from tests.support.minilm import cosine, levels, minilm
from tests.support.networks import differences
from tests.support.quadratic import FunctionLevel, Once, Program, flat, program, taken

ORDERS = {"forward": 1, "central": 2}
METHODS = ("darts:scheme=forward", "darts:scheme=central", "darts:product=exact")


def narrowed(model: PeftModel, *, adapter: bool) -> PeftModel:
    """In bfloat16; without ``adapter`` PEFT's way: the adapter stays in float32."""
    for name, parameter in model.named_parameters():
        if adapter or "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    return model


HALF: dict[str, Callable[[], tuple[PeftModel, bool]]] = {
    "all in bfloat16": lambda: (narrowed(minilm(), adapter=True), False),
    "base in bfloat16": lambda: (narrowed(minilm(), adapter=False), False),
    "autocast": lambda: (minilm(), True),
}


def half_and_single(way: str) -> tuple[PeftModel, bool, PeftModel]:
    """A model, whether it runs under autocast, and the float32 model at the same parameters."""
    (model, autocast), reference = HALF[way](), minilm()
    with torch.no_grad():
        for wide, narrow in zip(reference.parameters(), model.parameters(), strict=True):
            wide.copy_(narrow)
    return model, autocast, reference


@pytest.mark.parametrize(
    ("way", "method"),
    [
        pytest.param(way, method, marks=[pytest.mark.slow] * (way == "base in bfloat16"))
        for way, method in zip(HALF, METHODS)
    ],
)
def test_half_precision_has_the_hypergradient_of_single_precision(way: str, method: str) -> None:
    """At the same, rounded, parameters and masks."""
    model, autocast, reference = half_and_single(way)
    before = [(p.dtype, p.data_ptr(), p.detach().clone()) for p in model.parameters()]

    half = levels(model, autocast=autocast)
    single = levels(reference)
    direct = flat(hypergradient(*half, "direct", seed=0)).float()
    actual = hypergradient(*half, method, seed=0)
    exact = hypergradient(*single, "darts:product=exact", seed=0)
    assert cosine(actual, exact) >= 0.999
    implicit = flat(exact) - flat(hypergradient(*single, "direct", seed=0))
    assert cosine([flat(actual).float() - direct], [implicit]) >= 0.999

    assert [h.dtype for h in actual] == [v.dtype for v in half[0].variables]
    assert not differences(
        before, [(p.dtype, p.data_ptr(), p.detach().clone()) for p in model.parameters()]
    )


@pytest.mark.parametrize(
    ("way", "scheme"),
    [("autocast", "forward"), pytest.param("all in bfloat16", "central", marks=pytest.mark.slow)],
)
def test_in_training_nothing_of_half_precision_enters_a_difference(way: str, scheme: str) -> None:
    """The lower step's own ∂f/∂u, of eight bits, is no term of a quotient with a small step."""
    model, autocast, reference = half_and_single(way)
    actual = []
    for net, half, method in (
        (model, autocast, f"darts:scheme={scheme}"),
        (reference, False, "darts:product=exact"),
    ):
        upper, lower = levels(net, autocast=half)
        assert upper.optimizer is not None and lower.optimizer is not None
        lower.optimizer.param_groups[0]["lr"] = 0.0
        torch.manual_seed(5)
        actual.append(taken(Engine(upper, lower, method, progress=False)))
    assert cosine(*actual) >= 0.999


X, Y = (torch.randn(64, n, generator=torch.Generator().manual_seed(n)) for n in (32, 8))


def two_layers(autocast: tuple[bool, bool], *, modules: bool) -> tuple[Problem, Problem]:
    """A network whose upper and lower loss run in bfloat16 or not, through modules or not."""
    torch.manual_seed(1)
    first, head, u = nn.Linear(32, 16), nn.Linear(16, 8), nn.Parameter(torch.ones(32))

    def net(x: Tensor) -> Tensor:
        if modules:
            return head(torch.tanh(first(x)))
        hidden = torch.tanh(linear(x, first.weight, first.bias))
        return linear(hidden, head.weight, head.bias)

    def loss(x: Tensor, half: bool) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            out = net(x)
        return (out.float() - Y).square().mean()

    w = [*first.parameters(), *head.parameters()]
    return (
        FunctionLevel(lambda _: loss(X + 1, autocast[0]), [u]),
        FunctionLevel(lambda _: loss(X * u, autocast[1]), w),
    )


@pytest.mark.parametrize("modules", [False, True])
@pytest.mark.parametrize("autocast", [(True, True), (False, True), "around"])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_of_the_lower_loss_is_seen(modules: bool, autocast: Any, method: str) -> None:
    exact = hypergradient(*two_layers((False, False), modules=modules), "darts:product=exact")
    around = autocast == "around"
    levels = two_layers((False, False) if around else autocast, modules=modules)
    if around:
        levels[1].evaluate(None)  # first without
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
        assert cosine(hypergradient(*levels, method), exact) >= 0.999


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_the_radius_fits_precision_and_size(dtype: torch.dtype, size: float, scheme: str) -> None:
    """On w ↦ Σ u·size·sin(w/size), which varies over lengths of ``size``."""
    torch.manual_seed(0)
    w = (size * torch.randn(20, dtype=dtype)).requires_grad_()
    u = torch.randn(20, dtype=dtype, requires_grad=True)
    upper = FunctionLevel(lambda _: w.square().sum() / size + u.sum(), [u])
    lower = FunctionLevel(lambda _: (u * size * torch.sin(w / size)).sum(), [w])
    exact = flat(hypergradient(upper, lower, "darts:product=exact"))
    actual = flat(hypergradient(upper, lower, f"darts:scheme={scheme}"))
    error = float((actual - exact).norm() / exact.norm())
    # The length grows as a root of the point's length: too long a step for a function that varies
    # over shorter lengths, a little short for one that varies over longer ones.
    order = ORDERS[scheme]
    scale = max((1 / size) ** order, size ** (order / (1 + order)))
    assert error < 30 * torch.finfo(dtype).eps ** (order / (1 + order)) * scale


@pytest.mark.parametrize("length", [1e-39, 1.0, 1e36])
@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_a_difference_is_along_a_direction_of_any_length(length: float, scheme: Scheme) -> None:
    """Of a quadratic, whose Hessian is 1, …, 6; 1/1e-39 and the squares are beyond float32."""
    w, diagonal = torch.ones(6, requires_grad=True), torch.arange(1.0, 7)
    lower = FunctionLevel(lambda _: diagonal @ w.square() / 2, [w])
    oracle = open_oracle(FunctionLevel(lambda _: w.sum(), [torch.ones(1).requires_grad_()]), lower)
    v = Vector([length * torch.ones(6) / 6**0.5])
    with oracle.open(), oracle.product("difference", epsilon=1.0, scheme=scheme) as product:
        actual = product.hessian(v)
    torch.testing.assert_close(actual.flat() / v.flat(), diagonal, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["darts", "darts:scheme=forward", "unrolled:product=difference"])
def test_the_radius_follows_the_upper_variables_too(method: str) -> None:
    """∂f/∂u is rounded to the precision of u, however wide w is."""
    torch.manual_seed(0)
    w = torch.randn(20, dtype=torch.float64, requires_grad=True)
    u = torch.randn(20, requires_grad=True)
    upper = FunctionLevel(lambda _: w.square().sum() + u.sum(), [u])
    lower = FunctionLevel(lambda _: (u.double() * torch.sin(w)).sum(), [w], lr=1.0)
    exact = flat(hypergradient(upper, lower, "darts:product=exact"))
    actual = flat(hypergradient(upper, lower, method))
    order = 1 if "scheme=forward" in method else 2
    error = float((actual - exact).norm() / exact.norm())
    assert error < 3 * torch.finfo(torch.float32).eps ** (order / (1 + order))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["cg", "minres", "exact", "neumann", "unrolled:steps=3"])
def test_solvers_run_in_single_precision(dtype: torch.dtype, method: str) -> None:
    """A recurrence at eight bits would end far from the solution."""

    def cast(program: Program, dtype: torch.dtype) -> Program:
        parts = {f.name: getattr(program, f.name) for f in dataclasses.fields(program)}
        owned = {
            key: [v.detach().to(dtype).requires_grad_() for v in parts.pop(key)] for key in "wu"
        }
        return Program(**owned, **{key: matrix.to(dtype) for key, matrix in parts.items()})

    narrow = cast(program(0), dtype)
    actual = hypergradient(*narrow.levels(), method)
    assert [h.dtype for h in actual] == [dtype] * len(narrow.u)
    expected = flat(hypergradient(*cast(narrow, torch.float64).levels(), method))
    assert (flat(actual) - expected).norm() / expected.norm() < 2 * torch.finfo(dtype).eps


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.bfloat16(),
        lambda x: x.to(dtype=BF16),
        lambda x: x.type(BF16),
        lambda x: torch.zeros(2, dtype=BF16),
        lambda x: torch.softmax(x, 0, dtype=BF16),
    ],
)
def test_nothing_becomes_half_precision(make: Callable[..., Tensor]) -> None:
    assert make(torch.ones(2)).dtype is BF16
    with SinglePrecision():
        assert make(torch.ones(2)).dtype is torch.float32


@pytest.mark.parametrize(
    "change", [lambda x: x.__setitem__(0, 5), lambda x: x.mul_(3), lambda x: torch.add(x, 2, out=x)]
)
def test_operations_in_place_reach_the_tensor_itself(change: Callable[[Tensor], object]) -> None:
    """A half-precision mask or cache that a loss writes to is not a widened copy."""
    actual, expected = torch.ones(3, dtype=BF16), torch.ones(3, dtype=BF16)
    change(expected)
    with SinglePrecision():
        change(actual)
    assert torch.equal(actual, expected)


class Recorded(Once):
    """x², whose backward pass records the dtype of a cast and whether autocast is enabled."""

    seen: ClassVar[list[tuple[torch.dtype, bool]]] = []

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        Recorded.seen.append((x.bfloat16().dtype, torch.is_autocast_enabled("cpu")))
        return 2 * x * slope


A, B = (torch.arange(1.0, 4, requires_grad=True) for _ in range(2))


def cubes() -> tuple[Tensor, Tensor, Tensor]:
    """A², (A²)·B and ΣA³, of which the first is no leaf."""
    square = Recorded.apply(A)
    return square, square * B, (square * A).sum()


def backward(call: Callable[[Tensor, Tensor, Tensor], object]) -> Callable[..., list[Any]]:
    """``call``, for the gradients that it writes."""

    def written(*outputs: Tensor) -> list[Any]:
        A.grad = B.grad = None
        call(*outputs)
        return [A.grad, B.grad, outputs[0].grad if outputs[0].retains_grad else None]

    return written


ONES, EYE = torch.ones(3), torch.eye(3)
grad = torch.autograd.grad
ENGINE: list[Callable[[Tensor, Tensor, Tensor], Any]] = [
    backward(lambda s, p, z: z.backward()),
    backward(lambda s, p, z: p.backward(2 * ONES, inputs=[s, B])),
    backward(lambda s, p, z: torch.autograd.backward([p, z], [ONES, None])),
    lambda s, p, z: grad((p, z), A, (ONES, None)),
    lambda s, p, z: grad(z, (A, B), materialize_grads=True),
    lambda s, p, z: grad(p, B, EYE, is_grads_batched=True),
    lambda s, p, z: grad(grad(z, A, create_graph=True)[0].sum(), A),
]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("call", ENGINE)
def test_a_backward_pass_is_in_single_precision_too(call: Callable[..., Any]) -> None:
    expected = call(*cubes())
    Recorded.seen.clear()
    with torch.autocast("cpu", torch.bfloat16), SinglePrecision():
        actual = call(*cubes())
    assert set(Recorded.seen) <= {(torch.float32, False)}
    assert len(actual) == len(expected)
    for got, known in zip(actual, expected, strict=True):
        assert (got is None and known is None) or torch.equal(got, known)


def test_reentrant_checkpointing_is_refused() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 1)
    x = torch.randn(3, 4, requires_grad=True)
    hidden = partial(checkpoint, first, use_reentrant=True)
    lower = FunctionLevel(lambda _: second(hidden(x)).sum(), second.parameters())
    upper = FunctionLevel(lambda _: second(hidden(x)).sum(), first.parameters())
    with pytest.raises(ProblemError, match="use_reentrant"):
        hypergradient(upper, lower, "darts")
