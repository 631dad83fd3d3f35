"""`AdapterTrainer`: an adapter trained on all examples, in the harness of the bilevel trainers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperopt_peft.adapters import set_norm_grad, use_fast_dora
from hyperopt_peft.adapters.layers import is_dora, resolve_adapter
from hyperopt_peft.core.problem import TaskLoss
from hyperopt_peft.problems.common import Adapter
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.method import Method
from hyperopt_peft.trainer.trainer import BilevelTrainer


@dataclass
class Baseline(Method):
    """The training of an adapter as it is; a DoRA layer has PEFT's gradient."""

    fast_dora: bool = True

    def prepare(self, model: Any) -> None:
        """Let DoRA layers run the fast forward pass, or PEFT's."""
        if is_dora(model):
            (use_fast_dora if self.fast_dora else set_norm_grad)(model, "detach")

    def lower(self, model: Any, task_loss: TaskLoss) -> Adapter:
        """`Adapter` of ``model``."""
        return Adapter(model, task_loss=task_loss)


class AdapterTrainer(BilevelTrainer):
    """The baseline of a bilevel trainer: one level, all of the adapter, all of the examples.

    LoRA, DoRA or another adapter, whichever the model has, is trained as `BiDoRATrainer` trains:
    with its batches, accumulation, logs, checkpoints and resuming, so that a comparison compares
    methods. A DoRA layer has PEFT's gradient, with the norm outside the graph.

    Args:
        model: a PeftModel.
        args: the settings; may be those of the trainer to compare with. The settings of an upper
            level and of a retraining are not read; ``fast_dora`` of `BiDoRATrainingArguments` is.
        train_dataset: training examples.
        upper_dataset: further training examples: those that the bilevel trainer has for its upper
            level.
        trainer: further arguments of `transformers.Trainer`.

    Raises:
        ProblemError: as `BilevelTrainer`; ``model`` is no PeftModel; or the data sets do not join.

    Example:
        >>> from datasets import Dataset
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = get_peft_model(BertForSequenceClassification(tiny), LoraConfig())
        >>> rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [0, 1]})
        >>> args = BilevelTrainingArguments("outputs", report_to="none", use_cpu=True)
        >>> [level.name for level in AdapterTrainer(model, args, train_dataset=rows).levels]
        ['Adapter']
    """

    def __init__(
        self,
        model: Any,
        args: BilevelTrainingArguments,
        *,
        train_dataset: Any,
        upper_dataset: Any = None,
        **trainer: Any,
    ) -> None:
        if trainer.get("peft_config") is None:
            resolve_adapter(model)
        method = Baseline(getattr(args, "fast_dora", True))
        super().__init__(
            model,
            args,
            method=method,
            train_dataset=train_dataset,
            upper_dataset=upper_dataset,
            **trainer,
        )
