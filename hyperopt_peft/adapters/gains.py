"""A learned gain on the update of LoRA layers: ΔW = s·B·diag(g)·A with g = g(u).

The gain is a parametrisation of PEFT's own B, so that forward pass and dropout stay PEFT's. A
method learns u and folds g away in the end, since stock PEFT loads no parametrisation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hyperopt_peft.adapters import peft_internals
from hyperopt_peft.adapters.layers import active_adapter, factors, lora_layers
from hyperopt_peft.errors import ProblemError

PREFIX = "base_model.model."  # of the base model's names in a PeftModel


class Gain(nn.Module):
    """B ↦ B·diag(g(u)); u has shape (1, r, 1, …), or (1, 1, 1, …) for one gain of all columns.

    In training mode g may be another function, such as a draw.
    """

    def __init__(
        self,
        u: Tensor,
        function: Callable[[Tensor], Tensor],
        in_training: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.u, self.function, self.in_training = nn.Parameter(u), function, in_training or function

    def values(self) -> Tensor:
        """g(u) without a gradient, flat."""
        return self.function(self.u.detach()).flatten()

    def forward(self, b: Tensor) -> Tensor:
        """B·diag(g(u))."""
        return b * (self.in_training if self.training else self.function)(self.u)


@dataclass(frozen=True)
class GainedLayer:
    """A LoRA layer by its name in the base model, A (r, in), and B without the gain, (out, r)."""

    name: str
    layer: LoraLayer
    gain: Gain
    a: Tensor
    b: Tensor


def add_gains(
    peft_model: PeftModel,
    function: Callable[[Tensor], Tensor],
    *,
    columns: bool,
    in_training: Callable[[Tensor], Tensor] | None = None,
) -> list[GainedLayer]:
    """Give every layer of the active LoRA adapter a gain g(u), u = 0.

    Args:
        function: g of u.
        columns: whether each column of B has a u; else a layer has one.
        in_training: g in training mode, if it is another one.

    Raises:
        ProblemError: as `lora_layers`; or a layer is no plain LoRA on a linear layer or a
            convolution, or has a gain already. Nothing has changed.
    """
    adapter, layers = active_adapter(peft_model), lora_layers(peft_model)
    for name, layer in layers:
        variant = peft_internals.variant(layer, adapter)
        if adapter not in layer.lora_A or isinstance(layer, peft_internals.ParamWrapper) or variant:
            kind = type(variant or layer).__name__
            raise ProblemError(
                f"{name}: is a {kind}, and a gain needs plain LoRA on linear layers or "
                "convolutions; create the adapter without use_dora and leave the others out"
            )
        if parametrize.is_parametrized(layer.lora_B[adapter]):
            raise ProblemError(f"{name}: has a gain already; make the model anew")
    for _, layer in layers:
        b: Any = layer.lora_B[adapter]
        # As many dimensions as B: PEFT assumes that a flat parameter of lora_B is a broken B.
        u = b.weight.new_zeros(1, b.weight.shape[1] if columns else 1, *[1] * (b.weight.ndim - 2))
        parametrize.register_parametrization(b, "weight", Gain(u, function, in_training))
    return gained_layers(peft_model)


def gained_layers(peft_model: PeftModel) -> list[GainedLayer]:
    """The layers with a gain, in model order; there is none after `remove_gains`."""
    adapter, gained = active_adapter(peft_model), []
    for name, layer in lora_layers(peft_model):
        b: Any = dict(layer.lora_B).get(adapter)
        if b is not None and parametrize.is_parametrized(b, "weight"):
            original, (gain,) = b.parametrizations.weight.original, b.parametrizations.weight
            name, (a, _) = name.removeprefix(PREFIX), factors(layer, adapter)
            gained.append(GainedLayer(name, layer, gain, a, original.flatten(1)))
    return gained


def gain_variables(peft_model: PeftModel) -> dict[str, Tensor]:
    """u of every layer, by the layer's name in the base model."""
    return {f"{each.name}.gain": each.gain.u for each in gained_layers(peft_model)}


@torch.no_grad()
def remove_gains(peft_model: PeftModel, *, fold: bool = True) -> None:
    """Leave B·diag(g) as B in every layer, or B alone."""
    adapter = active_adapter(peft_model)
    for each in gained_layers(peft_model):
        b: Any = each.layer.lora_B[adapter]
        each.gain.eval()
        value = b.weight
        parametrize.remove_parametrizations(b, "weight", leave_parametrized=False)
        if fold:
            b.weight.copy_(value)


@torch.no_grad()
def keep_terms(peft_model: PeftModel, kept: Mapping[str, Tensor]) -> PeftModel:
    """The base model with a new adapter: some rank-1 terms of layers with a gain, folded.

    Args:
        kept: a mask ``(r,)`` for each layer, by its name in the base model; a layer without
            kept terms has no adapter. The scale s of a layer stays.
    """
    adapter = active_adapter(peft_model)
    config: Any = deepcopy(peft_model.peft_config[adapter])
    remove_gains(peft_model)
    terms, scales = {}, {}
    for path, layer in lora_layers(peft_model):
        name = path.removeprefix(PREFIX)
        if rank := int(kept[name].sum()):
            a, b = factors(layer, adapter)
            terms[path] = a[kept[name]], b[:, kept[name]]
            scales[name] = rank, layer.scaling[adapter]
    if len(scales) < len(kept):
        config.target_modules = "|".join(map(re.escape, scales))
        config.layers_to_transform = config.layers_pattern = None  # which need a list of modules
    set_layers(config, scales)
    config.init_lora_weights = True
    plain = get_peft_model(peft_model.unload(), config, adapter_name=adapter)
    for path, layer in lora_layers(plain):
        for new, old in zip(factors(layer, adapter), terms[path], strict=True):
            new.copy_(old)
    return plain


def drawn(count: int) -> Tensor:
    """``count`` numbers in [0, 1) by the seed of the run, the same at each call."""
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    return torch.rand(count, generator=generator)


def largest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of the ``count`` largest scores of all layers, at least one a layer; ties are drawn."""
    values = [score.detach().double().cpu().clone() for score in scores]
    for value in values:
        value[value.argmax()] = torch.inf
    flat, numbers = torch.cat(values), drawn(sum(map(len, values))).argsort()
    best = numbers[flat[numbers].argsort(descending=True, stable=True)][: max(count, len(values))]
    mask = torch.zeros(len(flat), dtype=torch.bool).index_fill_(0, best, True)
    sizes = [len(value) for value in values]
    return [m.to(score.device) for m, score in zip(mask.split(sizes), scores, strict=True)]


def squares(peft_model: PeftModel) -> Tensor:
    """½ Σ ‖A‖² + ‖B‖² over the layers with a gain, B without it; a scalar."""
    terms = [x.square().sum() / 2 for each in gained_layers(peft_model) for x in (each.a, each.b)]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def set_layers(config: Any, layers: Mapping[str, tuple[int, float]]) -> dict[str, float]:
    """Let a LoraConfig have the rank and the scale s that ``layers`` has for each layer's name.

    Returns:
        Each s as PEFT computes it of the config.
    """
    # PEFT matches a key, a regular expression, with the end of a name.
    keys = {name: f"^{re.escape(name)}" for name in layers}
    root = 0.5 if config.use_rslora else 1
    config.rank_pattern = {keys[name]: rank for name, (rank, _) in layers.items()}
    config.alpha_pattern = {keys[n]: scale * rank**root for n, (rank, scale) in layers.items()}
    return {n: config.alpha_pattern[keys[n]] / rank**root for n, (rank, _) in layers.items()}
