"""What PyTorch does not promise and `utils.autograd` uses: a failure names what moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from hyperopt_peft import ProblemError
from hyperopt_peft.core.validation import runs_in_half
from hyperopt_peft.utils import autograd


def handles(layer: nn.Module) -> list[tuple[str, Any]]:
    """A hook of each kind, on one layer, with the name that `HOOKS` has for it."""
    return [
        ("_forward_hooks", layer.register_forward_hook),
        ("_forward_pre_hooks", layer.register_forward_pre_hook),
        ("_backward_hooks", layer.register_full_backward_hook),
        ("_backward_pre_hooks", layer.register_full_backward_pre_hook),
    ]


def test_a_module_holds_its_hooks_in_dictionaries() -> None:
    layer = nn.Linear(2, 2)
    for name, register in handles(layer):
        assert not autograd.has_hooks(layer)
        handle = register(lambda *_: None)
        assert len(vars(layer)[name]) == 1 and autograd.has_hooks(layer), name
        handle.remove()
    assert {name for name, _ in handles(layer)} == set(autograd.HOOKS)


def test_hooks_of_all_modules() -> None:
    layer = nn.Linear(2, 2)
    for name, register in (
        ("_global_forward_hooks", modules.register_module_forward_hook),
        ("_global_backward_hooks", modules.register_module_full_backward_hook),
    ):
        handle = register(lambda *_: None)
        assert len(getattr(modules, name)) == 1 and autograd.has_hooks(layer), name
        handle.remove()
    handle = modules.register_module_forward_pre_hook(lambda *_: None)
    assert not autograd.has_hooks(layer)
    handle.remove()


def test_functorch_peek_interpreter_stack() -> None:
    assert torch._C._functorch.peek_interpreter_stack() is None
    seen: list[bool] = []

    def f(x: Tensor) -> Tensor:
        seen.append(autograd.needs_plain_operations(x))
        return x.sin().sum()

    x = torch.ones(3)
    for transform in (torch.func.grad, torch.func.vmap, torch.func.jacfwd):
        transform(f)(x)
    assert seen == [True] * 3


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_forward_mode_and_tracing() -> None:
    x = torch.ones(3)
    assert not autograd.needs_plain_operations(x)
    with torch.autograd.forward_ad.dual_level():
        assert not autograd.needs_plain_operations(x)
        dual = torch.autograd.forward_ad.make_dual(x, x)
        assert autograd.needs_plain_operations(torch.zeros(2), dual)
    seen: list[bool] = []

    def f(y: Tensor) -> Tensor:
        seen.append(autograd.needs_plain_operations(y))
        return y + 1

    torch.jit.trace(f, x)
    assert True in seen  # `trace` also runs the function itself, to compare


class Squared(torch.autograd.Function):
    """x², whose backward notes which gradients are asked for."""

    asked: tuple[bool, ...] = ()

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x.square() + y.square()

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor]:
        Squared.asked = autograd.needed_inputs(ctx, 2)
        return dz, dz


def test_will_engine_execute_node() -> None:
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    z = Squared.apply(2 * x, 3 * y).sum()
    z.backward(inputs=[y], retain_graph=True)
    assert Squared.asked == (False, True)
    torch.autograd.grad(z, x)
    assert Squared.asked == (True, False)


def test_the_graph_of_a_loss_tells_its_precision_and_reentrant_checkpoints() -> None:
    x = torch.ones(2, requires_grad=True)
    assert runs_in_half((x.bfloat16() * 2).float().sum(), "level")
    assert runs_in_half((x * 2).sum(), "level") is False
    with pytest.raises(ProblemError, match="reentrant"):
        runs_in_half(checkpoint(torch.sin, x, use_reentrant=True).sum(), "level")


def test_forward_cls_of_a_once_differentiable_function() -> None:
    x = torch.ones(2, requires_grad=True)
    assert autograd.once_differentiable_functions(Once.apply(x).sum()) == ["Once"]
    assert not autograd.once_differentiable_functions(Squared.apply(x, x).sum())


class Once(torch.autograd.Function):
    """2x, marked as differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy


def test_the_node_of_a_derivative_that_raises_has_error_in_its_name() -> None:
    x = torch.ones(2, requires_grad=True)
    (slope,) = torch.autograd.grad(Once.apply(x.sin()).square().sum(), x, create_graph=True)
    assert any(map(autograd.raises_when_differentiated, autograd.graph_nodes([slope])))
    (slope,) = torch.autograd.grad(x.sin().sum(), x, create_graph=True)
    assert not any(map(autograd.raises_when_differentiated, autograd.graph_nodes([slope])))


class Watch(TorchFunctionMode):
    """Has the names of the functions that a mode gets."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_a_mode_does_not_get_the_backward_pass_from_gradient_edges_but_what_is_in_it() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    z = (checkpoint(torch.sin, x * y, use_reentrant=False)).sum()
    result, inputs = get_gradient_edge(z), [get_gradient_edge(x), get_gradient_edge(y)]
    with Watch() as watch:
        slopes = torch.autograd.grad([result], inputs, retain_graph=True)
        torch.autograd.backward([result], inputs=inputs)
    assert not {"grad", "backward"} & set(watch.calls) and watch.calls.count("sin") == 2
    assert x.grad is not None and torch.equal(x.grad, slopes[0])
