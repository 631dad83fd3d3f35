"""Functions on PEFT models: parameter ownership, DoRA's gradient, penalties, ranks, scales."""

from hyperopt_peft.adapters.analysis import (
    LineFit,
    ModuleChange,
    decompose,
    fit_line,
    plot_decomposition,
)
from hyperopt_peft.adapters.dora.fast import use_fast_dora
from hyperopt_peft.adapters.dora.variants import set_norm_grad
from hyperopt_peft.adapters.layers import direction, dora_layers, lora_layers
from hyperopt_peft.adapters.ownership import ParameterSplit, split_parameters
from hyperopt_peft.adapters.parametrizations.pseudo_svd import (
    orthogonality_penalty,
    pseudo_singular_values,
    use_pseudo_svd,
)
from hyperopt_peft.adapters.parametrizations.scales import (
    add_hyperparameters,
    fold_scales,
    layer_hyperparameters,
)
from hyperopt_peft.adapters.parametrizations.selection import (
    add_selection,
    component_weights,
    rank_config,
    selected_ranks,
    selected_state,
)
from hyperopt_peft.adapters.regularizers import gram, gram_penalty

__all__ = [
    "LineFit",
    "ModuleChange",
    "ParameterSplit",
    "add_hyperparameters",
    "add_selection",
    "component_weights",
    "decompose",
    "direction",
    "dora_layers",
    "fit_line",
    "fold_scales",
    "gram",
    "gram_penalty",
    "layer_hyperparameters",
    "lora_layers",
    "orthogonality_penalty",
    "plot_decomposition",
    "pseudo_singular_values",
    "rank_config",
    "selected_ranks",
    "selected_state",
    "set_norm_grad",
    "split_parameters",
    "use_fast_dora",
    "use_pseudo_svd",
]
