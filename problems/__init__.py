"""Bilevel programs: BiDoRA and others, to use or to adapt."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperopt_peft.problems.baselines import DoRA, LoRA
    from hyperopt_peft.problems.bidora import BiDoRA
    from hyperopt_peft.problems.common import Adapter, TaskLevel
    from hyperopt_peft.problems.data_plans import Agreement, EqualSources, TrustedRepeated
    from hyperopt_peft.problems.head import Head
    from hyperopt_peft.problems.row_weights import RowWeights, WeightNet
    from hyperopt_peft.problems.sources import Sources

_MODULES = {
    "Adapter": "common",
    "Agreement": "data_plans",
    "BiDoRA": "bidora",
    "DoRA": "baselines",
    "EqualSources": "data_plans",
    "Head": "head",
    "LoRA": "baselines",
    "RowWeights": "row_weights",
    "Sources": "sources",
    "TaskLevel": "common",
    "TrustedRepeated": "data_plans",
    "WeightNet": "row_weights",
}
__all__ = [
    "Adapter",
    "Agreement",
    "BiDoRA",
    "DoRA",
    "EqualSources",
    "Head",
    "LoRA",
    "RowWeights",
    "Sources",
    "TaskLevel",
    "TrustedRepeated",
    "WeightNet",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:  # the import of transformers' Trainer takes seconds
        return getattr(import_module(f"hyperopt_peft.problems.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
