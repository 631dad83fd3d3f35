"""The rank of each LoRA layer, found by weighing its rank-1 components on validation data.

    upper: min over β       L(A*, B*, α(β); D_val)
    lower: A*, B*(β) = argmin over A, B, head   L(A, B, α(β); D_train) + decay·½(‖A‖² + ‖B‖²)

where ΔW = s·Σ_j α_j B_{:,j} A_{j,:} in each layer. Components whose α ends below a threshold are
dropped, and an adapter with the ranks that are left is trained anew, on all data. With softmax and
without decay this is AutoLoRA: Zhang et al. 2024, arXiv:2403.09113.

Without decay any positive α admits the same ΔW, so that at the lower minimum F does not depend on
α at all: what moves α is that the lower level has not arrived. With decay a component of small α is
a dear one, so that the lower level gathers ΔW in few components, and F says which layers need them.
Softmax leaves every layer one component; sigmoids may leave it none.

    add_selection(model)                    # model: a PeftModel with LoRA
    lower, upper = Components(model), Selection(model)
    ...                                     # train them with Engine or BilevelTrainer
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
    """Lower level: A and B of all layers, and the task head, on D_train; α is read.

    Args:
        model: a PeftModel after `add_selection` whose forward returns ``.loss``.
        decay: the weight of ½(‖A‖² + ‖B‖²), A without α.
        task_loss: L as a function of the batch, in place of the model's own.
        level: what `Problem` takes: data, optimizer, scheduler, max_grad_norm.
    """

    def __init__(
        self,
        model: PeftModel,
        *,
        decay: float = 0.0,
        task_loss: TaskLoss | None = None,
        **level: Any,
    ) -> None:
        logits = {id(part.logits) for part in component_weights(model).values()}
        self.decay = decay
        owned = [(name, p) for name, p in trainable(model) if id(p) not in logits]
        super().__init__(model, owned, task_loss=task_loss, **level)

    def loss(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """L + decay·½(‖A‖² + ‖B‖²); L is logged apart."""
        task = self.task_loss(batch)
        if self.decay == 0:
            return task
        pairs = zip(self.names, self.variables, strict=True)
        factors = [w for name, w in pairs if ".lora_A." in name or ".lora_B." in name]
        squares = sum(w.square().sum() for w in factors)
        return {"loss": task + self.decay / 2 * squares, "task_loss": task}


class Selection(TaskLevel):
    """Upper level: the logits β of all layers' weights α, on D_val; A, B and head are read.

    Args:
        model: a PeftModel after `add_selection` whose forward returns ``.loss``.
        task_loss: L as a function of the batch, in place of the model's own.
        level: what `Problem` takes: data, optimizer, scheduler, max_grad_norm.
    """

    def __init__(
        self, model: PeftModel, *, task_loss: TaskLoss | None = None, **level: Any
    ) -> None:
        logits = {id(part.logits) for part in component_weights(model).values()}
        named = [(name, p) for name, p in model.named_parameters() if id(p) in logits]
        super().__init__(model, named, task_loss=task_loss, **level)
