"""Queries of a loss's autograd graph, and helpers for custom autograd functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.nn.modules import module as global_hooks

F = TypeVar("F", bound=Callable[..., Any])

HALF = (torch.bfloat16, torch.float16)
#: Packages whose autograd functions have backward passes without a graph.
KERNELS = ("liger_kernel.", "trl.")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the autograd graph of ``tensors``, once."""
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [parent for parent, _ in node.next_functions]


def graph_leaves(tensor: Tensor) -> list[Tensor]:
    """The tensors whose ``.grad`` ``tensor.backward()`` writes."""
    leaves = (getattr(node, "variable", None) for node in graph_nodes([tensor]))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def once_differentiable_functions(tensor: Tensor) -> list[str]:
    """The names of the custom functions in the graph of ``tensor`` that are differentiable once.

    They are marked ``once_differentiable``, or belong to Liger or TRL, whose functions have no mark
    although their backward passes run in kernels, or write into memory, without a graph.
    """

    def marked(function: object) -> bool:  # the mark is a wrapper, defined in torch's own module
        backward = getattr(function, "backward", None)
        module: str = getattr(backward, "__globals__", {}).get("__name__", "")
        return module == "torch.autograd.function" or module.startswith(KERNELS)

    functions: set[Any] = {getattr(node, "_forward_cls", None) for node in graph_nodes([tensor])}
    return sorted(function.__name__ for function in functions if marked(function))


def raises_when_differentiated(node: Node) -> bool:
    """Whether ``node`` stands for the derivative of a non-differentiable operation, and raises."""
    return "Error" in node.name()


def lacks_second_derivative(error: RuntimeError) -> bool:
    """Whether ``error`` says that an operation has no second derivative."""
    words = ("not implemented", "double", "twice", "support automatic differentiation")
    return any(word in str(error) for word in words)


def needed_inputs(node: Any, count: int) -> tuple[bool, ...]:
    """Whether the running backward pass needs the gradient, for each of the first ``count`` inputs.

    ``node.needs_input_grad`` is True for every input that requires a gradient, but a pass over some
    variables (``backward(inputs=…)``) needs fewer. The ``count`` inputs must be tensors.
    """

    def is_needed(index: int) -> bool:
        if not node.needs_input_grad[index]:
            return False
        try:
            return bool(torch._C._will_engine_execute_node(node.next_functions[index][0]))
        except RuntimeError:  # a leaf among the inputs of autograd.grad
            return True

    return tuple(is_needed(index) for index in range(count))


def without_autocast(function: F) -> F:
    """``function``, a method of a custom autograd function, with autocast disabled."""

    @wraps(function)
    def run(*arguments: Any) -> Any:
        tensors = (x for x in arguments if isinstance(x, Tensor) and not x.is_meta)
        with torch.autocast(next((x.device.type for x in tensors), "cpu"), enabled=False):
            return function(*arguments)

    return run  # type: ignore[return-value]


def has_hooks(*modules: nn.Module) -> bool:
    """Whether one of ``modules`` has a hook, or a global forward or backward hook is registered.

    Global forward pre-hooks do not count: `utils.restore` and `utils.distributed` register some.
    """
    everywhere = global_hooks._global_forward_hooks or global_hooks._global_backward_hooks
    return bool(everywhere) or any(vars(module)[name] for module in modules for name in HOOKS)


def needs_plain_operations(*inputs: Tensor) -> bool:
    """Whether a function of ``inputs`` must use PyTorch's own operations now.

    A custom autograd function with only a backward pass fails inside `torch.func` transforms,
    forward-mode derivatives and `torch.jit.trace`.
    """
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or any(forward_ad.unpack_dual(x).tangent is not None for x in inputs)
    )


def function_modes_off() -> AbstractContextManager[None]:
    """Disable all active `torch.overrides.TorchFunctionMode`s in the body."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within the body, models and functions compiled by `torch.compile` run eagerly.

    A compiled function is differentiable only once. Temporary hooks and modes would trigger its
    recompilation until PyTorch gives up.
    """
    loaded = "torch._dynamo" in sys.modules  # it takes a second to import, and few runs need it
    with torch.compiler.set_stance("force_eager") if loaded else nullcontext():
        yield
