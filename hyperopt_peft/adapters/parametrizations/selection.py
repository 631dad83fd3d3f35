"""A weight for each rank-1 component of a LoRA layer, and the ranks that follow.

    ΔW = s·Σ_j α_j B_{:,j} A_{j,:}

α is a function of free logits β in one of two forms, both 1 at β = 0, where this is plain LoRA:

    softmax    α_j = r·exp β_j / Σ_i exp β_i    the weights of a layer compete; their mean stays 1
    sigmoid    α_j = 2/(1 + exp(−β_j))          each on its own, between 0 and 2

The rows of A are multiplied by α where they are read, a parametrisation as PyTorch has it, so that
forward pass, dropout and merging stay PEFT's own.
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
        # As many dimensions as A: PEFT takes a flat tensor beside A for a broken one.
        self.logits = nn.Parameter(a.new_zeros(len(a), *[1] * (a.ndim - 1)))

    def weights(self) -> Tensor:
        """α, in the shape of ``logits``."""
        if self.form == "sigmoid":
            return 2 * self.logits.sigmoid()
        # Divided by their mean, equal ones are exactly 1, and the largest is never below 1.
        e = (self.logits - self.logits.detach().max()).exp()
        return e / e.mean()

    def forward(self, a: Tensor) -> Tensor:
        """diag(α)·a."""
        return self.weights() * a


def add_selection(
    peft_model: PeftModel, form: Form = "softmax", adapter_name: str | None = None
) -> PeftModel:
    """Give each component of each LoRA layer a trainable weight, 1 at the start.

    The logits become parameters of the model, next to the A that they act on, and go into its
    checkpoints. What ``save_pretrained`` writes then is not a stock adapter any more; one is made
    of `rank_config` and, to keep what was learnt, `selected_state`.

    Args:
        form: ``"softmax"`` or ``"sigmoid"``, see above.
        adapter_name: the active adapter by default.

    Returns:
        ``peft_model`` itself.

    Raises:
        ProblemError: as `lora_layers`; another ``form``; a layer
            that has weights already, is frozen, or has no row of A for each component
            (embeddings, experts).
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
    """What `add_selection` added, by the layer's name in the base model.

    Raises:
        ProblemError: as `lora_layers`; it was not called.
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
    """How many weights of each layer are ``threshold`` or more, by its name in the base model.

    The default is where all weights start. With softmax it is AutoLoRA's threshold, 1/r on a
    softmax without the factor r, and every layer keeps a component; with sigmoid a rank can be 0.

    Raises:
        ProblemError: as `component_weights`; no weight of any layer reaches ``threshold``.
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
    """The adapter's config with a rank for each layer, as ``peft.get_peft_model`` takes it.

    Every layer keeps its scale s, by ``alpha_pattern``. A layer of rank 0 gets no adapter.

    Args:
        ranks: what `selected_ranks` returns, or other ranks of the same layers.
        adapter_name: the active adapter by default.

    Raises:
        ProblemError: as `lora_layers`; ranks of other layers than
            the adapter's, one that is no whole number from 0, or none above 0.
    """
    adapter, layers = resolve_adapter(peft_model, adapter_name), _layers(peft_model, adapter_name)
    _check_ranks(ranks, layers)
    config = deepcopy(peft_model.peft_config[adapter])
    config.inference_mode = False
    config.target_modules = {name for name in layers if ranks[name]}
    config.rank_pattern, config.alpha_pattern = {}, {}
    for name in config.target_modules:
        # PEFT reads a key as the end of a name, in the language of regular expressions.
        key, divisor = f"^{re.escape(name)}", ranks[name] ** (0.5 if config.use_rslora else 1)
        config.rank_pattern[key] = ranks[name]
        config.alpha_pattern[key] = layers[name].scaling[adapter] * divisor
    return config


@torch.no_grad()
def selected_state(
    peft_model: PeftModel, ranks: Mapping[str, int], adapter_name: str | None = None
) -> dict[str, Tensor]:
    """The components of the largest weights, multiplied by these, and the heads.

    ``peft.set_peft_model_state_dict`` takes it for a model made with `rank_config`, whose
    training then starts from the result of the search.

    Raises:
        ProblemError: as `component_weights` and `rank_config`; a rank above r.
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
