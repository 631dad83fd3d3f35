"""Bilevel programs: BiDoRA and others, to use or to adapt."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperopt_peft.problems.bidora_trainer import BiDoRATrainer, BiDoRATrainingArguments

__all__ = ["BiDoRATrainer", "BiDoRATrainingArguments"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # the import of transformers' Trainer takes seconds
        from hyperopt_peft.problems import bidora_trainer

        return getattr(bidora_trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
