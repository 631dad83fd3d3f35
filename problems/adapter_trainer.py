"""`AdapterTrainer`: an adapter trained on all examples, in the harness of the bilevel trainers."""

from __future__ import annotations

from typing import Any

from hyperopt_peft.adapters import set_norm_grad, use_fast_dora
from hyperopt_peft.adapters.layers import adapter_settings, is_dora, resolve_adapter
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.problems.common import Adapter
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.data import joined
from hyperopt_peft.trainer.trainer import BilevelTrainer


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
        if upper_dataset is not None:
            train_dataset = joined(train_dataset=train_dataset, upper_dataset=upper_dataset)
        super().__init__(
            model, lower=_level, upper=None, args=args, train_dataset=train_dataset, **trainer
        )

    def settings(self) -> dict[str, Any]:
        """As `BilevelTrainer.settings`, with the adapter's options."""
        return adapter_settings(self.model) | super().settings()


def _level(trainer: BilevelTrainer) -> Problem:
    model = trainer.model
    if is_dora(model):
        fast = getattr(trainer.args, "fast_dora", True)
        (use_fast_dora if fast else set_norm_grad)(model, "detach")
    return Adapter(model, task_loss=trainer.task_loss)
