"""A learnable log scale s_l and log decay d_l for each LoRA layer l.

    ΔW_l = exp(s_l)·(α/r)·B_l·A_l

exp(s)·B is a parametrization of PEFT's B, so that forward pass, dropout and merging are PEFT's. A
loss may read d_l.
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
        shape = [1] * b.ndim  # PEFT assumes that a flat parameter of lora_B is a broken B
        self.log_scale = nn.Parameter(b.new_zeros(shape))
        self.log_decay = nn.Parameter(b.new_full(shape, math.log(decay)))

    def forward(self, b: Tensor) -> Tensor:
        """exp(log_scale)·b."""
        return self.log_scale.exp() * b


def add_hyperparameters(model: PeftModel, decay: float = 1e-2) -> PeftModel:
    """Add trainable s = 0 and d = log ``decay`` to each layer of the active adapter.

    Raises:
        ProblemError: as `lora_layers`; ``decay`` is not positive; or a layer has no trainable B, or
            a parametrized one.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> (part,) = layer_hyperparameters(add_hyperparameters(model)).values()
        >>> part.log_scale.item()
        0.0
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
    """The modules with ``log_scale`` and ``log_decay``, by the layer's name in the model.

    Raises:
        ProblemError: as `lora_layers`; or `add_hyperparameters` was not called.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> list(layer_hyperparameters(add_hyperparameters(model)))
        ['base_model.model.0']
    """
    found = {}
    for name, b in _matrices(model).items():
        part = parametrization(b, Scaled)
        if part is None:
            raise ProblemError(f"{name}: has no hyper-parameters; call add_hyperparameters first")
        found[name] = part
    return found


def fold_scales(model: PeftModel) -> PeftModel:
    """Replace each B by exp(s)·B and remove s and d; the result is a stock adapter.

    Raises:
        ProblemError: as `layer_hyperparameters`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> model = fold_scales(add_hyperparameters(model))
        >>> any("log_scale" in name for name, _ in model.named_parameters())
        False
    """
    layer_hyperparameters(model)
    for b in _matrices(model).values():
        parametrize.remove_parametrizations(b, "weight", leave_parametrized=True)
    return model


def _matrices(model: PeftModel) -> dict[str, Any]:
    adapter = resolve_adapter(model)
    return {name: dict(x.lora_B).get(adapter) for name, x in lora_layers(model, adapter)}
