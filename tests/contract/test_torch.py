"""What PyTorch does not promise and `utils.autograd` uses: a failure names what moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.utils.checkpoint import checkpoint

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


def test_input_metadata_has_the_dtypes_of_a_node() -> None:
    x = torch.ones(2, requires_grad=True)
    assert autograd.is_half((x.bfloat16() * 2).grad_fn)
    assert not autograd.is_half((x * 2).grad_fn)


def test_forward_cls_of_a_once_differentiable_function() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return 2 * dy

    x = torch.ones(2, requires_grad=True)
    assert autograd.once_differentiable_functions(Once.apply(x).sum()) == ["Once"]
    assert not autograd.once_differentiable_functions(Squared.apply(x, x).sum())


def test_the_node_of_a_reentrant_checkpoint_is_called_checkpoint_function() -> None:
    x = torch.ones(2, requires_grad=True)
    y = checkpoint(torch.sin, x, use_reentrant=True)
    assert any("CheckpointFunction" in type(node).__name__ for node in autograd.graph_nodes([y]))


def test_the_words_of_an_in_place_edit_that_autograd_refuses() -> None:
    leaf = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError) as refused:
        leaf.mul_(2)
    assert autograd.refuses_in_place_edit(refused.value)
    result = leaf.exp()
    with torch.no_grad():
        result.add_(1)  # exp's derivative is its result
    with pytest.raises(RuntimeError) as refused:
        result.sum().backward()
    assert autograd.refuses_in_place_edit(refused.value)
    assert not autograd.refuses_in_place_edit(RuntimeError("out of memory"))
