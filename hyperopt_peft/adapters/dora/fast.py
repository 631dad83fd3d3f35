"""A DoRA layer for about the price of LoRA, with PEFT's own parameters, saving and merging.

PEFT forms B·A through an identity matrix, and V = W0 + s·B·A, at every forward pass, and keeps two
outputs for the backward pass. Here the row norms are factored (`row_norms`), and the layer is one
autograd node that keeps its input and its output only (`dora_function`).
"""

from __future__ import annotations

import warnings
from functools import reduce
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import layer as lora
from peft.tuners.lora import variants
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from hyperopt_peft.adapters.dora.function import DoraDropoutLinear, DoraLinear
from hyperopt_peft.adapters.dora.row_norms import RowNorm, RowNormCache
from hyperopt_peft.adapters.dora.variants import NormGrad, require_norm_grad, variant_of
from hyperopt_peft.adapters.layers import (
    base_weight,
    dora_layers,
    factors,
    magnitude,
    require_plain,
    resolve_adapter,
)
from hyperopt_peft.errors import ProblemError

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def use_fast_dora(
    peft_model: PeftModel, norm_grad: NormGrad = "full", adapter_name: str | None = None
) -> PeftModel:
    """Give the linear layers (``nn.Linear``, ``Conv1D``) of a DoRA adapter a faster forward pass.

    Outputs are PEFT's to rounding. With ``norm_grad="detach"`` gradients are too; ``"full"``
    differentiates through the row norm as well, which PEFT leaves out (arXiv:2402.09353, §4.3).
    Parameters, names, dropout, saving, merging and switching stay PEFT's own.

    Embeddings and convolutions get what :func:`~hyperopt_peft.adapters.set_norm_grad` gives them,
    and so do linear layers whose base weight is trained, whose parts have hooks, or where several
    adapters are active at once, and all inside ``torch.func`` transforms. A layer that cannot be
    read (quantised, sharded) keeps PEFT's own forward pass, with a constant row norm; a warning
    names those. ``set_norm_grad`` undoes this function.

    The backward pass needs the layer's output, so autograd refuses an operation that changes it in
    place, such as ``nn.ReLU(inplace=True)`` directly after the layer.

    Args:
        adapter_name: the active adapter by default.

    Returns:
        ``peft_model`` itself.

    Raises:
        ProblemError: ``norm_grad`` is neither; as :func:`~hyperopt_peft.adapters.dora_layers`.
    """
    require_norm_grad(norm_grad)
    adapter = resolve_adapter(peft_model, adapter_name)
    unreadable = []
    for name, layer in dora_layers(peft_model, adapter):
        try:
            require_plain(layer, adapter, name)
        except ProblemError:
            unreadable.append(name)
            plain = variant_of(layer, "detach")
        else:
            plain = variant_of(layer, norm_grad)
            if isinstance(layer, lora.Linear):
                plain = FastDora(norm_grad, plain)
        if plain is not None:
            layer.lora_variant[adapter] = plain
    if unreadable:
        _warn_peft(unreadable)
    return peft_model


class FastDora(variants.DoraLinearVariant):
    """The fast forward pass of one linear layer; ``reference`` is the one that it stands for."""

    def __init__(self, norm_grad: NormGrad, reference: lora.LoraVariant) -> None:
        self.norm_grad, self.reference = norm_grad, reference
        self.cache = RowNormCache()

    def forward(
        self, module: lora.Linear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """The layer's output, (…, out).

        Args:
            module: the layer.
            x: input, (…, in).
            result: output of the base layer, (…, out).
        """
        if not _is_whole(module, active_adapter, x):
            _warn_peft([f"lora.{type(module).__name__}"])
            y: Tensor = super().forward(module, active_adapter, x, result, **kwargs)
            return y
        if not _is_alone(module, active_adapter):
            y = self.reference.forward(
                module, active_adapter=active_adapter, x=x, result=result, **kwargs
            )
            return y

        a, b = factors(module, active_adapter)
        w0, m = base_weight(module), magnitude(module, active_adapter)
        s: float = module.scaling[active_adapter]
        wide = reduce(torch.promote_types, (w0.dtype, m.dtype, a.dtype, torch.float32))
        norms = self.cache.norms(w0, a, b, s, wide)
        n = norms.norm
        if self.norm_grad == "full":
            n = RowNorm.apply(a.to(wide), b.to(wide), w0, n, norms.v_a, s)
        g = m.to(wide) / n

        dropout, bias = module.lora_dropout[active_adapter], module.get_base_layer().bias
        base = result.detach().contiguous()
        x0, a, b = (tensor.to(_product_dtype(x)) for tensor in (x, a, b))
        if module.training and not isinstance(dropout, nn.Identity):
            dropped = dropout(x).to(x0.dtype)
            y, *_ = DoraDropoutLinear.apply(dropped, a, b, g, x0, w0, base, bias, s)
        else:
            y, _ = DoraLinear.apply(x0, a, b, g, w0, base, bias, s)
        return y


def _product_dtype(x: Tensor) -> torch.dtype:
    """What autocast runs matrix products of x in."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _is_whole(module: lora.Linear, adapter: str, x: Tensor) -> bool:
    """Whether every weight is here in full: not sharded, not offloaded."""
    weights = (module.get_base_layer().weight, *factors(module, adapter))
    return (
        all(type(w) in (Tensor, nn.Parameter) and w.device == x.device for w in weights)
        and base_weight(module).shape == (len(weights[2]), weights[1].shape[-1])
        and x.shape[-1] == weights[1].shape[-1]
    )


def _is_alone(module: lora.Linear, adapter: str) -> bool:
    """Whether the layer is W0 x + b with W0 fixed, and B A x, and nothing else."""
    base = module.get_base_layer()
    parts = base, module.lora_A[adapter], module.lora_B[adapter]
    hooked = global_hooks._global_forward_hooks or any(vars(p)[h] for p in parts for h in HOOKS)
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # torch.func
    # accelerate replaces the forward of a module that it has placed on a device
    replaced = "forward" in vars(base) and not hasattr(base, "_hf_hook")
    active = [name for name in module.active_adapters if name in module.lora_A]
    return not (hooked or transformed or replaced or base.weight.requires_grad or len(active) > 1)


def _warn_peft(names: list[str]) -> None:
    warnings.warn(
        f"use_fast_dora: {', '.join(names)} cannot be read as W0 (quantised or sharded) and keeps "
        "PEFT's own DoRA, which takes the row norm for a constant.",
        stacklevel=3,
    )
