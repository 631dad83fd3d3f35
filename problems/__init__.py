"""Bilevel methods, one file each, to use or to adapt."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperopt_peft.problems.autolora import AutoLoRA
    from hyperopt_peft.problems.baselines import DoRA, LoRA
    from hyperopt_peft.problems.bidora import BiDoRA
    from hyperopt_peft.problems.bilora import BiLoRA
    from hyperopt_peft.problems.class_offsets import ClassOffsets
    from hyperopt_peft.problems.common import TaskLevel
    from hyperopt_peft.problems.data_plans import Agreement, EqualSources, TrustedRepeated
    from hyperopt_peft.problems.head import Head
    from hyperopt_peft.problems.layer_scales import LayerScales
    from hyperopt_peft.problems.row_weights import RowWeights, WeightNet
    from hyperopt_peft.problems.sources import Sources

_MODULES = {
    "Agreement": "data_plans",
    "AutoLoRA": "autolora",
    "BiDoRA": "bidora",
    "BiLoRA": "bilora",
    "ClassOffsets": "class_offsets",
    "DoRA": "baselines",
    "EqualSources": "data_plans",
    "Head": "head",
    "LayerScales": "layer_scales",
    "LoRA": "baselines",
    "RowWeights": "row_weights",
    "Sources": "sources",
    "TaskLevel": "common",
    "TrustedRepeated": "data_plans",
    "WeightNet": "row_weights",
}
__all__ = [
    "Agreement",
    "AutoLoRA",
    "BiDoRA",
    "BiLoRA",
    "ClassOffsets",
    "DoRA",
    "EqualSources",
    "Head",
    "LayerScales",
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
