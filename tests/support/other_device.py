"""A device that refuses what a GPU refuses, without a GPU: operations on tensors of two devices.

A tensor that is moved to `CARD` is stored on the CPU and says that it is on a GPU. Import this
module before the first backward pass of a process: autograd counts the devices then.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("card")
CARD = torch.device("card", 0)
#: Operations whose other tensors may be on the CPU, as on a GPU: copies, and indices.
MIXING = ("copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_")


class OnCard(Tensor):
    """A tensor that says that it is on `CARD`, and stores its numbers on the CPU."""

    stored: Tensor

    @staticmethod
    def __new__(cls, stored: Tensor) -> Self:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            stored.size(),
            strides=stored.stride(),
            storage_offset=stored.storage_offset(),
            dtype=stored.dtype,
            device=CARD,
        )
        made.stored = stored
        return made

    def tolist(self) -> Any:
        """The numbers; PyTorch gives those of its own class of tensors alone."""
        return self.detach().cpu().tolist()

    def __setitem__(self, place: Any, value: Any) -> None:
        """A list is made a tensor here, since PyTorch would make one where no mode sees it."""
        place = torch.tensor(place, dtype=torch.int64) if isinstance(place, list) else place
        super().__setitem__(place, value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``func`` on the stored numbers; RuntimeError where tensors are on two devices."""
    tensors: list[Tensor] = []
    tree_map(lambda x: tensors.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
    name = func._schema.name.partition("::")[2]
    plain = [x for x in tensors if not isinstance(x, OnCard) and x.dim()]
    on_card = any(isinstance(x, OnCard) for x in tensors)
    if on_card and plain and name not in MIXING:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    device = kwargs.get("device")
    if device is not None:
        on_card = torch.device(device).type == CARD.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif name in ("copy_", "index", "index_put_", "_index_put_impl_"):
        on_card = isinstance(args[0], OnCard)
    stored = lambda x: x.stored if isinstance(x, OnCard) else x  # noqa: E731
    result = func(*tree_map(stored, args), **tree_map(stored, kwargs))
    if func._schema.is_mutable and any(result is stored(x) for x in args):
        return next(x for x in args if result is stored(x))
    return tree_map(lambda x: OnCard(x) if on_card and isinstance(x, Tensor) else x, result)


class Made(TorchDispatchMode):
    """Tensors that are made on `CARD` are `OnCard`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class OfCPU(torch.Generator):
    """A generator of the CPU, whatever the device."""

    def __new__(cls, device: Any = "cpu") -> Self:
        return super().__new__(cls, "cpu")


@contextmanager
def card() -> Iterator[torch.device]:
    """In the body tensors can be on the yielded device; its random numbers are the CPU's."""
    module = torch.get_device_module(CARD)
    module.get_rng_state = lambda device: torch.get_rng_state()
    module.set_rng_state = lambda state, device: None
    with Made(), mock.patch.object(torch, "Generator", OfCPU):
        yield CARD
