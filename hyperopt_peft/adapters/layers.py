"""PEFT's LoRA layers as matrices, and their parameters.

For a frozen weight W0 of shape (out, in), factors B (out, r) and A (r, in) and a scale s:

    V  = W0 + s·B·A         direction, before normalisation
    n  = ‖V_j‖ for row j    row norm
    W' = m ⊙ V / n          effective weight; m: magnitude, one entry per row

This is DoRA (arXiv:2402.09353, Eq. 5) with one magnitude per output row, as in PEFT. For every
layer type an entry of m belongs to a row of V:

    layer             rows of V                columns of V
    Linear, Conv1D    output features          input features
    Conv1d, 2d, 3d    output channels          input channels × kernel
    Embedding         embedding dimensions     vocabulary
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import reduce
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hyperopt_peft.adapters import peft_internals
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.distributed import is_sharded
from hyperopt_peft.utils.models import require_unwrapped
from hyperopt_peft.utils.types import Model

#: Where PEFT keeps the layers and parameters that it wraps.
WRAPPERS = ("base_layer", "original_module", "token_adapter")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PLAIN_MODULES = (nn.Linear, Conv1D, nn.Embedding, *CONVOLUTIONS)
PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
READABLE_LAYERS = (lora.Linear, lora.Embedding, lora.Conv1d, lora.Conv2d, lora.Conv3d)


def active_adapter(peft_model: PeftModel) -> str:
    """The name of the active adapter; all functions of `hyperopt_peft.adapters` work on it.

    Raises:
        ProblemError: ``peft_model`` is not a PeftModel, or not exactly one adapter is active.
    """
    require_unwrapped(peft_model)
    if not isinstance(peft_model, PeftModel):
        raise ProblemError(
            f"peft_model: must be a PeftModel, got {type(peft_model).__name__}; wrap the model "
            "with peft.get_peft_model"
        )
    active: list[str] = list(peft_model.active_adapters)
    if len(active) != 1:
        raise ProblemError(
            f"peft_model: must have one active adapter, has {active}; choose with set_adapter"
        )
    return active[0]


def lora_layers(peft_model: PeftModel) -> list[tuple[str, lora.LoraLayer]]:
    """The names and modules of the LoRA layers of the active adapter, in model order.

    Raises:
        ProblemError: as `active_adapter`; the adapter has no LoRA layer; or a layer is merged.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> [name for name, _ in lora_layers(model)]
        ['base_model.model.0']
    """
    adapter = active_adapter(peft_model)
    layers = [
        (name, module)
        for name, module in peft_model.named_modules()
        if isinstance(module, lora.LoraLayer)
        and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    ]
    if not layers:
        raise ProblemError(f"adapter {adapter!r}: has no LoRA layer; create it from a LoraConfig")
    for name, layer in layers:
        if layer.merged:
            raise ProblemError(
                f"{name}: has merged adapters {layer.merged_adapters}; call unmerge_adapter() first"
            )
    return layers


def dora_layers(peft_model: PeftModel) -> list[tuple[str, lora.LoraLayer]]:
    """As `lora_layers`, for an adapter with a magnitude in every layer (DoRA).

    Raises:
        ProblemError: as `lora_layers`; or a layer has no magnitude.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, use_dora=True, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> [name for name, _ in dora_layers(model)]
        ['base_model.model.0']
    """
    adapter, layers = active_adapter(peft_model), lora_layers(peft_model)
    for name, layer in layers:
        if adapter not in layer.lora_magnitude_vector:
            raise ProblemError(
                f"{name}: has no magnitude for adapter {adapter!r}; "
                "create the adapter with LoraConfig(use_dora=True)"
            )
    return layers


class ParameterSplit(NamedTuple):
    """The trainable parameters of a PeftModel in three groups, each in model order.

    ``magnitudes`` has the m of every DoRA layer, ``directions`` the factors A and B, and ``rest``
    the other trainable parameters, such as a task head. Names are as in ``named_parameters()``.

    Example:
        >>> ParameterSplit({}, {}, {}).magnitudes
        {}
    """

    magnitudes: dict[str, nn.Parameter]
    directions: dict[str, nn.Parameter]
    rest: dict[str, nn.Parameter]


def split_parameters(peft_model: PeftModel) -> ParameterSplit:
    """Split the trainable parameters into magnitudes, directions and the rest.

    BiDoRA (arXiv:2410.09758) uses this split: magnitudes at the upper level, directions and the
    rest at the lower level. It works for every layer type for which PEFT has DoRA.

    Raises:
        ProblemError: as `dora_layers`; or a magnitude or a direction is frozen.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, use_dora=True, target_modules=["0"])
        >>> split = split_parameters(get_peft_model(nn.Sequential(nn.Linear(4, 3)), config))
        >>> len(split.magnitudes), len(split.directions), len(split.rest)
        (1, 2, 0)
    """
    adapter, groups = active_adapter(peft_model), {}
    split = ParameterSplit({}, {}, {})
    for _, layer in dora_layers(peft_model):
        for name, parameter in layer.named_parameters():
            kind, owner, *_ = name.split(".")
            if kind.startswith("lora_") and owner == adapter:
                of_norm = kind == "lora_magnitude_vector"
                groups[id(parameter)] = split.magnitudes if of_norm else split.directions
    for name, parameter in peft_model.named_parameters():
        group = groups.get(id(parameter), split.rest)
        if parameter.requires_grad:
            group[name] = parameter
        elif group is not split.rest:
            raise ProblemError(
                f"{name}: is frozen; load adapter {adapter!r} with "
                "PeftModel.from_pretrained(..., is_trainable=True) or activate it with set_adapter"
            )
    return split


def require_plain(layer: lora.LoraLayer, adapter_name: str, name: str) -> None:
    """Raise ProblemError unless the layer ``name`` computes with V = W0 + s·B·A and W0 is readable.

    Its base layer must be neither quantised nor have a forward pass of its own, its convolution
    plain, and its adapter LoRA or DoRA.
    """
    base: Any = layer.get_base_layer()
    if not isinstance(layer, READABLE_LAYERS) or not _is_plain(layer, base):
        raise ProblemError(
            f"{name}: adapts a {type(base).__name__}, whose weight cannot be read as W0; load the "
            "model unquantised, or use only nn.Linear, Conv1D, nn.Embedding and nn.Conv in "
            "target_modules"
        )
    # PEFT builds lora_A without groups, dilation or padding mode, so that the adapted layer is not
    # a convolution with W0 + s·B·A.
    if isinstance(base, CONVOLUTIONS) and (
        base.groups != 1 or any(step != 1 for step in base.dilation) or base.padding_mode != "zeros"
    ):
        raise ProblemError(
            f"{name}: adapts a convolution with groups={base.groups}, dilation={base.dilation}, "
            f"padding_mode={base.padding_mode!r}, not 1, 1 and zeros; leave this module out of "
            "target_modules"
        )
    variant = peft_internals.variant(layer, adapter_name)
    if variant is not None and adapter_name not in layer.lora_magnitude_vector:
        raise ProblemError(
            f"{name}: uses {type(variant).__name__} for adapter {adapter_name!r}; create the "
            "adapter as plain LoRA or DoRA"
        )


def base_weight(layer: lora.LoraLayer) -> Tensor:
    """W0 of shape (out, in), in its own dtype; a view of the frozen weight."""
    base: Any = layer.get_base_layer()
    weight: Tensor = base.weight
    if isinstance(layer, lora.Embedding) or getattr(layer, "fan_in_fan_out", False):
        return weight.T
    return weight.flatten(1)


def direction(layer: lora.LoraLayer, adapter_name: str) -> Tensor:
    """V = W0 + s·B·A, (out, in), differentiable in A and B (arXiv:2402.09353, Eq. 5).

    The dtype is float32 or wider, even under autocast. `require_plain` checks that V is defined.
    """
    w0, (a, b) = base_weight(layer), factors(layer, adapter_name)
    dtype = reduce(torch.promote_types, (w0.dtype, a.dtype, b.dtype, torch.float32))
    s = layer.scaling[adapter_name]
    with torch.autocast(w0.device.type, enabled=False):
        return torch.addmm(w0.to(dtype), b.to(dtype), a.to(dtype), alpha=s)


def magnitude(layer: lora.LoraLayer, adapter_name: str) -> Tensor:
    """m, (out,), a view of the trainable magnitude."""
    owner: Any = layer.lora_magnitude_vector[adapter_name]
    vector: Tensor = owner.weight
    return vector.flatten()


def factors(layer: lora.LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """A of shape (r, in) and B of shape (out, r).

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules="0"))
        >>> [x.shape for x in factors(lora_layers(model)[0][1], "default")]
        [torch.Size([8, 4]), torch.Size([3, 8])]
    """
    if isinstance(layer, lora.Embedding):
        return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    a: Any = layer.lora_A[adapter_name]
    b: Any = layer.lora_B[adapter_name]
    return a.weight.flatten(1), b.weight.flatten(1)


def _is_plain(layer: lora.LoraLayer, base: Any) -> bool:
    """Whether ``base`` computes with its ``weight`` exactly as a module of PLAIN_MODULES does."""
    plain = next((kind for kind in PLAIN_MODULES if isinstance(base, kind)), None)
    if plain is None:
        return False
    # A quantised or rescaled layer is often a subclass with its own forward pass. PEFT supports one
    # of them, the embedding with a fixed scale, and applies the scale to the adapter as well.
    scaled = isinstance(layer, lora.Embedding) and peft_internals.embed_scale(layer) is not None
    if type(base).forward is not plain.forward and not scaled:
        return False
    weight = base.weight
    # Quantised tensor types report a floating dtype but live outside torch.
    is_torch = type(weight).__module__.split(".")[0] == "torch"
    return isinstance(weight, Tensor) and is_torch and weight.dtype in PLAIN_DTYPES


def keep_active(model: Model) -> Callable[[], None]:
    """A function that activates all active adapters again; a checkpoint's loading leaves one."""
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    trained = [(x, x.requires_grad) for x in model.parameters()] if len(active) > 1 else []

    def activate() -> None:
        if trained:
            model.base_model.set_adapter(active)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

    return activate


def tensors(model: PeftModel, adapter: str, **options: Any) -> dict[str, Tensor]:
    """The parameters and buffers that PEFT saves of an adapter, by their names in its file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = model.state_dict(keep_vars=True)
        saved: dict[str, Tensor] = get_peft_model_state_dict(model, state, adapter, **options)
    return saved


@torch.no_grad()
def beside_adapters(model: Model) -> dict[str, nn.Parameter]:
    """The parameters that PEFT saves with no adapter, by names without those of its wrappers.

    Empty for another model than a PeftModel, and for a sharded one.
    """
    rest = dict(model.named_parameters(remove_duplicate=False))
    if not isinstance(model, PeftModel) or is_sharded(*rest.values()):
        return {}
    # A prompt is saved as its encoder's output.
    saved = [*getattr(model, "prompt_encoder", nn.Module()).parameters()]
    for embeddings in (False, "auto"):
        if embeddings and not any(x.requires_grad for x in rest.values()):
            break  # the second asks a hub
        for name in model.peft_config:
            saved += tensors(model, name, save_embedding_layers=embeddings).values()
        ids = {*map(id, saved)}
        rest = {name: x for name, x in rest.items() if id(x) not in ids}
    return {".".join(x for x in n.split(".") if x not in WRAPPERS): x for n, x in rest.items()}


def undescribed(model: PeftModel, adapter: str, folder: Path) -> set[str]:
    """The LoRA layers that the configuration in ``folder`` gives another rank, scale or kind."""
    config: Any = PeftConfig.from_pretrained(str(folder))
    found = set[str]()
    for name, layer in model.get_base_model().named_modules():
        if type(config) is LoraConfig and isinstance(layer, lora.LoraLayer) and adapter in layer.r:
            own = (config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha)
            rank, alpha = (
                next((x for key, x in keys.items() if re.match(rf"(.*\.)?({key})$", name)), rest)
                for keys, rest in own
            )
            scale = alpha / (rank**0.5 if config.use_rslora else rank)
            same = layer.r[adapter] == rank and isclose(layer.scaling[adapter], scale)
            if not same or config.use_dora != (adapter in layer.lora_magnitude_vector):
                found.add(name)
    return found


def adapter_settings(model: Model) -> dict[str, Any]:
    """The adapters' type and options, which must be equal in a checkpoint and a resumed run."""
    names = ("lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")
    settings = dict[str, Any]()
    several = isinstance(model, PeftModel) and len(model.active_adapters) > 1
    for adapter in model.active_adapters if several else [active_adapter(model)]:
        config, of = model.peft_config[adapter], f"{adapter}: " if settings else ""
        dora = getattr(config, "use_dora", False)
        settings[f"{of}adapter"] = "dora" if dora else str(config.peft_type.value).lower()
        settings[f"{of}rank"] = getattr(config, "r", None)
        settings |= {f"{of}{name}": getattr(config, name, None) for name in names}
    return settings
