"""Loads the adapter that a trainer has saved by stock PEFT, and compares it with its model."""

from __future__ import annotations

import copy
import math
import warnings
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.checks import read_rows
from hyperopt_peft.trainer.data import batches_of
from hyperopt_peft.utils.distributed import is_sharded
from hyperopt_peft.utils.models import base_model, evaluating
from hyperopt_peft.utils.random_state import RandomState, replay

logger = logging.get_logger(__name__)
#: Where PEFT keeps the layers and parameters that it wraps.
WRAPPERS = ("base_layer", "original_module", "token_adapter")
#: The most rows whose logits are compared, and the most logits: a language model has millions.
ROWS, LOGITS = 4, 1_000_000


class NotCompared(Exception):
    """Why a saved adapter cannot be compared."""


@torch.no_grad()
def check_saved(trainer: Any, folder: Path) -> None:
    """Raise ProblemError unless PEFT loads the model of ``trainer`` from ``folder``.

    The logits of a few rows may differ by rounding, √ε of the least precise parameter; a GPU may
    round float32 to 11 bits. If they cannot be compared, a line is logged. The model and the random
    state do not change.
    """
    model = trainer.model
    try:
        inputs = _inputs(trainer)
        with replay(RandomState.capture()), warnings.catch_warnings(), evaluating(model):
            warnings.simplefilter("ignore")
            expected = _logits(model, inputs)
            loaded = _logits(_load(model, folder).eval(), inputs)
    except NotCompared as reason:
        logger.info(f"{folder}: the saved adapter is not compared with the model, since {reason}")
        return
    if expected.shape != loaded.shape:
        raise ProblemError(f"{folder}: PEFT loads a model with logits of another shape")
    kinds = [x for x in model.parameters() if x.is_floating_point()]
    rounding = max(max(torch.finfo(x.dtype).eps, 0 if x.is_cpu else 2**-10) for x in kinds)
    error = float((loaded - expected).norm() / expected.norm().clamp(min=1e-30))
    if not error <= math.sqrt(rounding):
        raise ProblemError(
            f"{type(trainer.method).__name__}: PEFT loads another model from {folder} than the one "
            f"that was trained (its logits differ by {error:.2g} of their size); let finish or "
            "export fold all that the method adds into the adapter's own weights"
        )


def _inputs(trainer: Any) -> dict[str, Any]:
    """A few training rows as the model reads them; labels only for the input of a decoder."""
    rows, base, device = trainer.train_dataset, base_model(trainer.model), trainer.args.device
    if "PeftModel" not in {kind.__name__ for kind in type(trainer.model).__mro__}:
        raise NotCompared("it is no PeftModel")
    if trainer.is_fsdp_enabled or not (has_length(rows) and hasattr(rows, "__getitem__")):
        raise NotCompared("the model is sharded, or the training rows are a stream")
    few = range(min(len(rows), trainer.args.per_device_train_batch_size, ROWS))
    try:
        (batch,) = batches_of(read_rows(trainer), trainer.data_collator, ROWS, device, chosen=few)
    except ProblemError as error:
        raise NotCompared(str(error)) from error
    names = {*signature(type(base).forward).parameters}
    if not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        names -= {"labels"}
    return {k: x for k, x in batch.items() if k in names and isinstance(x, Tensor)}


def _load(model: Any, folder: Path) -> Any:
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
        return type(model).from_pretrained(base, place, torch_device=device)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ProblemError(f"{place}: PEFT does not load what was saved ({error})") from error


def _base(model: Any) -> nn.Module:
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


def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Some logits, by the class's own forward, which accelerate has not wrapped."""
    try:
        logits: Tensor = type(model).forward(model, **inputs).logits.flatten()
    except Exception as error:  # of the model's own code
        raise NotCompared(f"it has no logits for {sorted(inputs)} ({error})") from error
    return logits[:: max(1, logits.numel() // LOGITS)].double().cpu()
