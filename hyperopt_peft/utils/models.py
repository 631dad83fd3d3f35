"""Helpers for models with adapters, and for layers with 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.types import Model

#: Parts of the class names of layers that round activations: LLM.int8 (bitsandbytes) and FP8
#: (torchao, Transformers). Names are compared, since these libraries are optional.
ROUNDING = ("8bit", "fp8", "float8")
#: Whose models, heads and wrappers have the mean over labels as their loss, if they have one.
LIBRARIES = {"accelerate", "hyperopt_peft", "liger_kernel", "peft", "torch", "transformers", "trl"}
NO_DIFFERENCE = "direct or product=dots, or load the model in 4 bits or in bf16"


def base_model(model: Model) -> Any:
    """The pretrained model inside a PeftModel; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def require_unwrapped(model: object) -> None:
    """Raise ProblemError if ``model`` is a PeftModel within what `torch.compile` returns."""
    if hasattr(model, "_orig_mod") and hasattr(model, "peft_config"):
        raise ProblemError(
            "model: torch.compile(model) hides the PeftModel; give the model itself, compiled in "
            "place by model.compile()"
        )


def hook_calls(
    model: Model,
    before: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
    after: Callable[[tuple[Any, ...], dict[str, Any], Any], None] | None = None,
) -> list[Any]:
    """Call ``before`` and ``after`` once around each forward pass of ``model``; returns handles.

    A pass begins at the adapter's wrapper, or at the base model. Until PEFT 0.21 the wrapper calls
    ``forward`` of the base model, which runs no hook of it, so that both have hooks.
    """
    depth = 0

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal depth
        depth += 1
        if depth == 1 and before is not None:
            before(args, kwargs)

    def end(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0 and after is not None:
            after(args, kwargs, output)

    handles: list[Any] = []
    for module in {id(x): x for x in (model, base_model(model))}.values():
        handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(module.register_forward_hook(end, with_kwargs=True, always_call=True))
    return handles


_UNCOUNTED = ContextVar("uncounted", default=False)


@contextmanager
def uncounted() -> Iterator[None]:
    """No pass in the body counts, since it only measures."""
    token = _UNCOUNTED.set(True)
    try:
        yield
    finally:
        _UNCOUNTED.reset(token)


def is_uncounted() -> bool:
    """Whether the code runs within `uncounted`."""
    return _UNCOUNTED.get()


def trainable(model: Model, *, without: Iterable[Tensor] = ()) -> list[tuple[str, Tensor]]:
    """The names and parameters of ``model`` that require a gradient, except ``without``.

    Raises:
        ProblemError: there is none.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> [name for name, _ in trainable(model, without=[model.weight])]
        ['bias']
    """
    excluded, named = {id(parameter) for parameter in without}, model.named_parameters()
    found = [(name, p) for name, p in named if p.requires_grad and id(p) not in excluded]
    if not found:
        raise ProblemError(
            "model: no parameter is left for the lower level; load an adapter with "
            "PeftModel.from_pretrained(..., is_trainable=True)"
        )
    return found


def keep_differentiable(model: Model) -> None:
    """Keep the 4-bit layers of ``model`` differentiable after passes in evaluation mode.

    On a CPU with AVX512-BF16 instructions such a pass packs the weights of bitsandbytes' layers for
    a kernel without a derivative. All later passes, even in training, would then lack the gradient
    of a layer's input, without an error. This function unpacks the layers permanently.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # unpacks


@contextmanager
def in_mode(model: Model, training: bool) -> Iterator[None]:
    """Training or evaluation mode in the body; modes and buffers are restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(x, x.clone()) for x in model.buffers()] if training else []
    keep_differentiable(model)
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):  # else a graph may hold it
                    buffer.copy_(value)


def evaluating(model: Model) -> AbstractContextManager[None]:
    """Evaluation mode in the body; the mode of each module is restored afterwards."""
    return in_mode(model, False)


def own_loss_of(model: Model) -> str:
    """What makes the loss of ``model`` another than a known library's, or the empty string.

    It is a ``forward`` or a ``loss_function`` that a module outside of `LIBRARIES` defines,
    wrappers of the library's own function included.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> own_loss_of(model)
        ''
        >>> model.loss_function = max
        >>> own_loss_of(model)
        'Linear.loss_function'
    """
    models = [getattr(x, "_orig_mod", x) for x in (model, base_model(model))]  # of torch.compile
    for module in {id(x): x for x in models}.values():
        functions = [("forward", module.forward)]
        if callable(function := getattr(module, "loss_function", None)):
            functions.append(("loss_function", function))
        for name, function in functions:
            if not is_stock(function):
                return f"{type(module).__name__}.{name}"
    return ""


def is_stock(function: Any) -> bool:
    """Whether ``function``, and each one that it wraps, is defined in one of `LIBRARIES`."""
    while function is not None:
        wraps = isinstance(function, partial) and hasattr(function, "__wrapped__")  # accelerate's
        own = function.func if wraps else function
        place = getattr(own, "__globals__", {}).get("__name__") or type(own).__module__
        if place.partition(".")[0] not in LIBRARIES:
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def rounds_activations(module: nn.Module) -> bool:
    """Whether ``module`` rounds its input to 8 bits; layers that only round weights do not.

    A loss with such layers is piecewise constant, so that a difference of its gradients at close
    points is not a derivative. On CPUs bitsandbytes rounds only in evaluation mode; its layers
    still count, since on GPUs they round in training too.
    """
    weight = module._parameters.get("weight")  # torchao's layers have no class of their own
    kind: Any = type(module)
    return _rounds_by_class(kind) or (
        getattr(weight, "act_quant_kwargs", None) is not None
        or type(weight).__name__ == "LinearActivationQuantizedTensor"
    )


@cache  # each upper step asks for all modules
def _rounds_by_class(kind: type) -> bool:
    return any(word in base.__name__.lower() for base in kind.__mro__ for word in ROUNDING)


def require_no_rounding(modules: Iterable[nn.Module]) -> None:
    """Raise ProblemError if one of ``modules`` `rounds_activations`."""
    if names := {type(module).__name__ for module in modules if rounds_activations(module)}:
        raise ProblemError(
            f"{', '.join(sorted(names))}: the layer rounds activations to 8 bits, so that a "
            f"difference of gradients is not a derivative; choose product=exact, {NO_DIFFERENCE}"
        )
