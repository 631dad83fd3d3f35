"""All private names of PEFT and accelerate that this library uses, each read on first use.

PEFT calls the methods of a ``LoraVariant`` "prone to change and should thus considered to be
private", but no public interface replaces the forward pass of a LoRA layer. If a release moves a
name, tests/contract/test_peft.py fails with it, and a function that needs it raises a ProblemError.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import peft
from peft.tuners.lora.layer import Embedding, LoraLayer
from torch import Tensor, nn

from hyperopt_peft.errors import ProblemError

#: The parameters of the ``forward`` of a variant.
PARAMETERS = ["module", "active_adapter", "x", "result", "kwargs"]


def _moved(name: str) -> ProblemError:
    return ProblemError(
        f"peft {peft.__version__}: {name} is not as this library knows it; install a release that "
        "docs/versions.md lists"
    )


def variant(layer: LoraLayer, adapter_name: str) -> Any:
    """The object that runs and merges ``layer``, None for plain LoRA; ProblemError if it moved."""
    variants = getattr(layer, "lora_variant", None)
    if not isinstance(variants, dict):
        raise _moved("LoraLayer.lora_variant")
    return variants.get(adapter_name)


def require_forward(layer: LoraLayer, peft_variant: object) -> None:
    """Raise ProblemError unless another forward pass can run ``layer``, a DoRA layer."""
    forward = getattr(peft_variant, "forward", None)
    if forward is None or list(inspect.signature(forward).parameters) != PARAMETERS:
        raise _moved("LoraVariant.forward")
    needed = "_embed" if isinstance(layer, Embedding) else "conv_fn"
    convolution = isinstance(layer.get_base_layer(), nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if (isinstance(layer, Embedding) or convolution) and not hasattr(layer, needed):
        raise _moved(f"{type(layer).__name__}.{needed}")


def set_variant(layer: LoraLayer, adapter_name: str, value: object) -> None:
    """Replace the object that runs and merges ``layer``."""
    clear_dora_cache(layer, adapter_name)
    layer.lora_variant[adapter_name] = value


def variants(layer: nn.Module) -> list[Any]:
    """The variants of all adapters of ``layer`` except plain LoRA."""
    return list(getattr(layer, "lora_variant", {}).values())


def embed_scale(layer: Embedding) -> Tensor | None:
    """The fixed factor by which some embeddings (Gemma's) multiply their rows, or None."""
    read = getattr(layer, "_get_embed_scale", None)  # None where a release has moved it
    scale: Tensor | None = read() if read else None
    return scale


def embedded(layer: Embedding, ids: Tensor, weight: Tensor) -> Tensor:
    """The rows ``ids`` of ``weight``, with the base embedding's padding and scaling options."""
    rows: Tensor = layer._embed(ids, weight)
    return rows


def convolution(layer: LoraLayer, x: Tensor, weight: Tensor) -> Tensor:
    """``weight`` applied to x with the base layer's stride and padding, without bias."""
    base = layer.get_base_layer()
    output: Tensor = layer.conv_fn(x, weight, None, base.stride, base.padding)
    return output


def is_caching(layer: LoraLayer) -> bool:
    """Whether ``peft.helpers.DoraCaching`` makes ``layer`` cache B·A and the norm."""
    # Until PEFT 0.19 the module has no such flag.
    dora = sys.modules.get("peft.tuners.lora.dora")
    return bool(getattr(dora, "ENABLE_DORA_CACHING", False)) and not layer.training


def clear_dora_cache(layer: LoraLayer, adapter_name: str) -> None:
    """Drop the cached B·A and norm, as PEFT's own forward pass does outside of DoraCaching."""
    if adapter_name in layer.lora_magnitude_vector:
        # Until PEFT 0.19 there is no cache.
        getattr(layer.lora_magnitude_vector[adapter_name], "_dora_cache", {}).clear()


def is_placed(module: nn.Module) -> bool:
    """Whether accelerate has placed ``module`` on a device, and wrapped its forward for that."""
    return hasattr(module, "_hf_hook")
