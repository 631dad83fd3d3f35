"""Bilevel trainers over TRL's, and TRL's own with the same settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from hyperopt_peft import Method, bilevel
from tests.support.language import LAYOUTS, language_model, lora, rows, tokenizer
from tests.support.trainers import QUIET

CONFIGS = {
    SFTTrainer: SFTConfig,
    DPOTrainer: DPOConfig,
    KTOTrainer: KTOConfig,
    RewardTrainer: RewardConfig,
}


def data_for(kind: type, layout: str) -> Dataset:
    """Rows that a trainer ``kind`` reads; ``layout`` is SFTTrainer's."""
    if kind is SFTTrainer:
        return rows(layout, 24)
    pairs = rows("preference", 24)
    if kind is not KTOTrainer:
        return pairs
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "completion": row["chosen" if k % 2 else "rejected"],
                "label": bool(k % 2),
            }
            for k, row in enumerate(pairs)
        ]
    )


def model_for(kind: type, **options: Any) -> Any:
    model = language_model(**options)
    if kind is not RewardTrainer:
        return model
    return LlamaForSequenceClassification(
        LlamaConfig(**{**model.config.to_dict(), "num_labels": 1})
    )


def made(
    folder: Path,
    parent: type,
    kind: type | Method | None = None,
    layout: str = "completion",
    *,
    callbacks: Sequence[Any] = (),
    options: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """``parent`` itself, or over it a bilevel trainer: of the method ``kind``, or of one level."""
    task = "SEQ_CLS" if parent is RewardTrainer else "CAUSAL_LM"
    common: dict[str, Any] = {
        **QUIET,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        **LAYOUTS.get(layout, {}),
        **settings,
    }
    options = dict(options or {})
    model = options.pop("model", None) or model_for(parent)
    if isinstance(kind, Method):
        options = {"method": kind} | options
    cls: Any = parent if kind is None else bilevel(parent)
    arguments = CONFIGS[parent] if kind is None else cls.Arguments
    config = lora(**(adapter or {}))
    config.task_type = task
    return cls(
        model=model,
        args=arguments(str(folder), **common),
        **{
            "train_dataset": data_for(parent, layout),
            "processing_class": tokenizer(),
            "peft_config": config,
            "callbacks": list(callbacks),
            **options,
        },
    )
