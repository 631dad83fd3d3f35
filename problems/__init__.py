"""Bilevel programs: BiDoRA and others, to use or to adapt."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperopt_peft.problems.bidora_trainer import BiDoRATrainer, BiDoRATrainingArguments
    from hyperopt_peft.problems.mix_trainer import MixTrainer, MixTrainingArguments

_MODULES = {
    "BiDoRATrainer": "bidora_trainer",
    "BiDoRATrainingArguments": "bidora_trainer",
    "MixTrainer": "mix_trainer",
    "MixTrainingArguments": "mix_trainer",
}
__all__ = ["BiDoRATrainer", "BiDoRATrainingArguments", "MixTrainer", "MixTrainingArguments"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:  # the import of transformers' Trainer takes seconds
        return getattr(import_module(f"hyperopt_peft.problems.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
