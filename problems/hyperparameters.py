"""Hyper-parameters of a LoRA adapter, learnt on validation data while the adapter is trained.

    upper: min over d, s, η     L(θ*, s; D_val)
    lower: θ*(d, s, η) = the result of the optimizer at learning rate η for
                                L(θ, s; D_train) + ½ Σ_l exp(d_l)·‖θ_l‖²

θ_l = (A_l, B_l) are the factors of layer l, whose update is exp(s_l)·(α/r)·B_l·A_l.

    add_hyperparameters(model, decay=1e-2)               # model: a PeftModel with LoRA
    upper = Hyperparameters(model, learning_rate=1e-3)   # learning_rate=None: η is not learnt
    lower = Regularised(model, upper)
    ...                                                  # train both levels
    fold_scales(model).save_pretrained(folder)           # a stock adapter

Every estimator, Engine and BilevelTrainer can learn d and s. η is an option of the optimizer;
learning η requires Engine, no scheduler, and the estimator "unrolled" or "forward".
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
    """Upper level: min over log decays d, log scales s and log η of L(θ, s; D_val).

    Args:
        model: a PeftModel after `add_hyperparameters` whose forward returns ``.loss``.
        learn: ``"decay"`` to learn d, ``"scale"`` to learn s; any subset of these two.
        learning_rate: the initial η; None leaves the optimizer's learning rate constant.
        task_loss, level: as in `TaskLevel`.

    Raises:
        ProblemError: ``learn`` has another name; ``learning_rate`` is not positive; the model has
            no hyper-parameters; or as `Problem`.

    Example:
        >>> from hyperopt_peft.adapters import add_hyperparameters
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> model = add_hyperparameters(model, decay=0.5)
        >>> upper = Hyperparameters(model, task_loss=lambda x: model(x).square().mean())
        >>> list(upper.values().values())  # exp(d), exp(s)
        [0.5, 1.0]
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
            raise ProblemError(f'learn: must be "decay", "scale" or both, got {learn!r}')
        named = {f"{n}.{k}": getattr(x, f"log_{k}") for k in learn for n, x in layers.items()}
        self.log_rate: Tensor | None = None
        if learning_rate is not None:
            if not 0 < learning_rate < math.inf:
                raise ProblemError(f"learning_rate: must be positive, got {learning_rate}")
            like = next(iter(layers.values())).log_scale
            self.log_rate = like.new_tensor(math.log(learning_rate)).requires_grad_()
            named["learning_rate"] = self.log_rate
        super().__init__(model, named, task_loss=task_loss, **level)

    def values(self) -> dict[str, float]:
        """The current exp(d_l), exp(s_l) and η, by the names of the variables."""
        return {n: float(v.detach().exp()) for n, v in zip(self.names, self.variables, strict=True)}


class Regularised(TaskLevel):
    """Lower level: min over A, B, head of L(θ, s; D_train) + ½ Σ_l exp(d_l)·‖θ_l‖².

    Args:
        model: the model of ``upper``.
        upper: the upper level; η, if learnt, becomes the learning rate of this level's optimizer.
        task_loss, level: as in `TaskLevel`.

    Example:
        >>> from hyperopt_peft.adapters import add_hyperparameters
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = add_hyperparameters(get_peft_model(nn.Sequential(nn.Linear(4, 3)), config))
        >>> lower = Regularised(model, Hyperparameters(model))
        >>> [tuple(variable.shape) for variable in lower.variables]  # A, B
        [(2, 4), (3, 2)]
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
        learnt = [p for part in self.layers.values() for p in part.parameters()]
        owned = trainable(model, without=learnt)
        super().__init__(model, owned, task_loss=task_loss, **level)

    def loss(self, batch: Any) -> dict[str, Tensor]:
        """L + ½ Σ_l exp(d_l)·‖θ_l‖²; L is a metric too."""
        task = self.task_loss(batch)
        loss = task
        for name, variable in zip(self.names, self.variables, strict=True):
            layer, factor, _ = name.partition(".lora_A." if ".lora_A." in name else ".lora_B.")
            if factor:
                decay = self.layers[layer].log_decay.exp().sum()
                loss = loss + decay / 2 * variable.square().sum()
        return {"loss": loss, "task_loss": task}

    def optimizer_options(self) -> dict[str, Tensor]:
        """``{"lr": η}`` if η is learnt."""
        return {} if self.upper.log_rate is None else {"lr": self.upper.log_rate.exp()}
