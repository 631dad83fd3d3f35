"""Bilevel methods, one file each, to use or to adapt."""

from typing import TYPE_CHECKING

from hyperopt_peft.utils.lazy import lazy

if TYPE_CHECKING:
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
    from hyperopt_peft.problems.layer_decay import LayerDecay as LayerDecay
    from hyperopt_peft.problems.layer_scales import LayerScales as LayerScales
    from hyperopt_peft.problems.loss_correction import LossCorrection as LossCorrection
    from hyperopt_peft.problems.row_weights import RowWeights as RowWeights
    from hyperopt_peft.problems.seal import SEAL as SEAL
    from hyperopt_peft.problems.sources import Sources as Sources
    from hyperopt_peft.problems.weight_net import WeightNet as WeightNet
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
