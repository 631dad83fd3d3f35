"""A faster forward pass for the DoRA layers of PEFT, with PEFT's parameters, files and merging.

PEFT forms s·B·A and W0 + s·B·A, two matrices of W0's size, at every pass, and keeps two outputs of
a layer for the backward pass. The layer here does neither. With m the magnitude, c the bias and n
the row norms of W0 + s·B·A, constant in the backward pass (arXiv:2402.09353, §4.3):

    y = u + c + (m / n − 1) ∘ u     u = W0 x + s·B A x
    n_j² = ‖W0_j‖² + 2s ⟨(W0 Aᵀ)_j, B_j⟩ + s² ⟨(B A Aᵀ)_j, B_j⟩

Only u is kept, and n comes from products with r columns. All of it is ordinary autograd.

Example:
    >>> from peft import LoraConfig, get_peft_model
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    >>> model = get_peft_model(model, LoraConfig(target_modules=["0", "1"], use_dora=True))
    >>> enable_fast_dora(model)
    2
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.dora import DoraLinearLayer, cache_decorator
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

# Rows of n² below this share of ‖W0_j‖² have lost two digits and are measured on W0 + s·B·A.
CANCELLED = 1e-2
# The norm casts W0 in blocks of rows of about this many entries.
BLOCK = 2**24


def enable_fast_dora(model: nn.Module, enabled: bool = True) -> int:
    """Give the linear DoRA layers of ``model`` the fast forward pass, or PEFT's again.

    All adapters that are present are changed; call it again after ``add_adapter`` or
    ``load_adapter``. Parameters stay the same objects, so an optimizer may exist already.

    Returns:
        How many layers were changed, counted once an adapter.
    """
    layer_was, variant_was = DoraLinearLayer, DoraLinearVariant
    layer_is, variant_is = FastDoraLinearLayer, FastDoraLinearVariant
    if not enabled:
        layer_was, layer_is = layer_is, layer_was
        variant_was, variant_is = variant_is, variant_was
    changed = 0
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter, variant in module.lora_variant.items():
            if type(variant) is not variant_was:
                continue
            dora = module.lora_magnitude_vector[adapter]
            if "forward" in vars(dora):  # replaced by accelerate, which would call the old one
                continue
            dora._cache_clear()
            dora.__class__ = layer_is
            module.lora_variant[adapter] = variant_is()
            changed += 1
    return changed


class FastDoraLinearLayer(DoraLinearLayer):
    """The magnitude of a linear DoRA layer, and how it is applied."""

    weight: nn.Parameter

    @cache_decorator("factored-weight-norm")  # type: ignore[untyped-decorator]
    def get_factored_weight_norm(
        self,
        base_layer: Any,
        lora_A: Any,
        lora_B: Any,
        scaling: float,
        adapter_name: str | None = None,
    ) -> Tensor:
        """The row norms n, (out,), in the dtype of the magnitude, without a graph.

        They are computed in float32 or wider. Under ``torch.compile``, and where a factor is not a
        plain tensor (FSDP, DeepSpeed ZeRO-3), they are PEFT's own.
        """
        weight: Tensor = dequantize_module_weight(base_layer).detach()
        w0 = weight.T if self.fan_in_fan_out else weight
        a, b = lora_A.weight.detach(), lora_B.weight.detach()
        dtype: torch.dtype = reduce(torch.promote_types, (w0.dtype, a.dtype, b.dtype, torch.float))
        if torch.compiler.is_compiling() or not _are_factors(w0, lora_A.weight, lora_B.weight):
            product = self.get_lora_weight(lora_A=lora_A, lora_B=lora_B).detach()
            norm: Tensor = self.get_weight_norm(weight.to(product.dtype), product, scaling)
        else:
            with torch.autocast(w0.device.type, enabled=False):
                a, b = a.to(dtype), b.to(dtype)
                rows = max(1, BLOCK // w0.shape[1])
                pairs = zip(w0.split(rows), b.split(rows), strict=True)
                norm = torch.cat([_row_norms(w.to(dtype), a, v, scaling) for w, v in pairs])
        # As precise as the magnitude, so that a new adapter has m / n = 1. A row of zeros gives 0.
        return norm.to(self.weight.dtype).clamp_min(torch.finfo(self.weight.dtype).tiny)

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: Any,
        lora_B: Any,
        scaling: float,
        base_layer: Any,
        result: Tensor,
        dropped: bool,
        adapter_name: str = "default",
    ) -> Tensor:
        """The layer's whole output, of the shape of ``result``.

        Args:
            x: input after dropout, (…, in).
            result: what the layer has computed so far, W0 x + c before dropout, (…, out).
            dropped: whether dropout has changed x, so that W0 x has to be computed again.
        """
        norm: Tensor = self.get_factored_weight_norm(
            base_layer, lora_A, lora_B, scaling, adapter_name=adapter_name
        )
        lora_result = lora_B(lora_A(x))
        plain = torch.add(result, lora_result, alpha=scaling)
        if dropped:
            weight = dequantize_module_weight(base_layer).to(x.dtype)
            w0_x = F.linear(x, weight.T if self.fan_in_fan_out else weight)
            u = torch.add(w0_x, lora_result, alpha=scaling)
        else:
            bias = base_layer.bias
            u = plain if bias is None else plain - bias.to(plain.dtype)
        return torch.addcmul(plain, u, (self.weight / norm - 1).to(plain.dtype))


class FastDoraLinearVariant(DoraLinearVariant):
    """DoRA on a linear layer with `FastDoraLinearLayer`; merging is PEFT's."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """As PEFT, with the fast layer."""
        DoraLinearVariant.init(module, adapter_name, **kwargs)
        module.lora_magnitude_vector[adapter_name].__class__ = FastDoraLinearLayer

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """The layer's output, (…, out)."""
        dropout = module.lora_dropout[active_adapter]
        dropped = module.training and not isinstance(dropout, nn.Identity)
        output: Tensor = module.lora_magnitude_vector[active_adapter](
            dropout(x) if dropped else x,
            lora_A=module.lora_A[active_adapter],
            lora_B=module.lora_B[active_adapter],
            scaling=module.scaling[active_adapter],
            base_layer=module.get_base_layer(),
            result=result,
            dropped=dropped,
            adapter_name=active_adapter,
        )
        return output


def _are_factors(w0: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether ``a`` and ``b`` are plain, whole and where ``w0``, (out, in), is."""
    plain = all(type(t) in (Tensor, nn.Parameter) and t.device == w0.device for t in (a, b))
    return plain and a.dim() == b.dim() == 2 and w0.shape == (b.shape[0], a.shape[1])


def _row_norms(w0: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """‖W0_j + s·B_j A‖ of each row, for W0 (rows, in), A (r, in), B (rows, r) of one dtype."""
    norm_0: Tensor = torch.linalg.vector_norm(w0, dim=1)
    squares_0 = norm_0.square()
    cross = torch.addmm(w0 @ a.T, b, a @ a.T, beta=2, alpha=s)
    ratio = 1 + s * (cross * b).sum(1) / squares_0  # n² / ‖W0_j‖²
    norm: Tensor = norm_0 * ratio.clamp_min(0).sqrt()
    rows = ((ratio < CANCELLED) | (squares_0 == 0)).nonzero()[:, 0]
    if len(rows):
        v = torch.addmm(w0[rows], b[rows], a, alpha=s)
        norm[rows] = torch.linalg.vector_norm(v, dim=1)
    return norm
