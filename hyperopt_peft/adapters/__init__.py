"""Functions on PEFT models: layers, groups of parameters, DoRA's gradient, penalties, gains."""

from hyperopt_peft.adapters.dora.fast import use_fast_dora
from hyperopt_peft.adapters.dora.variants import set_norm_grad
from hyperopt_peft.adapters.layers import ParameterSplit, dora_layers, lora_layers, split_parameters
from hyperopt_peft.adapters.regularizers import gram_penalty

__all__ = [
    "ParameterSplit",
    "dora_layers",
    "gram_penalty",
    "lora_layers",
    "set_norm_grad",
    "split_parameters",
    "use_fast_dora",
]
