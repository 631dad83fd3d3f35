"""The model behind an adapter, and 4-bit layers that stay differentiable."""

from __future__ import annotations

from typing import Any


def base_model(model: Any) -> Any:
    """The pretrained model inside a PeftModel; any other model itself.

    Example:
        >>> from torch import nn
        >>> base_model(nn.Linear(2, 1))
        Linear(in_features=2, out_features=1, bias=True)
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def keep_differentiable(model: Any) -> None:
    """Keep the 4-bit layers of ``model`` differentiable after passes in evaluation mode.

    On a CPU with AVX512-BF16 instructions such a pass packs the weights of bitsandbytes' layers for
    a kernel without a derivative. Later passes, those of training too, would have no gradient of a
    layer's input, without an error. Afterwards the layers are unpacked, and stay so.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # unpacks
