"""A weight for each rank-1 component of a LoRA layer, and ranks from these weights.

    ΔW = s·Σ_j α_j B_{:,j} A_{j,:}

α is a function of logits β in one of two forms; both are 1 at β = 0, which is plain LoRA:

    softmax    α_j = r·exp β_j / Σ_i exp β_i    the mean over a layer is 1
    sigmoid    α_j = 2/(1 + exp(−β_j))          independent, between 0 and 2

diag(α)·A is a parametrization of PEFT's A, so that forward pass, dropout and merging are PEFT's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hyperopt_peft.adapters.layers import lora_layers, parametrization, resolve_adapter
from hyperopt_peft.errors import ProblemError

Form = Literal["softmax", "sigmoid"]
PREFIX = "base_model.model."


class ComponentWeights(nn.Module):
    """A ↦ diag(α)·A, for A of shape ``(r, …)``; ``logits`` are β, ``(r, 1, …)``."""

    def __init__(self, a: Tensor, form: Form) -> None:
        super().__init__()
        self.form = form
        # As many dimensions as A: PEFT assumes that a flat parameter of lora_A is a broken A.
        self.logits = nn.Parameter(a.new_zeros(len(a), *[1] * (a.ndim - 1)))

    def weights(self) -> Tensor:
        """α, in the shape of ``logits``."""
        if self.form == "sigmoid":
            return 2 * self.logits.sigmoid()
        # Division by the mean makes equal weights exactly 1, and the largest at least 1.
        e = (self.logits - self.logits.detach().max()).exp()
        return e / e.mean()

    def forward(self, a: Tensor) -> Tensor:
        """diag(α)·a."""
        return self.weights() * a


def add_selection(
    peft_model: PeftModel, form: Form = "softmax", adapter_name: str | None = None
) -> PeftModel:
    """Add a trainable weight, initially 1, to each component of each LoRA layer.

    The logits are parameters of the model and part of its checkpoints, so that
    ``save_pretrained`` does not write a stock adapter; see `rank_config` and `selected_state`.

    Args:
        form: ``"softmax"`` or ``"sigmoid"``, see the module.
        adapter_name: the active adapter by default.

    Returns:
        ``peft_model`` itself.

    Raises:
        ProblemError: as `lora_layers`; another ``form``; or a layer that has weights already, is
            frozen, or has no row of A for each component (embeddings, experts).

    Example:
        >>> from peft import get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> (part,) = component_weights(add_selection(model)).values()
        >>> part.weights().flatten().tolist()
        [1.0, 1.0]
    """
    if form not in ("softmax", "sigmoid"):
        raise ProblemError(f"form: must be 'softmax' or 'sigmoid', got {form!r}")
    adapter = resolve_adapter(peft_model, adapter_name)
    layers = lora_layers(peft_model, adapter)
    for name, layer in layers:
        if adapter not in layer.lora_A or len(layer.lora_A[adapter].weight) != layer.r[adapter]:
            raise ProblemError(
                f"{name}: {type(layer).__name__} has no row of A for each component; leave it out "
                "of target_modules and target_parameters"
            )
        if parametrize.is_parametrized(layer.lora_A[adapter]):
            raise ProblemError(
                f"{name}: has weights of its components already; call add_selection once only"
            )
        if not layer.lora_A[adapter].weight.requires_grad:
            raise ProblemError(f"{name}: is frozen; load the adapter with is_trainable=True")
    for _, layer in layers:
        a: Any = layer.lora_A[adapter]
        parametrize.register_parametrization(a, "weight", ComponentWeights(a.weight, form))
    return peft_model


def component_weights(
    peft_model: PeftModel, adapter_name: str | None = None
) -> dict[str, ComponentWeights]:
    """The modules with the logits β, by the layer's name in the base model.

    Raises:
        ProblemError: as `lora_layers`; or `add_selection` was not called.

    Example:
        >>> from peft import get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> list(component_weights(add_selection(model)))
        ['0']
    """
    adapter, found = resolve_adapter(peft_model, adapter_name), {}
    for name, layer in _layers(peft_model, adapter).items():
        part = parametrization(dict(layer.lora_A).get(adapter), ComponentWeights)
        if part is None:
            raise ProblemError(
                f"{name}: has no weights of its components; call add_selection first"
            )
        found[name] = part
    return found


@torch.no_grad()
def selected_ranks(
    peft_model: PeftModel, threshold: float = 1.0, adapter_name: str | None = None
) -> dict[str, int]:
    """The number of weights ≥ ``threshold`` of each layer, by its name in the base model.

    The default is the initial weight; with softmax it is AutoLoRA's threshold, and every rank is at
    least 1. With sigmoid a rank can be 0.

    Raises:
        ProblemError: as `component_weights`; or every weight is below ``threshold``.

    Example:
        >>> from peft import get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> selected_ranks(add_selection(model))
        {'0': 2}
    """
    weights = {n: w.weights() for n, w in component_weights(peft_model, adapter_name).items()}
    ranks = {name: int((alpha >= threshold).sum()) for name, alpha in weights.items()}
    if not any(ranks.values()):
        largest = max(float(alpha.max()) for alpha in weights.values())
        raise ProblemError(
            f"threshold: {threshold} removes every component; choose at most {largest:.4g}, the "
            "largest weight"
        )
    return ranks


def rank_config(
    peft_model: PeftModel, ranks: Mapping[str, int], adapter_name: str | None = None
) -> LoraConfig:
    """The adapter's config with a rank for each layer, for ``peft.get_peft_model``.

    The scale s of a layer does not change (``alpha_pattern``). A layer of rank 0 has no adapter.

    Args:
        ranks: the rank of each layer of the adapter, for example from `selected_ranks`.
        adapter_name: the active adapter by default.

    Raises:
        ProblemError: as `lora_layers`; ``ranks`` has other layers than the adapter; a rank is no
            whole number from 0; or all ranks are 0.

    Example:
        >>> from peft import get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> rank_config(model, {"0": 1}).rank_pattern
        {'^0': 1}
    """
    adapter, layers = resolve_adapter(peft_model, adapter_name), _layers(peft_model, adapter_name)
    _check_ranks(ranks, layers)
    config = deepcopy(peft_model.peft_config[adapter])
    config.inference_mode = False
    config.target_modules = {name for name in layers if ranks[name]}
    config.rank_pattern, config.alpha_pattern = {}, {}
    for name in config.target_modules:
        # PEFT matches a key, a regular expression, with the end of a name.
        key, divisor = f"^{re.escape(name)}", ranks[name] ** (0.5 if config.use_rslora else 1)
        config.rank_pattern[key] = ranks[name]
        config.alpha_pattern[key] = layers[name].scaling[adapter] * divisor
    return config


@torch.no_grad()
def selected_state(
    peft_model: PeftModel, ranks: Mapping[str, int], adapter_name: str | None = None
) -> dict[str, Tensor]:
    """The state dict of the components of largest weight, multiplied by the weights, and the heads.

    ``peft.set_peft_model_state_dict`` loads the state dict into a model made with `rank_config`.

    Raises:
        ProblemError: as `component_weights` and `rank_config`; or a rank is above r.

    Example:
        >>> from peft import get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> state = selected_state(add_selection(model), {"0": 1})
        >>> sorted(tuple(tensor.shape) for tensor in state.values())  # A, B
        [(1, 4), (3, 1)]
    """
    adapter, layers = resolve_adapter(peft_model, adapter_name), _layers(peft_model, adapter_name)
    _check_ranks(ranks, layers)
    state = get_peft_model_state_dict(peft_model, adapter_name=adapter)
    state = {key: value.clone() for key, value in state.items() if ".parametrizations." not in key}
    for name, weights in component_weights(peft_model, adapter).items():
        alpha, prefix = weights.weights().flatten(), f"{PREFIX}{name}.lora_"
        if ranks[name] > len(alpha):
            raise ProblemError(f"ranks: {name} has {len(alpha)} components, not {ranks[name]}")
        if ranks[name]:
            kept = alpha.topk(ranks[name]).indices.sort().values
            a: Any = layers[name].lora_A[adapter]
            state[f"{prefix}A.weight"] = a.weight[kept]
            state[f"{prefix}B.weight"] = state[f"{prefix}B.weight"][:, kept]
        else:
            state = {key: value for key, value in state.items() if not key.startswith(prefix)}
    return state


def _layers(peft_model: PeftModel, adapter_name: str | None) -> dict[str, LoraLayer]:
    return {name.removeprefix(PREFIX): x for name, x in lora_layers(peft_model, adapter_name)}


def _check_ranks(ranks: Mapping[str, int], layers: Mapping[str, LoraLayer]) -> None:
    if ranks.keys() != layers.keys():
        differing = ", ".join(sorted(ranks.keys() ^ layers.keys()))
        raise ProblemError(
            f"ranks: layers are not those of the adapter; they differ in {differing}"
        )
    for name, rank in ranks.items():
        if not isinstance(rank, int) or rank < 0:
            raise ProblemError(f"ranks: {name} must be a whole number from 0, got {rank!r}")
    if not any(ranks.values()):
        raise ProblemError(
            "ranks: every rank is 0, which leaves nothing to train; choose at least one above 0"
        )
