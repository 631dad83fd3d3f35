"""All private names of PEFT and accelerate that this library uses.

PEFT calls the methods of a ``LoraVariant`` "prone to change and should thus considered to be
private", but no public interface replaces the forward pass of a LoRA layer. If a release moves a
name, tests/contract/test_peft.py fails with it.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import dora
from peft.tuners.lora.layer import Embedding, LoraLayer
from peft.tuners.lora.layer import LoraVariant as LoraVariant
from peft.tuners.lora.layer import ParamWrapper as ParamWrapper
from peft.tuners.lora.variants import DoraConv1dVariant as DoraConv1dVariant
from peft.tuners.lora.variants import DoraConv2dVariant as DoraConv2dVariant
from peft.tuners.lora.variants import DoraConv3dVariant as DoraConv3dVariant
from peft.tuners.lora.variants import DoraEmbeddingVariant as DoraEmbeddingVariant
from peft.tuners.lora.variants import DoraLinearVariant as DoraLinearVariant
from peft.utils.constants import SEQ_CLS_HEAD_NAMES as SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn


def variant(layer: LoraLayer, adapter_name: str) -> LoraVariant | None:
    """The object that runs and merges ``layer``; None for plain LoRA."""
    return layer.lora_variant.get(adapter_name)


def set_variant(layer: LoraLayer, adapter_name: str, value: LoraVariant) -> None:
    """Replace the object that runs and merges ``layer``."""
    clear_dora_cache(layer, adapter_name)
    layer.lora_variant[adapter_name] = value


def variants(layer: Any) -> list[LoraVariant]:
    """The variants of all adapters of ``layer`` except plain LoRA."""
    return list(layer.lora_variant.values())


def embed_scale(layer: Embedding) -> Tensor | None:
    """The fixed factor by which some embeddings (Gemma's) multiply their rows, or None."""
    scale: Tensor | None = layer._get_embed_scale()
    return scale


def embedded(layer: Embedding, ids: Tensor, weight: Tensor) -> Tensor:
    """The rows ``ids`` of ``weight``, with the base embedding's padding and scaling options."""
    rows: Tensor = layer._embed(ids, weight)
    return rows


def convolution(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """``weight`` applied to x with the base layer's stride and padding, without bias."""
    base = layer.get_base_layer()
    output: Tensor = layer.conv_fn(x, weight, None, base.stride, base.padding)
    return output


def is_caching(layer: LoraLayer) -> bool:
    """Whether ``peft.helpers.DoraCaching`` makes ``layer`` cache B·A and the norm."""
    return dora.ENABLE_DORA_CACHING and not layer.training


def clear_dora_cache(layer: LoraLayer, adapter_name: str) -> None:
    """Drop the cached B·A and norm, as PEFT's own forward pass does outside of DoraCaching."""
    if adapter_name in layer.lora_magnitude_vector:
        layer.lora_magnitude_vector[adapter_name]._dora_cache.clear()


def is_placed(module: nn.Module) -> bool:
    """Whether accelerate has placed ``module`` on a device, and wrapped its forward for that."""
    return hasattr(module, "_hf_hook")
