"""One level: what it accepts, how it evaluates, differentiates and steps."""

import math
from collections import namedtuple
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from hyperopt_peft import NonFiniteError, Problem, ProblemError
from hyperopt_peft.engine import fit
from tests.support.networks import differences
from tests.support.quadratic import FunctionLevel, leaf

Pair = namedtuple("Pair", "x y")


W, V = leaf(1.0, 2.0), leaf(3.0)
HALVED = W / 2


class Empty:
    def __iter__(self) -> Iterator[int]:
        return iter(())


class Rows(Problem):
    def loss(self, batch: Any) -> Tensor:
        return (W * batch["weight"]).sum()


def test_a_loss_that_lacks_its_batch_or_a_column_says_so() -> None:
    level = Rows([W])
    with pytest.raises(ProblemError, match="Rows"):
        level.evaluate(None)
    with pytest.raises(ProblemError, match="'weight'"):
        level.evaluate({"x": W, "y": W})
    with pytest.raises(TypeError, match="only integer tensors"):
        level.evaluate({"weight": "heavy"})


def evaluate(result: Any) -> Callable[[], object]:
    return lambda: FunctionLevel(lambda _: result, [W], name="fit").evaluate(None)


def level(*variables: Any, **options: Any) -> Problem:
    return Problem(list(variables), name="fit", **options)


SCHEDULE = ExponentialLR(SGD([W], lr=1), 0.9)


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: level(), "fit: the level has no variables"),
        (lambda: Problem(W), "variables.*Tensor"),
        (lambda: level(("scale", 2.0)), "variable 0"),
        (lambda: level(("m", torch.ones(2))), "m .*gradient"),
        (lambda: level(("half", HALVED)), "half"),
        (
            lambda: level(("wave", torch.ones(2, dtype=torch.complex64).requires_grad_())),
            "wave.*complex",
        ),
        (lambda: level(("a", W), ("b", W)), "a and b"),
        (lambda: level(W, W), "variable 0 and variable 1"),
        (lambda: level(("a", W), ("a", V)), "'a'"),
        (lambda: level(("a", W), ("b", V), optimizer=SGD([W], lr=1)), "optimizer.*'b'"),
        (lambda: level(W, optimizer=SGD([W, leaf(*[1.0] * 5)], lr=1)), r"optimizer.*\(5,\)"),
        (lambda: level(W, optimizer=SGD([W], lr=1), scheduler=SCHEDULE), "scheduler"),
        (lambda: level(W, scheduler=SCHEDULE), "scheduler"),
        (
            lambda: level(W, optimizer=(o := SGD([W], lr=1)), scheduler=ReduceLROnPlateau(o)),
            "ReduceLROnPlateau",
        ),
        (lambda: level(W, max_grad_norm=0.0), "max_grad_norm.*0.0"),
        (lambda: level(W, max_grad_norm="1"), "max_grad_norm.*'1'"),
        (lambda: level(W, data=3), "fit: data.*int"),
        (lambda: level(W, data=iter([1])), "data"),
        (lambda: level(W, data=[]), "fit: data"),
        (lambda: level(W, data=DataLoader([1, 2], batch_size=3, drop_last=True)), "data"),
        (lambda: level(W, data=Empty()).next_batch(), "data"),
        (lambda: level(W).evaluate(None), "fit: .*loss"),
        (lambda: level(W).step([W]), "fit: .*optimizer"),
        (evaluate(W), r"fit: loss.*\(2,\)"),
        (evaluate(1.5), "loss.*float"),
        (evaluate({"accuracy": 1.0, 3: 2}), "loss.*'accuracy', 3"),
        (evaluate(W.sum().detach()), "loss"),
    ],
)
def test_mistakes_are_named(construct: Callable[[], object], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        construct()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda: W.sum() * math.nan, "loss.*nan"),
        (lambda: W.sum() * -math.inf, "loss.*-inf"),
        (lambda: (W * 0).sum().sqrt() + 2, "gradient"),  # the root of 0 has no slope
    ],
)
def test_losses_and_gradients_that_are_not_finite_are_errors(loss: Any, message: str) -> None:
    with pytest.raises(NonFiniteError, match=f"fit: .*{message}"):
        FunctionLevel(lambda _: loss(), [W], name="fit").gradient(None, [W])


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e30), (torch.float16, 3e4)])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_squares_may_overflow(dtype: torch.dtype, size: float, limit: float | None) -> None:
    """Scaling by limit/∞ would make a finite gradient NaN, or nothing."""
    w = torch.ones(4, dtype=dtype, requires_grad=True)
    sgd = SGD([w], lr=1.0 if limit else 1 / size)
    level = FunctionLevel(
        lambda _: (w.double() * size).sum(), [w], optimizer=sgd, max_grad_norm=limit
    )
    (record,) = fit(level, 1, progress=False)
    assert record["grad_norm"] == pytest.approx(2 * size, rel=1e-3)
    torch.testing.assert_close(
        w.detach(), torch.full_like(w, 0.5 if limit else 0.0), atol=1e-3, rtol=0
    )


def test_a_gradient_whose_norm_is_not_finite_moves_nothing() -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    level = Problem([w], optimizer=SGD([w], lr=0.1), name="fit")
    with pytest.raises(NonFiniteError, match=r"fit: .*gradient.*inf"):
        level.step([torch.full_like(w, 1e300)])
    assert torch.equal(w, torch.ones_like(w)) and w.grad is None


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ([W, V], ("variable 0", "variable 1")),
        ({"a": W, "b": V}, ("a", "b")),
        ((pair for pair in [("a", W), ("b", V)]), ("a", "b")),
        (nn.ParameterDict({"a": nn.Parameter(W.detach())}).named_parameters(), ("a",)),
    ],
)
def test_variables_have_names(variables: Any, names: tuple[str, ...]) -> None:
    assert Problem(variables).names == names


@pytest.mark.parametrize(
    "result",
    [
        W.sum(),
        W.sum().reshape(1, 1),
        {"loss": W.sum(), "accuracy": torch.tensor(0.5), "rows": 3},
    ],
)
def test_a_loss_is_a_scalar_or_a_mapping_with_metrics(result: Any) -> None:
    loss, metrics = FunctionLevel(lambda _: result, [W]).evaluate(None)
    assert loss.shape == () and loss.item() == 3
    assert metrics == ({"accuracy": 0.5, "rows": 3.0} if isinstance(result, dict) else {})


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2),
        [torch.ones(2), torch.ones(3)],
        (torch.ones(2), "text"),
        {"x": torch.ones(2), "y": {"z": torch.ones(3)}},
        Pair(torch.ones(2), 3),
        BatchEncoding({"input_ids": torch.ones(2)}),
        None,
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_any_batch_reaches_the_loss_on_the_device_of_the_variables(batch: Any) -> None:
    received = []

    def loss(batch: Any) -> Tensor:
        received.append(batch)
        raise KeyboardInterrupt

    for device in ("cpu", "meta"):
        variable = torch.ones(2, device=device, requires_grad=True)
        level = FunctionLevel(loss, [variable], data=[deepcopy(batch)])
        with pytest.raises(KeyboardInterrupt):
            level.evaluate(level.next_batch())
    on_cpu, on_meta = received
    assert type(on_cpu) is type(on_meta) is type(batch)
    assert not differences(on_cpu, batch)
    assert all(tensor.device.type == "meta" for tensor in _tensors(on_meta))


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_a_loss_may_take_its_batch_apart(kind: type) -> None:
    """A product evaluates it on the same batch again."""
    batch = kind({"x": torch.ones(2), "labels": torch.zeros(2)})
    level = FunctionLevel(lambda batch: (batch.pop("labels") - W * batch["x"]).sum(), [W])
    assert level.evaluate(batch)[0] == level.evaluate(batch)[0] == -3
    assert set(batch) == {"x", "labels"}


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch.values() if hasattr(batch, "values") else batch
    nested = isinstance(batch, list | tuple) or hasattr(batch, "values")
    return [t for part in parts for t in _tensors(part)] if nested else []


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_leave_those_that_are_held_alone(fails: bool) -> None:
    w, v, unread = leaf(1.0, 2.0), leaf(3.0), leaf(4.0)
    w.grad = held = torch.full_like(w, 7)
    level = FunctionLevel(lambda _: (w * v).sum() * (math.nan if fails else 1), [w, v])
    if fails:
        with pytest.raises(NonFiniteError):
            level.gradient(None, [w, v, unread])
    else:
        evaluation = level.gradient(None, [w, v, unread])
        expected = (torch.tensor([3.0, 3.0]), torch.tensor([3.0]), None)
        assert not differences(evaluation.gradient, expected)
        assert evaluation.loss == 9 and evaluation.metrics == {}
    assert w.grad is held and torch.equal(held, torch.full_like(w, 7)) and v.grad is None


def test_a_step_is_that_of_the_optimizer_and_the_scheduler() -> None:
    w, twin = leaf(1.0, 2.0), leaf(1.0, 2.0)
    optimizer, reference = Adam([w], lr=0.1), Adam([twin], lr=0.1)
    level = Problem([w], optimizer=optimizer, scheduler=ExponentialLR(optimizer, 0.5))
    schedule = ExponentialLR(reference, 0.5)
    for k in range(3):
        gradient = torch.tensor([1.0, -2.0]) * (k + 1)
        assert level.step([gradient.clone()]) == pytest.approx((k + 1) * 5**0.5)
        twin.grad = gradient
        reference.step()
        schedule.step()
    assert torch.equal(w, twin) and w.grad is None
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
