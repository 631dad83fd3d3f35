"""Loads a saved adapter by stock PEFT, and compares its logits with the trained model's."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.distributed import is_sharded
from hyperopt_peft.utils.models import evaluating
from hyperopt_peft.utils.random_state import RandomState, replay

#: Where PEFT keeps the layers and parameters that it wraps.
WRAPPERS = ("base_layer", "original_module", "token_adapter")
#: The most logits that are compared, evenly spaced: a language model has millions.
ENTRIES = 1_000_000


class NotCompared(Exception):
    """Why a saved adapter cannot be compared."""


@torch.no_grad()
def difference(model: Any, folder: Path, inputs: Mapping[str, Any]) -> tuple[float, float]:
    """‖z' − z‖/‖z‖ of the logits of ``inputs``, and the value that rounding may reach.

    z are the logits of ``model``, z' those of the adapter in ``folder`` that PEFT loads into a new
    base model. The base models share their weights, so that none is loaded twice. No module of
    ``model`` changes, and no random state.

    Raises:
        NotCompared: ``model`` is no PeftModel, its base cannot be built from its configuration, or
            its weights are sharded, quantised or offloaded.
        ProblemError: PEFT does not load the folder.

    Example:
        >>> difference(nn.Linear(1, 1), Path("adapter"), {})
        Traceback (most recent call last):
        hyperopt_peft.adapters.saved.NotCompared: it is no PeftModel
    """
    if not isinstance(model, PeftModel):
        raise NotCompared("it is no PeftModel")
    with replay(RandomState.capture()), warnings.catch_warnings(), evaluating(model):
        warnings.simplefilter("ignore")
        expected = _logits(model, inputs)
        loaded = _load(model, folder).eval()
        found = _logits(loaded, inputs)
    if expected.shape != found.shape:
        raise ProblemError(f"{folder}: PEFT loads a model with logits of another shape")
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return error, _rounding(model)


def _load(model: PeftModel, folder: Path) -> Any:
    """The adapter in ``folder``, over a new base model with the weights of ``model``."""
    active, base = list(model.active_adapters), _base(model)
    name = active[0]
    if len(active) != 1:
        raise ProblemError(
            f"{folder}: {len(active)} adapters are active ({', '.join(active)}), and PEFT loads "
            "one; let export make one of them"
        )
    device = str(next(model.parameters()).device)
    place = folder if name == "default" else folder / name
    try:
        return PeftModel.from_pretrained(base, place, torch_device=device)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ProblemError(f"{place}: PEFT does not load what was saved ({error})") from error


def _base(model: PeftModel) -> nn.Module:
    """A new base model of the class and configuration of ``model``'s, with its weights."""
    base = model.get_base_model()
    held = {_plain(n): x for n, x in base.named_parameters(remove_duplicate=False)}
    held |= {_plain(n): x for n, x in base.named_buffers(remove_duplicate=False)}
    if is_sharded(*held.values()) or any(x.is_meta for x in held.values()):
        raise NotCompared("its parameters are sharded or offloaded")
    try:
        with torch.device("meta"):
            new: nn.Module = type(base)(copy.deepcopy(base.config))
    except Exception as error:  # of the model's own code
        raise NotCompared(f"{type(base).__name__} is not made from its configuration") from error
    for place, module in new.named_modules():
        for name in (*module._parameters, *module._buffers):
            tensor, path = getattr(module, name), f"{place}.{name}" if place else name
            if tensor is None:
                continue
            other = held.get(path)
            if other is None or other.shape != tensor.shape:
                raise NotCompared(f"its base model has no plain weight {path}")
            shared: Any = other.detach()
            if name in module._parameters:
                shared = nn.Parameter(shared, requires_grad=False)
            setattr(module, name, shared)
    return new


def _plain(name: str) -> str:
    """The name of a parameter without PEFT's wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _logits(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Some logits, by the class's own forward, which accelerate has not wrapped."""
    try:
        logits = type(model).forward(model, **inputs).logits
    except Exception as error:  # of the model's own code
        raise NotCompared(f"it has no logits for {sorted(inputs)} ({error})") from error
    flat = logits.flatten()
    some: Tensor = flat[:: max(1, flat.numel() // ENTRIES)].double().cpu()
    return some


def _rounding(model: nn.Module) -> float:
    """√ε of the least precise parameter; a GPU may round float32 to 11 bits."""
    kinds = [x for x in model.parameters() if x.is_floating_point()]
    worst = max(torch.finfo(x.dtype).eps for x in kinds)
    exact = all(x.device.type == "cpu" for x in kinds)
    return math.sqrt(worst if exact else max(worst, 2**-10))
