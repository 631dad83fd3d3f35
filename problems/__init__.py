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
    from hyperopt_peft.problems.layer_decay import LayerDecay as LayerDecay
    from hyperopt_peft.problems.layer_scales import LayerScales as LayerScales
    from hyperopt_peft.problems.row_weights import RowWeights as RowWeights
    from hyperopt_peft.problems.s3delta import S3Delta as S3Delta
    from hyperopt_peft.problems.seal import SEAL as SEAL
    from hyperopt_peft.problems.sources import Sources as Sources
    from hyperopt_peft.problems.weight_net import WeightNet as WeightNet

#: The methods' modules and classes, by the name that `find_method` and ``train --method`` take.
METHODS = {
    "lora": ("baselines", "LoRA"),
    "dora": ("baselines", "DoRA"),
    "bidora": ("bidora", "BiDoRA"),
    "bilora": ("bilora", "BiLoRA"),
    "autolora": ("autolora", "AutoLoRA"),
    "s3delta": ("s3delta", "S3Delta"),
    "layer_scales": ("layer_scales", "LayerScales"),
    "layer_decay": ("layer_decay", "LayerDecay"),
    "class_offsets": ("class_offsets", "ClassOffsets"),
    "logit_adjustment": ("class_priors", "LogitAdjustment"),
    "tuned_adjustment": ("class_priors", "TunedAdjustment"),
    "frequency_weights": ("class_priors", "FrequencyWeights"),
    "row_weights": ("row_weights", "RowWeights"),
    "seal": ("seal", "SEAL"),
    "weight_net": ("weight_net", "WeightNet"),
    "given_weights": ("baselines", "GivenWeights"),
    "sources": ("sources", "Sources"),
    "equal_sources": ("data_plans", "EqualSources"),
    "some_sources": ("data_plans", "SomeSources"),
    "agreement": ("agreement", "Agreement"),
    "trusted_repeated": ("baselines", "TrustedRepeated"),
}
_MODULES = {made: f"problems.{module}" for module, made in METHODS.values()}
_MODULES["find_method"] = "problems.find"
_MODULES["TaskLevel"] = "core.task_level"
__all__ = ["METHODS", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:  # the import of transformers' Trainer takes seconds
        return getattr(import_module(f"hyperopt_peft.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
