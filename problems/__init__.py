"""Bilevel methods, one file each, to use or to adapt."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperopt_peft.core.task_level import TaskLevel as TaskLevel
    from hyperopt_peft.problems.agreement import Agreement as Agreement
    from hyperopt_peft.problems.autolora import AutoLoRA as AutoLoRA
    from hyperopt_peft.problems.baselines import DoRA as DoRA
    from hyperopt_peft.problems.baselines import GivenWeights as GivenWeights
    from hyperopt_peft.problems.baselines import LoRA as LoRA
    from hyperopt_peft.problems.baselines import TrustedRepeated as TrustedRepeated
    from hyperopt_peft.problems.bidora import BiDoRA as BiDoRA
    from hyperopt_peft.problems.bilora import BiLoRA as BiLoRA
    from hyperopt_peft.problems.class_offsets import ClassOffsets as ClassOffsets
    from hyperopt_peft.problems.class_priors import FrequencyWeights as FrequencyWeights
    from hyperopt_peft.problems.class_priors import LogitAdjustment as LogitAdjustment
    from hyperopt_peft.problems.class_priors import TunedAdjustment as TunedAdjustment
    from hyperopt_peft.problems.data_plans import EqualSources as EqualSources
    from hyperopt_peft.problems.data_plans import SomeSources as SomeSources
    from hyperopt_peft.problems.find import find_method as find_method
    from hyperopt_peft.problems.head import Head as Head
    from hyperopt_peft.problems.layer_decay import LayerDecay as LayerDecay
    from hyperopt_peft.problems.layer_scales import LayerScales as LayerScales
    from hyperopt_peft.problems.row_weights import RowWeights as RowWeights
    from hyperopt_peft.problems.s3delta import S3Delta as S3Delta
    from hyperopt_peft.problems.seal import SEAL as SEAL
    from hyperopt_peft.problems.sources import Sources as Sources
    from hyperopt_peft.problems.weight_net import WeightNet as WeightNet

_MODULES = {
    "Agreement": "problems.agreement",
    "AutoLoRA": "problems.autolora",
    "BiDoRA": "problems.bidora",
    "BiLoRA": "problems.bilora",
    "ClassOffsets": "problems.class_offsets",
    "DoRA": "problems.baselines",
    "EqualSources": "problems.data_plans",
    "FrequencyWeights": "problems.class_priors",
    "GivenWeights": "problems.baselines",
    "Head": "problems.head",
    "LayerDecay": "problems.layer_decay",
    "LayerScales": "problems.layer_scales",
    "LogitAdjustment": "problems.class_priors",
    "LoRA": "problems.baselines",
    "RowWeights": "problems.row_weights",
    "S3Delta": "problems.s3delta",
    "SEAL": "problems.seal",
    "SomeSources": "problems.data_plans",
    "Sources": "problems.sources",
    "TaskLevel": "core.task_level",
    "TunedAdjustment": "problems.class_priors",
    "TrustedRepeated": "problems.baselines",
    "WeightNet": "problems.weight_net",
    "find_method": "problems.find",
}
#: The methods by the name that `find_method` and ``hyperopt-peft train --method`` take.
METHODS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "bidora": "BiDoRA",
    "bilora": "BiLoRA",
    "autolora": "AutoLoRA",
    "s3delta": "S3Delta",
    "layer_scales": "LayerScales",
    "layer_decay": "LayerDecay",
    "class_offsets": "ClassOffsets",
    "logit_adjustment": "LogitAdjustment",
    "tuned_adjustment": "TunedAdjustment",
    "frequency_weights": "FrequencyWeights",
    "row_weights": "RowWeights",
    "seal": "SEAL",
    "weight_net": "WeightNet",
    "given_weights": "GivenWeights",
    "sources": "Sources",
    "equal_sources": "EqualSources",
    "some_sources": "SomeSources",
    "agreement": "Agreement",
    "trusted_repeated": "TrustedRepeated",
}
__all__ = ["METHODS", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:  # the import of transformers' Trainer takes seconds
        return getattr(import_module(f"hyperopt_peft.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
