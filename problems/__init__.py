"""Bilevel programs: BiDoRA and others, to use or to adapt."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperopt_peft.problems.baselines import DoRA, LoRA
    from hyperopt_peft.problems.bidora import BiDoRA
    from hyperopt_peft.problems.common import Adapter, TaskLevel
    from hyperopt_peft.problems.data_sources import SourceWeights
    from hyperopt_peft.problems.head import Head
    from hyperopt_peft.problems.source_data import by_column
    from hyperopt_peft.problems.source_trainer import SourceTrainer

_MODULES = {
    "Adapter": "common",
    "BiDoRA": "bidora",
    "DoRA": "baselines",
    "Head": "head",
    "LoRA": "baselines",
    "SourceTrainer": "source_trainer",
    "SourceWeights": "data_sources",
    "TaskLevel": "common",
    "by_column": "source_data",
}
__all__ = [
    "Adapter",
    "BiDoRA",
    "DoRA",
    "Head",
    "LoRA",
    "SourceTrainer",
    "SourceWeights",
    "TaskLevel",
    "by_column",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:  # the import of transformers' Trainer takes seconds
        return getattr(import_module(f"hyperopt_peft.problems.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
