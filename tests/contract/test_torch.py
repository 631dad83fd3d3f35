"""What PyTorch does not promise and `utils.autograd` uses: a failure names what moved."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.utils.checkpoint import checkpoint

from hyperopt_peft import ProblemError
from hyperopt_peft.core.validation import runs_in_half
from hyperopt_peft.utils import autograd
from hyperopt_peft.utils.precision import SinglePrecision
from tests.support.quadratic import Once


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
    for name, register in (  # of all modules
        ("_global_forward_hooks", modules.register_module_forward_hook),
        ("_global_backward_hooks", modules.register_module_full_backward_hook),
    ):
        handle = register(lambda *_: None)
        assert len(getattr(modules, name)) == 1 and autograd.has_hooks(layer), name
        handle.remove()
    handle = modules.register_module_forward_pre_hook(lambda *_: None)
    assert not autograd.has_hooks(layer)
    handle.remove()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_transforms_forward_mode_and_tracing_need_plain_operations() -> None:
    assert torch._C._functorch.peek_interpreter_stack() is None
    x, seen = torch.ones(3), list[bool]()
    assert not autograd.needs_plain_operations(x)

    def f(x: Tensor) -> Tensor:
        seen.append(autograd.needs_plain_operations(x))
        return x.sin().sum()

    for transform in (torch.func.grad, torch.func.vmap, torch.func.jacfwd):
        transform(f)(x)
    assert seen == [True] * 3
    with torch.autograd.forward_ad.dual_level():
        assert not autograd.needs_plain_operations(x)
        dual = torch.autograd.forward_ad.make_dual(x, x)
        assert autograd.needs_plain_operations(torch.zeros(2), dual)
    seen.clear()
    torch.jit.trace(f, x)
    assert True in seen  # `trace` also runs the function itself, to compare


class Square(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.square())
    backward = staticmethod(lambda ctx, slope: slope)


def test_what_the_nodes_of_a_graph_tell() -> None:
    x = torch.ones(2, requires_grad=True)
    assert runs_in_half((x.bfloat16() * 2).float().sum(), "level")
    assert runs_in_half((x * 2).sum(), "level") is False
    assert autograd.once_differentiable_functions(Once.apply(x).sum()) == ["Once"]
    assert not autograd.once_differentiable_functions(Square.apply(x).sum())
    with pytest.raises(ProblemError, match="reentrant"):
        runs_in_half(checkpoint(torch.sin, x, use_reentrant=True).sum(), "level")
    for loss, raises in ((Once.apply(x.sin()).square(), True), (x.sin(), False)):
        (slope,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        found = map(autograd.raises_when_differentiated, autograd.graph_nodes([slope]))
        assert any(found) == raises


def test_function_modes_are_off_in_the_body() -> None:
    with SinglePrecision():
        with autograd.function_modes_off():
            assert torch.ones(1).bfloat16().dtype is torch.bfloat16
        assert torch.ones(1).bfloat16().dtype is torch.float32
