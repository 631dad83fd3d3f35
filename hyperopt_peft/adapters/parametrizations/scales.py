"""A learnable scale, and a decay, for each LoRA layer.

    ΔW_l = exp(s_l)·(α/r)·B_l·A_l

B is multiplied by exp(s) where it is read, a parametrisation as PyTorch has it, so that forward
pass, dropout and merging stay PEFT's own. The log decay d_l lies beside s_l, for a loss to read.
"""

from __future__ import annotations

import math
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hyperopt_peft.adapters.layers import lora_layers, parametrization, resolve_adapter
from hyperopt_peft.errors import ProblemError


class Scaled(nn.Module):
    """B ↦ exp(log_scale)·B."""

    def __init__(self, b: Tensor, decay: float) -> None:
        super().__init__()
        shape = [1] * b.ndim  # PEFT takes a flat tensor beside B for a broken one
        self.log_scale = nn.Parameter(b.new_zeros(shape))
        self.log_decay = nn.Parameter(b.new_full(shape, math.log(decay)))

    def forward(self, b: Tensor) -> Tensor:
        """exp(log_scale)·b."""
        return self.log_scale.exp() * b


def add_hyperparameters(model: PeftModel, decay: float = 1e-2) -> PeftModel:
    """Give each layer of the active adapter a scale of 1 and a ``decay``, as trainable logarithms.

    Raises:
        ProblemError: as `lora_layers`; a decay that is not positive;
            a layer without a trainable matrix B, or with a parametrisation of it already.
    """
    if not 0 < decay < math.inf:
        raise ProblemError(
            f"decay: must be positive and finite, since its logarithm is trained; got {decay}"
        )
    matrices = _matrices(model)
    for name, b in matrices.items():
        weight = None if b is None or parametrize.is_parametrized(b) else b.weight
        if weight is None or not weight.requires_grad:
            raise ProblemError(
                f"{name}: has no matrix B that is trainable and without a parametrisation; "
                "leave it out of target_modules"
            )
    for b in matrices.values():
        parametrize.register_parametrization(b, "weight", Scaled(b.weight, decay))
    return model


def layer_hyperparameters(model: PeftModel) -> dict[str, Scaled]:
    """What `add_hyperparameters` added, by the layer's name in the model.

    Raises:
        ProblemError: as `lora_layers`; it was not called.
    """
    found = {}
    for name, b in _matrices(model).items():
        part = parametrization(b, Scaled)
        if part is None:
            raise ProblemError(f"{name}: has no hyper-parameters; call add_hyperparameters first")
        found[name] = part
    return found


def fold_scales(model: PeftModel) -> PeftModel:
    """Multiply each B by its scale and take the hyper-parameters out: a stock adapter is left.

    Raises:
        ProblemError: as `layer_hyperparameters`.
    """
    layer_hyperparameters(model)
    for b in _matrices(model).values():
        parametrize.remove_parametrizations(b, "weight", leave_parametrized=True)
    return model


def _matrices(model: PeftModel) -> dict[str, Any]:
    adapter = resolve_adapter(model)
    return {name: dict(x.lora_B).get(adapter) for name, x in lora_layers(model, adapter)}
