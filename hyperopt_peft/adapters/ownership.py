"""The parameters of a DoRA adapter for each level."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from hyperopt_peft.adapters.layers import dora_layers, resolve_adapter
from hyperopt_peft.errors import ProblemError


@dataclass(frozen=True)
class ParameterSplit:
    """The trainable parameters of a PeftModel in three groups, each in model order.

    ``magnitudes`` are m of every DoRA layer, ``directions`` the factors A and B, and ``rest`` every
    other trainable parameter, such as a task head. Names are those of ``named_parameters()``.

    Example:
        >>> head = dict(nn.Linear(2, 1).named_parameters())
        >>> list(ParameterSplit(magnitudes={}, directions={}, rest=head).rest)
        ['weight', 'bias']
    """

    magnitudes: dict[str, nn.Parameter]
    directions: dict[str, nn.Parameter]
    rest: dict[str, nn.Parameter]


def split_parameters(peft_model: PeftModel, adapter_name: str | None = None) -> ParameterSplit:
    """Split the trainable parameters into magnitudes, directions and the rest.

    The split of BiDoRA (arXiv:2410.09758): magnitudes at the upper level, directions and the
    rest at the lower. Works for every layer type that PEFT has DoRA for.

    Args:
        adapter_name: the active adapter by default.

    Raises:
        ProblemError: as `dora_layers`; or a magnitude or a direction is frozen.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> config = LoraConfig(r=2, use_dora=True, target_modules=["0"])
        >>> split = split_parameters(get_peft_model(nn.Sequential(nn.Linear(4, 3)), config))
        >>> len(split.magnitudes), len(split.directions), len(split.rest)
        (1, 2, 0)
    """
    adapter = resolve_adapter(peft_model, adapter_name)
    layers = dora_layers(peft_model, adapter)
    magnitude_ids = {
        id(p) for _, layer in layers for p in layer.lora_magnitude_vector[adapter].parameters()
    }
    direction_ids = {id(p) for _, layer in layers for p in _direction_parameters(layer, adapter)}
    split = ParameterSplit({}, {}, {})
    for name, parameter in peft_model.named_parameters():
        if id(parameter) in magnitude_ids:
            split.magnitudes[name] = parameter
        elif id(parameter) in direction_ids:
            split.directions[name] = parameter
        elif parameter.requires_grad:
            split.rest[name] = parameter

    for name, parameter in (split.magnitudes | split.directions).items():
        if not parameter.requires_grad:
            raise ProblemError(
                f"{name}: is frozen; load adapter {adapter!r} with "
                "PeftModel.from_pretrained(..., is_trainable=True) or activate it with set_adapter"
            )
    return split


def _direction_parameters(layer: LoraLayer, adapter: str) -> list[nn.Parameter]:
    if adapter in layer.lora_embedding_A:
        return [layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]]
    return [*layer.lora_A[adapter].parameters(), *layer.lora_B[adapter].parameters()]
