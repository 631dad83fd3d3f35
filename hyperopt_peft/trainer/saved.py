"""Compares the adapter that a trainer saves with the one that it trained, tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hyperopt_peft.adapters import layers
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.fingerprint import sample
from hyperopt_peft.trainer.method import Method

SAVE = "name the module in modules_to_save of the adapter's config, or set task_type"
FOLD = "let finish or export fold all that the method adds into the adapter's own weights"


class Original:
    """The model before a method prepares it: stock PEFT loads what is saved over its base."""

    def __init__(self, model: Any) -> None:
        self.samples = {name: sample(x) for name, x in layers.beside_adapters(model).items()}
        self.modules = _modules(model)
        self.changed: dict[str, Any] = {}

    def require_saved(self, trainer: Any) -> None:
        """Raise ProblemError if ``trainer`` saves without a tensor that its levels train."""
        modules = _modules(trainer.model).items()
        self.changed = {name: x for name, x in modules if self.modules.get(name, x) != x}
        folds = getattr(type(trainer.method), "export", Method.export) is not Method.export
        if trainer.args.save_strategy == "no" or folds:
            return
        trained = {id(x) for level in trainer.levels for x in level.variables}
        beside = layers.beside_adapters(trainer.model).items()
        if lost := [n for n, x in beside if n in self.samples and id(x) in trained]:
            raise ProblemError(f"model: PEFT does not save {_few(lost)}, which would train; {SAVE}")

    def require_plain(self, model: Any, method: str) -> None:
        """Raise ProblemError unless ``model`` is its base, unchanged, with one active adapter."""
        modules, beside = _modules(model), layers.beside_adapters(model)
        left = [name for name, x in self.changed.items() if modules.get(name) == x]
        unread = [
            x.removesuffix("original_module") for x in modules if x.endswith("original_module")
        ]
        for name, before in self.samples.items():
            now = beside.get(name)
            if name.startswith((*unread,)):  # PEFT runs and saves a copy
                continue
            if now is None or now.requires_grad or _differ(sample(now), before):
                left.append(name)
        if left:
            raise ProblemError(f"{method}: PEFT does not save the new {_few(left)}; {SAVE}; {FOLD}")
        if len(names := model.active_adapters) > 1:
            raise ProblemError(
                f"{method}: {len(names)} adapters are active ({', '.join(names)}), and PEFT loads "
                "one; let export make one of them"
            )


def check_saved(model: Any, folder: Path, method: str) -> None:
    """Raise ProblemError unless ``folder`` has the active adapter of ``model`` and describes it."""
    (name,) = model.active_adapters
    place = folder if name == "default" else folder / name
    trained = layers.tensors(model, name)
    saved = load_file(place / "adapter_model.safetensors")
    other = {n for n in trained if n not in saved or _differ(trained[n], saved[n])}
    other |= layers.undescribed(model, name, place)
    if other:
        raise ProblemError(
            f"{method}: PEFT loads another {_few(sorted(other))} from {place} than was trained; "
            f"{FOLD}, and let its configuration describe them"
        )


def _differ(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors differ by more than the rounding of the less precise one."""
    rounding = max([torch.finfo(x.dtype).eps for x in (one, two) if x.is_floating_point()] or [0.0])
    one, two = (x.detach().to("cpu", torch.float64) for x in (one, two))
    return one.shape != two.shape or not torch.allclose(one, two, rtol=rounding, atol=0)


def _modules(model: nn.Module) -> dict[str, Any]:
    """What a method may change in each module, by name: its class, its forward pass, its hooks."""
    return {
        name: (type(m), vars(m).get("forward"), *m._forward_hooks, *m._forward_pre_hooks)
        for name, module in model.named_modules()
        for m in [next((getattr(module, x) for x in layers.WRAPPERS if hasattr(module, x)), module)]
    }


def _few(names: Collection[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join([*names][:3]) + more
