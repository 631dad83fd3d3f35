"""Hyper-parameters of a LoRA adapter, learnt on validation data while the adapter is trained.

    upper: min over d, s, η     L(θ*, s; D_val)
    lower: θ*(d, s, η) = where the optimizer leads at learning rate η, on
                                L(θ, s; D_train) + ½ Σ_l exp(d_l)·‖θ_l‖²

θ_l = (A_l, B_l) are the factors of layer l, and its update is exp(s_l)·(α/r)·B_l·A_l.

    add_hyperparameters(model, decay=1e-2)               # model: a PeftModel with LoRA
    upper = Hyperparameters(model, learning_rate=1e-3)   # without it, η is not learnt
    lower = Regularised(model, upper)
    ...                                                  # train them
    fold_scales(model).save_pretrained(folder)           # a stock adapter

d and s go with every estimator, in Engine and BilevelTrainer. η is an option of the optimizer: it
takes the Engine, without a scheduler, and "unrolled" or "forward".
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from peft import PeftModel
from torch import Tensor

from hyperopt_peft.adapters import layer_hyperparameters
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.common import TaskLevel, TaskLoss, trainable


class Hyperparameters(TaskLevel):
    """Upper level: log decays, log scales and the log learning rate, on D_val.

    Args:
        model: a PeftModel after `add_hyperparameters` whose forward returns ``.loss``.
        learn: ``"decay"``, ``"scale"``, both or neither; what is left out stays as it is.
        learning_rate: where η starts; without it the optimizer's own is used and not learnt.
        task_loss: L as a function of the batch, in place of the model's own.
        level: what `Problem` takes: data, optimizer, scheduler, max_grad_norm.
    """

    def __init__(
        self,
        model: PeftModel,
        *,
        learn: Collection[str] = ("decay", "scale"),
        learning_rate: float | None = None,
        task_loss: TaskLoss | None = None,
        **level: Any,
    ) -> None:
        layers = layer_hyperparameters(model)
        if not set(learn) <= {"decay", "scale"}:
            raise ProblemError(f'learn takes "decay" and "scale", got {learn!r}')
        named = {f"{n}.{k}": getattr(x, f"log_{k}") for k in learn for n, x in layers.items()}
        self.log_rate: Tensor | None = None
        if learning_rate is not None:
            if not 0 < learning_rate < math.inf:
                raise ProblemError(f"learning_rate must be positive, got {learning_rate}")
            like = next(iter(layers.values())).log_scale
            self.log_rate = like.new_tensor(math.log(learning_rate)).requires_grad_()
            named["learning_rate"] = self.log_rate
        super().__init__(model, named, task_loss=task_loss, **level)

    def values(self) -> dict[str, float]:
        """What is learnt, as it is now, by name: exp(d_l), exp(s_l) and η."""
        return {n: float(v.detach().exp()) for n, v in zip(self.names, self.variables, strict=True)}


class Regularised(TaskLevel):
    """Lower level: A and B of all layers, and the task head, on D_train.

    Args:
        model: the model of ``upper``.
        upper: the upper level; its learning rate is the optimizer's, where it is learnt.
        task_loss: L as a function of the batch, in place of the model's own.
        level: what `Problem` takes: data, optimizer, scheduler, max_grad_norm.
    """

    def __init__(
        self,
        model: PeftModel,
        upper: Hyperparameters,
        *,
        task_loss: TaskLoss | None = None,
        **level: Any,
    ) -> None:
        self.layers, self.upper = layer_hyperparameters(model), upper
        learnt = {id(p) for part in self.layers.values() for p in part.parameters()}
        owned = [(name, p) for name, p in trainable(model) if id(p) not in learnt]
        super().__init__(model, owned, task_loss=task_loss, **level)

    def loss(self, batch: Any) -> dict[str, Tensor]:
        """L + ½ Σ_l exp(d_l)·‖θ_l‖²; L is logged apart."""
        task = self.task_loss(batch)
        loss = task
        for name, variable in zip(self.names, self.variables, strict=True):
            layer, factor, _ = name.partition(".lora_A." if ".lora_A." in name else ".lora_B.")
            if factor:
                decay = self.layers[layer].log_decay.exp().sum()
                loss = loss + decay / 2 * variable.square().sum()
        return {"loss": loss, "task_loss": task}

    def optimizer_options(self) -> dict[str, Tensor]:
        """η, where it is learnt."""
        return {} if self.upper.log_rate is None else {"lr": self.upper.log_rate.exp()}
