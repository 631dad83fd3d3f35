"""Bilevel programs: BiDoRA and others, to use or to adapt."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperopt_peft.problems.adapter_trainer import AdapterTrainer
    from hyperopt_peft.problems.bidora import BiDoRA
    from hyperopt_peft.problems.bidora_trainer import BiDoRATrainer, BiDoRATrainingArguments
    from hyperopt_peft.problems.common import Adapter, TaskLevel
    from hyperopt_peft.problems.data_plans import Agreement, EqualSources, TrustedRepeated
    from hyperopt_peft.problems.head import Head
    from hyperopt_peft.problems.row_weights import RowWeights, WeightNet
    from hyperopt_peft.problems.sources import Sources
    from hyperopt_peft.problems.two_phases import TwoPhaseTrainingArguments

_MODULES = {
    "Adapter": "common",
    "AdapterTrainer": "adapter_trainer",
    "BiDoRA": "bidora",
    "BiDoRATrainer": "bidora_trainer",
    "BiDoRATrainingArguments": "bidora_trainer",
    "Head": "head",
    "Agreement": "data_plans",
    "EqualSources": "data_plans",
    "TrustedRepeated": "data_plans",
    "RowWeights": "row_weights",
    "WeightNet": "row_weights",
    "Sources": "sources",
    "TaskLevel": "common",
    "TwoPhaseTrainingArguments": "two_phases",
}
__all__ = [
    "Adapter",
    "AdapterTrainer",
    "Agreement",
    "BiDoRA",
    "BiDoRATrainer",
    "BiDoRATrainingArguments",
    "EqualSources",
    "Head",
    "RowWeights",
    "Sources",
    "TaskLevel",
    "TrustedRepeated",
    "TwoPhaseTrainingArguments",
    "WeightNet",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:  # the import of transformers' Trainer takes seconds
        return getattr(import_module(f"hyperopt_peft.problems.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
