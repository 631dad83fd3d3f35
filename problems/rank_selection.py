"""The rank of each LoRA layer, from weights of its rank-1 components learnt on validation data.

    upper: min over β       L(A*, B*, α(β); D_val)
    lower: A*, B*(β) = argmin over A, B, head   L(A, B, α(β); D_train) + decay·½(‖A‖² + ‖B‖²)

The update of a layer is ΔW = s·Σ_j α_j B_{:,j} A_{j,:}. Components with α_j below a threshold are
removed. An adapter with the remaining ranks is then trained from the beginning, on all data. With
softmax and without decay this is AutoLoRA, Zhang et al. 2024, arXiv:2403.09113.

Without decay every positive α allows the same ΔW. F then does not depend on α at the lower
minimum; α moves only because the lower level is not at the minimum. With decay a component of
small α needs large factors, whose decay is costly. The lower level then uses few components, and
the hypergradient shows which layers need more. Softmax leaves at least one component in each
layer; sigmoids may leave none.

    add_selection(model)                    # model: a PeftModel with LoRA
    lower, upper = Components(model), Selection(model)
    ...                                     # train both with Engine or BilevelTrainer
    config = rank_config(model, selected_ranks(model))
    model = get_peft_model(pretrained, config)
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import Tensor

from hyperopt_peft.adapters import component_weights
from hyperopt_peft.problems.common import TaskLevel, TaskLoss, trainable


class Components(TaskLevel):
    """Lower level: min over A, B, head of L(A, B, α; D_train) + decay·½(‖A‖² + ‖B‖²).

    Args:
        model: a PeftModel after `add_selection` whose forward returns ``.loss``.
        decay: the weight of ½(‖A‖² + ‖B‖²), in which A is not multiplied by α.
        task_loss, level: as in `TaskLevel`.

    Raises:
        ProblemError: the model has no component weights; or as `Problem`.

    Example:
        >>> from hyperopt_peft.adapters import add_selection
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = add_selection(get_peft_model(nn.Sequential(nn.Linear(4, 3)), config))
        >>> lower = Components(model, task_loss=lambda x: model(x).square().mean())
        >>> [tuple(variable.shape) for variable in lower.variables]  # A, B
        [(2, 4), (3, 2)]
    """

    def __init__(
        self,
        model: PeftModel,
        *,
        decay: float = 0.0,
        task_loss: TaskLoss | None = None,
        **level: Any,
    ) -> None:
        self.decay = decay
        logits = [part.logits for part in component_weights(model).values()]
        owned = trainable(model, without=logits)
        super().__init__(model, owned, task_loss=task_loss, **level)

    def loss(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """L + decay·½(‖A‖² + ‖B‖²); L is a metric too."""
        task = self.task_loss(batch)
        if self.decay == 0:
            return task
        pairs = zip(self.names, self.variables, strict=True)
        factors = [w for name, w in pairs if ".lora_A." in name or ".lora_B." in name]
        squares = sum(w.square().sum() for w in factors)
        return {"loss": task + self.decay / 2 * squares, "task_loss": task}


class Selection(TaskLevel):
    """Upper level: min over the logits β of L(A, B, α(β); D_val).

    Args:
        model: a PeftModel after `add_selection` whose forward returns ``.loss``.
        task_loss, level: as in `TaskLevel`.

    Raises:
        ProblemError: the model has no component weights; or as `Problem`.

    Example:
        >>> from hyperopt_peft.adapters import add_selection
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = add_selection(get_peft_model(nn.Sequential(nn.Linear(4, 3)), config))
        >>> upper = Selection(model, task_loss=lambda x: model(x).square().mean())
        >>> [tuple(variable.shape) for variable in upper.variables]
        [(2, 1)]
    """

    def __init__(
        self, model: PeftModel, *, task_loss: TaskLoss | None = None, **level: Any
    ) -> None:
        logits = {id(part.logits) for part in component_weights(model).values()}
        named = [(name, p) for name, p in model.named_parameters() if id(p) in logits]
        super().__init__(model, named, task_loss=task_loss, **level)
