"""A penalty beside a loss, and the orthogonality penalty of BiDoRA (arXiv:2410.09758)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from hyperopt_peft.adapters.layers import active_adapter, direction, lora_layers, require_plain
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.distributed import is_sharded
from hyperopt_peft.utils.types import Model


def regularised(task: Tensor, weight: float, penalty: Callable[[Any], Tensor], model: Model) -> Any:
    """L + weight·penalty(model), with both terms as metrics; L alone where ``weight`` is 0.

    Raises:
        ProblemError: FSDP2 shards the model.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> regularised(torch.tensor(2.0), 0.5, lambda model: torch.tensor(4.0), model)
        {'loss': tensor(4.), 'task_loss': tensor(2.), 'penalty': tensor(4.)}
    """
    if weight == 0:
        return task
    if is_sharded(*model.parameters()):
        raise ProblemError(
            "penalty: it reads parameters outside of the model's forward pass, where FSDP2 has "
            "shards only; set its weight to 0, or train without FSDP2"
        )
    value = penalty(model)
    return {"loss": task + weight * value, "task_loss": task, "penalty": value}


def gram_penalty(peft_model: PeftModel) -> Tensor:
    """The mean over adapted layers of ‖DᵀD − I‖_F, where D is V with columns of unit norm.

    V is the direction W0 + s·B·A. The result is a scalar, twice differentiable in A and B. The
    code of the paper weights it by γ = 1e-5.

    Raises:
        ProblemError: as `lora_layers` and `require_plain`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> config = LoraConfig(r=2, use_dora=True, target_modules=["0"])
        >>> gram_penalty(get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)).shape
        torch.Size([])
    """
    adapter, penalties = active_adapter(peft_model), []
    for name, layer in lora_layers(peft_model):
        require_plain(layer, adapter, name)
        penalties.append(gram(direction(layer, adapter)))
    device = penalties[0].device
    return torch.stack([penalty.to(device) for penalty in penalties]).mean()


def gram(v: Tensor) -> Tensor:
    """‖DᵀD − I‖_F, a scalar, for V of shape (out, in), where D is V with unit columns.

    A zero column of V is zero in D and has zero gradient. For out < in the smaller Gram matrix is
    used: ‖DᵀD − I‖² = ‖DDᵀ‖² − 2·tr(DᵀD) + in ≥ in − out.
    """
    out_features, in_features = v.shape
    # Squares and a guarded root, because a norm has no second derivative at a zero column.
    squares = v.square().sum(dim=0)
    d = v * torch.where(squares > 0, squares, 1).rsqrt()
    if out_features < in_features:
        penalty = (d @ d.T).square().sum() - 2 * d.square().sum() + in_features
    else:
        identity = torch.eye(in_features, dtype=v.dtype, device=v.device)
        penalty = (d.T @ d - identity).square().sum()
    positive = penalty > 0
    return torch.where(positive, torch.where(positive, penalty, 1).sqrt(), 0)
