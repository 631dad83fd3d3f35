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
    base model, which shares the weights of the old one. Nothing of ``model`` changes, and no random
    state. Rounding may reach √ε of the least precise parameter; a GPU may round float32 to 11 bits.

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
        loaded = _logits(_load(model, folder).eval(), inputs)
    if expected.shape != loaded.shape:
        raise ProblemError(f"{folder}: PEFT loads a model with logits of another shape")
    kinds = [x for x in model.parameters() if x.is_floating_point()]
    rounding = [max(torch.finfo(x.dtype).eps, 0 if x.is_cpu else 2**-10) for x in kinds]
    error = float((loaded - expected).norm() / expected.norm().clamp(min=1e-30))
    return error, math.sqrt(max(rounding))


def _load(model: PeftModel, folder: Path) -> Any:
    """The adapter in ``folder``, over a new base model with the weights of ``model``."""
    base, (name, *others) = _base(model), list(model.active_adapters)
    if others:
        raise ProblemError(
            f"{folder}: {len(others) + 1} adapters are active ({name}, {', '.join(others)}), and "
            "PEFT loads one; let export make one of them"
        )
    place = folder if name == "default" else folder / name
    device = str(next(model.parameters()).device)
    try:
        return PeftModel.from_pretrained(base, place, torch_device=device)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ProblemError(f"{place}: PEFT does not load what was saved ({error})") from error


def _base(model: PeftModel) -> nn.Module:
    """A new base model of the class and configuration of ``model``'s, with its weights."""
    base = model.get_base_model()
    named = [*base.named_parameters(remove_duplicate=False), *base.named_buffers()]
    weights = {".".join(x for x in n.split(".") if x not in WRAPPERS): t for n, t in named}
    if is_sharded(*weights.values()) or any(x.is_meta for x in weights.values()):
        raise NotCompared("its parameters are sharded or offloaded")
    try:
        with torch.device("meta"):
            new: nn.Module = type(base)(copy.deepcopy(base.config))
    except Exception as error:  # of the model's own code
        raise NotCompared(f"{type(base).__name__} is not made from its configuration") from error
    for place, module in new.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                other = weights.get(path := f"{place}.{name}" if place else name)
                if tensor is not None and (other is None or other.shape != tensor.shape):
                    raise NotCompared(f"its base model has no plain weight {path}")
                if tensor is not None and other is not None:
                    shared: Any = other.detach()
                    if isinstance(tensor, nn.Parameter):
                        shared = nn.Parameter(shared, requires_grad=False)
                    tensors[name] = shared
    return new


def _logits(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Some logits, by the class's own forward, which accelerate has not wrapped."""
    try:
        logits: Tensor = type(model).forward(model, **inputs).logits.flatten()
    except Exception as error:  # of the model's own code
        raise NotCompared(f"it has no logits for {sorted(inputs)} ({error})") from error
    return logits[:: max(1, logits.numel() // ENTRIES)].double().cpu()
