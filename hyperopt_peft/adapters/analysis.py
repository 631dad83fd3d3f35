"""The changes of magnitude (ΔM) and direction (ΔD) by training.

Over the layers of a model the slope of ΔM on ΔD is negative in full fine-tuning and positive in
LoRA (arXiv:2402.09353, §3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from hyperopt_peft.adapters.layers import (
    base_weight,
    direction,
    lora_layers,
    magnitude,
    require_plain,
    resolve_adapter,
    row_norm,
)


@dataclass(frozen=True)
class ModuleChange:
    """The change of one adapted weight since initialisation.

    ``module`` is the module's name in ``peft_model.named_modules()``; ``delta_magnitude`` is ΔM,
    the mean over rows of ``|m − m0|``; ``delta_direction`` is ΔD, that of 1 − cos(V, W0).

    Example:
        >>> ModuleChange("encoder.0", delta_magnitude=0.1, delta_direction=0.02).delta_direction
        0.02
    """

    module: str
    delta_magnitude: float
    delta_direction: float


@torch.no_grad()
def decompose(peft_model: PeftModel, adapter_name: str | None = None) -> list[ModuleChange]:
    """ΔM and ΔD of every adapted module (arXiv:2402.09353, Eq. 3 and 4), in model order.

    m0 is the row norm of W0; without DoRA m is the row norm of V.

    Args:
        adapter_name: the active adapter by default.

    Raises:
        ProblemError: as `lora_layers` and `require_plain`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> decompose(model)
        [ModuleChange(module='base_model.model.0', delta_magnitude=0.0, delta_direction=0.0)]
    """
    adapter = resolve_adapter(peft_model, adapter_name)
    changes = []
    for name, layer in lora_layers(peft_model, adapter):
        require_plain(layer, adapter, name)
        w0, v = _float64(base_weight(layer)), _float64(direction(layer, adapter))
        m0, n = row_norm(w0), row_norm(v)
        m_start, m = m0, n
        if adapter in layer.lora_magnitude_vector:
            # PEFT rounds the initial m to the dtype of W0.
            m_start = _float64(row_norm(base_weight(layer)))
            m = _float64(magnitude(layer, adapter))
        # 1 − cos(V_j, W0_j) without the cancellation of a cosine near one
        one_minus_cos = (v / n[:, None] - w0 / m0[:, None]).square().sum(dim=1) / 2
        changes.append(
            ModuleChange(name, (m - m_start).abs().mean().item(), one_minus_cos.mean().item())
        )
    return changes


def _float64(tensor: Tensor) -> Tensor:
    # On the CPU, because some accelerators have no float64; contiguous, because the order of a sum
    # follows the strides, and equal weights must have equal norms.
    return tensor.detach().to("cpu", torch.float64).contiguous()
