"""A DoRA layer at about the cost of LoRA, with PEFT's own parameters, saving and merging.

PEFT forms B·A and V = W0 + s·B·A in every forward pass, and saves two outputs for the backward
pass. Here the row norms are computed from the factors (`row_norms`), and the layer is one autograd
node that saves only its input and its output (`function`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import suppress
from functools import partial, reduce
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from hyperopt_peft.adapters import peft_internals
from hyperopt_peft.adapters.dora.function import DoraDropoutLinear, DoraLinear
from hyperopt_peft.adapters.dora.row_norms import RowNorm, measure
from hyperopt_peft.adapters.dora.variants import NormGrad, adapted, peft_variant, set_forward
from hyperopt_peft.adapters.layers import (
    active_adapter,
    base_weight,
    dora_layers,
    factors,
    magnitude,
    require_plain,
)
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.autograd import has_hooks, needs_plain_operations


def use_fast_dora(peft_model: PeftModel, norm_grad: NormGrad = "full") -> PeftModel:
    """Give the linear layers of the active DoRA adapter a faster forward pass.

    Outputs equal PEFT's up to rounding. With ``norm_grad="detach"`` gradients do too; ``"full"``
    also differentiates through the row norm, which PEFT treats as a constant (arXiv:2402.09353,
    §4.3). Parameters, names, dropout, saving, merging and switching remain PEFT's.

    Layers that are not linear get the forward pass of `set_norm_grad`. A layer whose W0 cannot be
    read (quantised, sharded) keeps PEFT's forward pass and a constant row norm, with a warning.
    docs/adapters.md lists all cases. `set_norm_grad` undoes this function.

    The backward pass needs the output of the layer. Autograd therefore refuses an operation that
    changes it in place, such as ``nn.ReLU(inplace=True)`` directly after the layer.

    Returns:
        ``peft_model`` itself.

    Raises:
        ProblemError: ``norm_grad`` is not one of these; or as `dora_layers`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> config = LoraConfig(r=2, use_dora=True, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> model = use_fast_dora(model, norm_grad="detach")  # PEFT's own gradients
    """
    adapter = active_adapter(peft_model)
    left: dict[str, str] = {}  # the layers that keep PEFT's forward pass, and why
    for name, layer in dora_layers(peft_model):
        try:
            require_plain(layer, adapter, name)
            peft_internals.require_forward(layer, peft_variant(layer, adapter))
        except ProblemError as error:
            left[name] = str(error)
            with suppress(ProblemError):
                set_forward(layer, adapter, "detach")
            continue
        linear = isinstance(layer, lora.Linear)
        fast = partial(fast_forward, norm_grad=norm_grad) if linear else None
        set_forward(layer, adapter, norm_grad, fast)
    if left:
        _warn_kept(left, next(iter(left.values())))
    return peft_model


def fast_forward(
    module: lora.Linear,
    active_adapter: str,
    x: Tensor,
    result: Tensor,
    *,
    norm_grad: NormGrad,
    **kwargs: Any,
) -> Tensor:
    """The output, (…, out), for x (…, in) and the base layer's ``result`` (…, out).

    If the fast pass does not apply, PEFT or, with ``norm_grad="full"``, `adapted` computes it.
    """
    adapter, forward = active_adapter, peft_variant(module, active_adapter).forward
    cached = peft_internals.is_caching(module) and not torch.is_grad_enabled()
    whole = _has_full_weights(module, adapter, x)
    if not whole:
        _warn_kept([f"lora.{type(module).__name__}"], "its weights are not on the device of x")
    elif not cached:
        peft_internals.clear_dora_cache(module, adapter)
        forward = adapted if norm_grad == "full" else forward
    if cached or not whole or not _fast_applies(module, adapter, x):
        y: Tensor = forward(module, active_adapter=adapter, x=x, result=result, **kwargs)
        return y

    w0, m, (a, b) = base_weight(module), magnitude(module, adapter), factors(module, adapter)
    s: float = module.scaling[adapter]
    wide = reduce(torch.promote_types, (w0.dtype, m.dtype, a.dtype, torch.float32))
    wide_a, wide_b = a.to(wide), b.to(wide)
    n, v_a = measure(w0, wide_a, wide_b, s)
    if norm_grad == "full":
        n = RowNorm.apply(wide_a, wide_b, w0, n, v_a, s)
    g = m.to(wide) / n

    dropout, bias = module.lora_dropout[adapter], module.get_base_layer().bias
    base = result.detach().contiguous()
    x0, a, b = (tensor.to(_product_dtype(x)) for tensor in (x, a, b))
    if module.training and not isinstance(dropout, nn.Identity):
        dropped = dropout(x).to(x0.dtype)
        y, *_ = DoraDropoutLinear.apply(dropped, a, b, g, x0, w0, base, bias, s)
    else:
        y, _ = DoraLinear.apply(x0, a, b, g, w0, base, bias, s)
    return y


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products of x, under autocast or not."""
    kind = "cpu" if x.is_meta else x.device.type  # autocast does not know meta
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _has_full_weights(module: lora.Linear, adapter: str, x: Tensor) -> bool:
    """Whether all weights are complete on the device of x: neither sharded nor offloaded."""
    weights = (module.get_base_layer().weight, *factors(module, adapter))
    return (
        all(type(w) in (Tensor, nn.Parameter) and w.device == x.device for w in weights)
        and base_weight(module).shape == (len(weights[2]), weights[1].shape[-1])
        and x.shape[-1] == weights[1].shape[-1]
    )


def _fast_applies(module: lora.Linear, adapter: str, x: Tensor) -> bool:
    """Whether the layer is W0 x + b with constant W0, plus one term B A x, without hooks."""
    base, inputs = module.get_base_layer(), (*factors(module, adapter), magnitude(module, adapter))
    replaced = "forward" in vars(base) and not peft_internals.is_placed(base)
    active = [name for name in module.active_adapters if name in module.lora_A]
    return not (
        has_hooks(base, module.lora_A[adapter], module.lora_B[adapter])
        or replaced
        or base.weight.requires_grad
        or len(active) > 1
        or needs_plain_operations(x, *inputs)
    )


def _warn_kept(names: Iterable[str], reason: str) -> None:
    warnings.warn(
        f"use_fast_dora: {', '.join(names)} keeps PEFT's own DoRA, with a constant row norm, "
        f"since {reason}",
        stacklevel=3,
    )
