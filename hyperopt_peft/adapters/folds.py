"""K adapters over one base model, for the K lower levels of a cross-fitted program.

PEFT refuses a forward pass of several adapters (``adapter_names``) in training mode, and with DoRA
in any mode, so that each fold's loss is a forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from hyperopt_peft.adapters import peft_internals
from hyperopt_peft.adapters.layers import resolve_adapter
from hyperopt_peft.errors import ProblemError


class AdapterFolds:
    """The active adapter of a model and K − 1 copies of it, one adapter for each fold.

    A copy has the adapter's values, heads (``modules_to_save``), parametrisations and forward
    passes. Outside of `active` the first fold's adapter is active. All parameters of the adapters
    require a gradient as those of the first did. Fold 1's adapter is called ``fold1``.

    Args:
        model: the PeftModel.
        folds: the number of folds K.
        shared: parameters of the adapter that all folds own together, such as DoRA magnitudes:
            the variables of an upper level.

    Raises:
        ProblemError: ``model`` is no PeftModel with one active adapter, has an adapter ``fold1``
            already, or PEFT does not allow a second adapter of this kind.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> folds = AdapterFolds(model, 3)
        >>> with folds.active(2):
        ...     model.active_adapters, model(torch.ones(1, 4)).shape
        (['fold2'], torch.Size([1, 3]))
        >>> folds.join()
        >>> list(model.peft_config)
        ['default']
    """

    def __init__(self, model: PeftModel, folds: int, *, shared: Iterable[Tensor] = ()) -> None:
        first = resolve_adapter(model)
        self.model, self.names = model, [first, *(f"fold{k}" for k in range(1, folds))]
        flags = [(p, p.requires_grad) for p in model.parameters()]
        for name in self.names[1:]:
            config = deepcopy(model.peft_config[first])
            if hasattr(config, "init_lora_weights"):
                config.init_lora_weights = True  # others change the base model's weights
            try:
                model.add_adapter(name, config)
            except (ValueError, TypeError, NotImplementedError) as error:
                raise ProblemError(
                    f"adapter {first!r}: PEFT cannot add a copy for a fold ({error}); use another "
                    "configuration of the adapter"
                ) from error
        _set_flags(flags)  # adding an adapter freezes other parameters
        self._parameters = [_parameters(model, first)]
        kept = {id(parameter): parameter for parameter in shared}
        for name in self.names[1:]:
            _copy(model, first, name, kept)
            self._parameters.append(_parameters(model, name))
        each = {id(p): (p, p.requires_grad) for part in self._parameters for p in part}
        self._flags = list(each.values())

    def require_copies(self) -> None:
        """Raise ProblemError after `join` or `delete`."""
        if len(self.names) == 1:
            raise ProblemError(
                f"adapter {self.names[0]!r}: the copies of the folds were deleted at the end of a "
                "run; make the folds again, or another trainer"
            )

    def reset(self) -> None:
        """Make the first adapter active, and require gradients as at construction."""
        self.model.set_adapter(self.names[0])
        _set_flags(self._flags)

    @contextmanager
    def active(self, fold: int) -> Iterator[None]:
        """Within the body, the adapter of ``fold`` is active.

        Gradient checkpointing runs forward passes in the backward pass, which then belongs into
        the body too.
        """
        before = resolve_adapter(self.model)
        self._activate(self.names[fold])
        try:
            yield
        finally:
            self._activate(before)

    @contextmanager
    def alone(self, fold: int) -> Iterator[None]:
        """Within the body, the adapter of ``fold`` is active, and the others require no gradient.

        A level made in the body owns what a level over the adapter alone would own.
        """
        own = set(map(id, self._parameters[fold]))
        with self.active(fold):
            _set_flags([(p, flag and id(p) in own) for p, flag in self._flags])
            try:
                yield
            finally:
                _set_flags(self._flags)

    @torch.no_grad()
    def join(self) -> None:
        """Set the first adapter to the mean of all, and delete the others, unless that is done."""
        for first, *others in zip(*self._parameters, strict=True):
            if others and others[0] is not first:  # else shared
                first.copy_(torch.stack([first, *others]).mean(0))
        self.delete()

    def delete(self) -> None:
        """Delete the adapters of all folds but the first."""
        for name in self.names[1:]:
            self.model.delete_adapter(name)
        self._flags = [(p, p.requires_grad) for p in self._parameters[0]]
        del self.names[1:], self._parameters[1:]

    def _activate(self, name: str) -> None:
        if self.model.active_adapters != [name]:
            self.model.set_adapter(name)
            _set_flags(self._flags)


def _entries(model: PeftModel, name: str) -> Iterator[nn.Module]:
    """The dictionaries of ``model`` with an entry for the adapter ``name``."""
    for module in model.modules():
        if isinstance(module, nn.ModuleDict | nn.ParameterDict) and name in module:
            yield module


def _parameters(model: PeftModel, name: str) -> list[nn.Parameter]:
    """The parameters of an adapter, each once, in one order for all copies of it."""
    found: dict[int, nn.Parameter] = {}
    for each in _entries(model, name):
        part = each[name]  # type: ignore[index]
        own = [part] if isinstance(part, nn.Parameter) else part.parameters()
        found |= {id(p): p for p in own}
    return list(found.values())


def _copy(model: PeftModel, first: str, name: str, shared: dict[int, Tensor]) -> None:
    """Replace all of adapter ``name`` by copies of ``first``'s, except what is ``shared``."""
    memo = dict(shared)  # deepcopy leaves as they are the objects that it finds here
    for each in _entries(model, name):
        if first in each:  # type: ignore[operator]
            each[name] = deepcopy(each[first], memo)  # type: ignore[index,operator]
    for module in model.modules():
        if isinstance(module, LoraLayer):
            variant = peft_internals.variant(module, first)
            if variant is not None:
                peft_internals.set_variant(module, name, variant)


def _set_flags(flags: Iterable[tuple[Tensor, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
