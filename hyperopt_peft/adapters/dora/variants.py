"""DoRA layers that differentiate through the row norm.

In W' = m ⊙ V / n, PEFT treats n = ‖W0 + s·B·A‖ as a constant in the backward pass
(arXiv:2402.09353, §4.3). That is cheaper, but a bilevel method differentiates the lower gradient
again, and a constant n removes a term from the mixed second derivative. With V̂ = V / n and
G = ∂L/∂W', row j has

    full      ∂L/∂V_j = (m_j / n_j) (G_j − ⟨G_j, V̂_j⟩ V̂_j)
    detach    ∂L/∂V_j = (m_j / n_j) G_j

The functions below replace only the forward pass: parameters, names, initialisation, saving and
merging remain PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from hyperopt_peft.adapters import peft_internals
from hyperopt_peft.adapters.layers import (
    active_adapter,
    base_weight,
    direction,
    dora_layers,
    magnitude,
    require_plain,
)
from hyperopt_peft.errors import ProblemError

NormGrad = Literal["full", "detach"]


def set_norm_grad(peft_model: PeftModel, norm_grad: NormGrad = "full") -> PeftModel:
    """Choose whether the DoRA layers of the active adapter differentiate through the row norm.

    Outputs do not change; gradients of A and B do. ``"full"`` supports double backward;
    ``"detach"`` restores PEFT's own forward pass.

    Returns:
        ``peft_model`` itself.

    Raises:
        ProblemError: ``norm_grad`` is not one of these; as `dora_layers`; or, with ``"full"``, as
            `require_plain` (a quantised layer, a grouped convolution). No layer has changed.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> config = LoraConfig(r=2, use_dora=True, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> model = set_norm_grad(model, "full")
    """
    adapter, layers = active_adapter(peft_model), dora_layers(peft_model)
    if norm_grad == "full":
        for name, layer in layers:
            require_plain(layer, adapter, name)
            peft_internals.require_forward(layer, peft_variant(layer, adapter))
    for _, layer in layers:
        set_forward(layer, adapter, norm_grad)
    return peft_model


class ReplacedForward:
    """PEFT's variant ``peft`` with the forward pass ``forward``; merging and the rest are PEFT's.

    A new object in place of a subclass, so that no private class of PEFT is needed.
    """

    def __init__(self, peft: Any, forward: Callable[..., Tensor], norm_grad: NormGrad) -> None:
        self.peft, self.forward, self.norm_grad = peft, forward, norm_grad

    def __getattr__(self, name: str) -> Any:
        if name == "peft" or name.startswith("__"):  # a copy asks before it has its attributes
            raise AttributeError(name)
        return getattr(self.peft, name)


def peft_variant(layer: lora.LoraLayer, adapter_name: str) -> Any:
    """PEFT's own variant of ``layer``, below a `ReplacedForward`."""
    variant = peft_internals.variant(layer, adapter_name)
    return variant.peft if isinstance(variant, ReplacedForward) else variant


def set_forward(
    layer: lora.LoraLayer,
    adapter_name: str,
    norm_grad: NormGrad,
    fast: Callable[..., Tensor] | None = None,
) -> None:
    """Let a DoRA layer run ``fast``, or the forward pass of `adapted`; "detach" restores PEFT's."""
    if norm_grad not in ("full", "detach"):
        raise ProblemError(f"norm_grad: must be 'full' or 'detach', got {norm_grad!r}")
    variant, forward = peft_variant(layer, adapter_name), fast
    if forward is None and norm_grad == "full":
        forward = adapted_embedding if isinstance(layer, lora.Embedding) else adapted
    if forward is not None:
        variant = ReplacedForward(variant, forward, norm_grad)
    peft_internals.set_variant(layer, adapter_name, variant)


def gain(layer: lora.LoraLayer, adapter_name: str) -> Tensor:
    """g = m / n of shape (out,), differentiable in m, A and B, in float32 or wider."""
    norm: Tensor = torch.linalg.vector_norm(direction(layer, adapter_name), dim=1)
    return magnitude(layer, adapter_name) / norm


def adapted(
    module: lora.LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
) -> Tensor:
    """The output of a linear or convolution layer: result + (g − 1)·W0 x + g·s·B A x.

    ``x`` is (..., in) or (batch, in, ...); ``result`` is the output of the base layer. One dropout
    mask applies to the x of both corrections, as in PEFT.
    """
    base = module.get_base_layer()
    dropout = module.lora_dropout[active_adapter]
    # (out,) broadcasts to the last axis of a linear output, (out, 1, …) to a convolution's second
    per_row = (-1,) + (1,) * (base.weight.dim() - 2)
    g = gain(module, active_adapter).view(per_row)
    s: float = module.scaling[active_adapter]

    if module.training and not isinstance(dropout, nn.Identity):
        x = dropout(x)
        w0_x: Tensor = _without_bias(module, x)
    else:
        w0_x = result if base.bias is None else result - base.bias.view(per_row)
    ba_x: Tensor = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
    return result + (g - 1) * w0_x + (s * g) * ba_x


def adapted_embedding(
    module: lora.Embedding, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
) -> Tensor:
    """The output of an embedding layer: g·(W0 row + s·(B A) row), with one g per dimension.

    ``x`` has token ids, (...); ``result`` is the output of the base layer, (..., dim). As in PEFT
    there is no dropout.
    """
    a, b = module.lora_embedding_A[active_adapter], module.lora_embedding_B[active_adapter]
    ba_x: Tensor = module.scaling[active_adapter] * (peft_internals.embedded(module, x, a.T) @ b.T)
    scale = peft_internals.embed_scale(module)
    if scale is not None:
        ba_x = ba_x * scale.to(ba_x.dtype)
    return gain(module, active_adapter) * (result + ba_x)


def _without_bias(layer: Any, x: Tensor) -> Tensor:
    if isinstance(layer, lora.Linear):
        return F.linear(x, base_weight(layer).to(x.dtype))
    return peft_internals.convolution(layer, x, layer.get_base_layer().weight.to(x.dtype))
