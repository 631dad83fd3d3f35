"""A learned gain on the update of LoRA layers: ΔW = s·B·diag(g)·A with g = g(u).

The gain is a parametrisation of B, so that the forward pass and dropout remain PEFT's. After
training, a method folds g into B, since stock PEFT loads no parametrisation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hyperopt_peft.adapters import peft_internals
from hyperopt_peft.adapters.layers import active_adapter, factors, lora_layers
from hyperopt_peft.errors import ProblemError

PREFIX = "base_model.model."  # of a base module's name in a PeftModel


class Gain(nn.Module):
    """B ↦ B·diag(g(u)); u has shape (1, r, 1, …), or (1, 1, 1, …) for one gain for all columns."""

    def __init__(self, u: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.u, self.function = nn.Parameter(u), function

    def values(self) -> Tensor:
        """g(u) without a gradient, flat."""
        return self.function(self.u.detach()).flatten()

    def forward(self, b: Tensor) -> Tensor:
        """B·diag(g(u))."""
        return b * self.function(self.u)


@dataclass(frozen=True)
class GainedLayer:
    """A LoRA layer, its name in the base model, A (r, in), and B without the gain, (out, r).

    Example:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules="0"))
        >>> (layer,) = add_gains(model, torch.exp, columns=True)
        >>> layer.name, layer.a.shape, layer.b.shape, layer.gain.values().shape
        ('0', torch.Size([8, 4]), torch.Size([3, 8]), torch.Size([8]))
    """

    name: str
    layer: LoraLayer
    gain: Gain
    a: Tensor
    b: Tensor


def add_gains(
    peft_model: PeftModel, function: Callable[[Tensor], Tensor], *, columns: bool
) -> list[GainedLayer]:
    """Give every layer of the active LoRA adapter a gain g(u), with u = 0.

    Args:
        function: g.
        columns: whether each column of B has its own u; else each layer has one.

    Raises:
        ProblemError: as `lora_layers`; or a layer is not plain LoRA on a linear layer or a
            convolution, or already has a gain. Nothing has changed.

    Example:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules="0"))
        >>> add_gains(model, torch.exp, columns=True)[0].gain.values()  # exp(u) at u = 0
        tensor([1., 1., 1., 1., 1., 1., 1., 1.])
    """
    adapter, layers = active_adapter(peft_model), lora_layers(peft_model)
    for name, layer in layers:
        variant = peft_internals.variant(layer, adapter)
        if adapter not in layer.lora_A or isinstance(layer, ParamWrapper) or variant:
            kind = type(variant or layer).__name__
            raise ProblemError(
                f"{name}: is a {kind}, and a gain needs plain LoRA on linear layers or "
                "convolutions; create the adapter without use_dora and without other layers"
            )
        if parametrize.is_parametrized(layer.lora_B[adapter]):
            raise ProblemError(f"{name}: has a gain already; load the model again")
    for _, layer in layers:
        b: Any = layer.lora_B[adapter]
        # u has as many dimensions as B: PEFT treats a flat parameter in lora_B as a broken B.
        u = b.weight.new_zeros(1, b.weight.shape[1] if columns else 1, *[1] * (b.weight.ndim - 2))
        parametrize.register_parametrization(b, "weight", Gain(u, function))
    return gained_layers(peft_model)


def gained_layers(peft_model: PeftModel) -> list[GainedLayer]:
    """The layers with a gain, in model order; empty after `remove_gains`.

    Example:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules="0"))
        >>> _ = add_gains(model, torch.exp, columns=False)
        >>> [layer.name for layer in gained_layers(model)]
        ['0']
    """
    adapter, gained = active_adapter(peft_model), []
    for name, layer in lora_layers(peft_model):
        b: Any = dict(layer.lora_B).get(adapter)
        if b is not None and parametrize.is_parametrized(b, "weight"):
            original, (gain,) = b.parametrizations.weight.original, b.parametrizations.weight
            name, (a, _) = name.removeprefix(PREFIX), factors(layer, adapter)
            gained.append(GainedLayer(name, layer, gain, a, original.flatten(1)))
    return gained


def gain_variables(peft_model: PeftModel) -> dict[str, Tensor]:
    """The u of every layer, by the layer's name in the base model.

    Example:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules="0"))
        >>> _ = add_gains(model, torch.exp, columns=True)
        >>> {name: u.shape for name, u in gain_variables(model).items()}
        {'0.gain': torch.Size([1, 8])}
    """
    return {f"{each.name}.gain": each.gain.u for each in gained_layers(peft_model)}


@torch.no_grad()
def remove_gains(peft_model: PeftModel, *, fold: bool = True) -> None:
    """Remove the gain of every layer; ``fold`` replaces B by B·diag(g).

    Example:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules="0"))
        >>> _ = add_gains(model, torch.exp, columns=False)
        >>> remove_gains(model)
        >>> gained_layers(model)
        []
    """
    adapter = active_adapter(peft_model)
    for each in gained_layers(peft_model):
        b: Any = each.layer.lora_B[adapter]
        value = b.weight
        parametrize.remove_parametrizations(b, "weight", leave_parametrized=False)
        if fold:
            b.weight.copy_(value)


@torch.no_grad()
def keep_terms(peft_model: PeftModel, masks: Mapping[str, Tensor]) -> PeftModel:
    """The base model with a new adapter of some rank-1 terms, the gains folded in.

    Args:
        masks: the terms of each layer, at least one, ``(r,)``, by its name in the base model. The
            scale s of a layer does not change.

    Example:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules="0"))
        >>> plain = keep_terms(model, {"0": torch.arange(8) < 3})
        >>> plain.peft_config["default"].rank_pattern
        {'^0': 3}
    """
    adapter = active_adapter(peft_model)
    config: Any = deepcopy(peft_model.peft_config[adapter])
    remove_gains(peft_model)
    terms, scales = {}, {}
    for path, layer in lora_layers(peft_model):
        mask, (a, b) = masks[name := path.removeprefix(PREFIX)], factors(layer, adapter)
        terms[path] = a[mask], b[:, mask]
        scales[name] = int(mask.sum()), layer.scaling[adapter]
    set_layers(config, scales)
    config.init_lora_weights = True
    plain = get_peft_model(peft_model.unload(), config, adapter_name=adapter)
    for path, layer in lora_layers(plain):
        for new, old in zip(factors(layer, adapter), terms[path], strict=True):
            new.copy_(old)
    return plain


def squares(peft_model: PeftModel) -> Tensor:
    """½ Σ ‖A‖² + ‖B‖² over the layers with a gain, for B without its gain; a scalar."""
    terms = [x.square().sum() / 2 for each in gained_layers(peft_model) for x in (each.a, each.b)]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def set_layers(config: LoraConfig, layers: Mapping[str, tuple[int, float]]) -> dict[str, float]:
    """Set each layer's rank and scale s in a LoraConfig; returns each s as PEFT will compute it.

    Example:
        >>> config = LoraConfig()
        >>> set_layers(config, {"0": (3, 2.0)}), config.rank_pattern, config.alpha_pattern
        ({'0': 2.0}, {'^0': 3}, {'^0': 6.0})
    """
    # PEFT matches a key as a regular expression with the end of a name.
    keys = {name: f"^{re.escape(name)}" for name in layers}
    root = 0.5 if config.use_rslora else 1
    config.rank_pattern = {keys[name]: rank for name, (rank, _) in layers.items()}
    config.alpha_pattern = {keys[n]: scale * rank**root for n, (rank, scale) in layers.items()}
    return {n: config.alpha_pattern[keys[n]] / rank**root for n, (rank, _) in layers.items()}
