"""Tensors of which each process holds a part: `DTensor`, as FSDP2 (``fully_shard``) makes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def is_sharded(*tensors: Tensor) -> bool:
    """Whether any of ``tensors`` is spread over the processes."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


@torch.no_grad()
def local(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """What this process holds of each tensor, in the tensor's own memory; all of a plain one."""
    return tuple(x.to_local() if isinstance(x, DTensor) else x for x in tensors)


def full(tensor: Tensor) -> Tensor:
    """All of ``tensor``, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """``whole`` in the dtype, on the device and with the shards of ``like``."""
    if not isinstance(like, DTensor):
        return whole.to(like)
    whole = whole.to(like.device, like.dtype)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass has left gathered of ``model``.

    Until then the gathered tensors are its parameters, and what is written to shards unseen.
    """
    from torch.distributed.fsdp import FSDPModule  # takes half a second, of use to few

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def seen_parameters() -> Iterator[list[Tensor]]:
    """The sharded parameters of the modules that run in the body.

    A backward pass leaves gradients in them, and autograd's graph does not lead to them.
    """
    from torch.distributed.fsdp import FSDPModule

    found: list[Tensor] = []

    def see(module: nn.Module, _inputs: object) -> None:
        if isinstance(module, FSDPModule):
            found.extend(p for p in module.parameters() if is_sharded(p))

    hook = nn.modules.module.register_module_forward_pre_hook(see)
    try:
        yield found
    finally:
        hook.remove()


def total(values: Sequence[float], of: Sequence[Tensor]) -> float:
    """Σ of ``values`` over all of the tensors ``of``, from values that describe their local parts.

    A plain tensor is the same on every process and counts once, and so does a part that several
    processes hold. Every process must call this with tensors of the same kinds.
    """
    result = sum(v for v, x in zip(values, of, strict=True) if not isinstance(x, DTensor))
    parts = [v / _holders(x) for v, x in zip(values, of, strict=True) if isinstance(x, DTensor)]
    if parts:
        device = next(x.device for x in of if isinstance(x, DTensor))
        here = torch.tensor(sum(parts), dtype=torch.float64, device=device)
        dist.all_reduce(here)
        result += float(here)
    return result


def _holders(tensor: DTensor) -> int:
    """How many processes hold the same part of ``tensor``."""
    mesh = tensor.device_mesh
    sizes = (mesh.size(k) for k, p in enumerate(tensor.placements) if isinstance(p, Shard))
    return dist.get_world_size() // math.prod(sizes)
