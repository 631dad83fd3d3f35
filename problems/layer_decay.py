"""A decay of each layer's adapter, learned on validation data.

    upper: min over u          L(w*(u); D_val)
    lower: w*(u) = argmin over w   L(w; D_train) + ½ Σ_l e^(u_l)·‖w_l‖²

w_l are the trained factors A and B of layer l; the head has no decay. LiFT, arXiv:2606.16243, has
the same variables, and moves them by a linear programme; here an estimator with an implicit term
moves them. If L is a squared error and A is fixed, w*(u) is ridge regression.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.method import (
    PREFIX,
    Batch,
    Method,
    Model,
    ProblemError,
    TaskLoss,
    factors,
    lora_layers,
    option,
    regularised,
)


@dataclass
class LayerDecay(Method):
    """Log strengths above, adapter and head below; then the adapter, with these, on all rows.

    A strength is a number of the loss and not of the optimizer: give the optimizer no weight
    decay. One shared strength is the ablation that a validation set could choose by a grid too.

    Raises:
        ProblemError: ``start`` is not finite; the model has no LoRA layer that trains; FSDP2
            shards the adapter.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0", "1"])
        >>> layers = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
        >>> model, method = get_peft_model(torch.nn.Sequential(*layers), config), LayerDecay(-2.0)
        >>> method.prepare(model)
        >>> method.finish(model).base_model.model is model.base_model.model
        True
        >>> method.decays
        {'0': 0.135..., '1': 0.135...}
    """

    start: float = option(-6.0, help="u at first")
    shared: bool = option(False, help="whether all layers have the same u")

    one_level = False  # strengths go to 0
    defaults = {"hypergradient": "minres:steps=5,damping=0.1", "upper_learning_rate": 0.1}

    def prepare(self, model: Model) -> None:
        """Make u of each layer, or one."""
        layers = trained_factors(model)
        if not layers:
            raise ProblemError(
                "model: no LoRA factor is trainable; load the adapter with "
                "PeftModel.from_pretrained(..., is_trainable=True)"
            )
        like = next(iter(layers.values()))[0]
        dtype = torch.promote_types(like.dtype, torch.float32)
        start = torch.full((1 if self.shared else len(layers),), self.start, dtype=dtype)
        #: u, ``(layers,)`` or ``(1,)``.
        self.log_decays = start.to(like.device).requires_grad_()

    def upper_variables(self, model: Model) -> dict[str, Tensor]:
        """u."""
        return {"log_decays": self.log_decays}

    def lower_loss(self, model: Model, batch: Batch, task_loss: TaskLoss) -> Any:
        """L + ½ Σ e^(u_l)·‖w_l‖², both metrics too."""
        return regularised(task_loss(batch), 1.0, self.penalty, model)

    def penalty(self, model: Model) -> Tensor:
        """½ Σ e^(u_l)·‖w_l‖²."""
        u, layers = self.log_decays, trained_factors(model).values()
        squares = [torch.stack([w.to(u).square().sum() for w in each]).sum() for each in layers]
        total: Tensor = (u.exp() * torch.stack(squares)).sum() / 2
        return total

    def finish(self, model: Model) -> Any:
        """``model``; the strengths stay as they are, and ``decays`` has them by layer."""
        names = trained_factors(model)
        strengths = self.log_decays.requires_grad_(False).exp().expand(len(names))
        #: e^u of each layer, by its name in the base model.
        self.decays = dict(zip(names, strengths.tolist(), strict=True))
        return model


def trained_factors(model: Model) -> dict[str, list[Tensor]]:
    """Those of A and B that train, of each LoRA layer, by its name in the base model."""
    adapter = model.active_adapter
    layers = {
        name.removeprefix(PREFIX): [w for w in factors(layer, adapter) if w.requires_grad]
        for name, layer in lora_layers(model)
    }
    return {name: trained for name, trained in layers.items() if trained}
