"""Averages over the processes of a distributed run; one process is a run of its own."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hyperopt_peft.utils.autograd import HALF

K = TypeVar("K", bound=Hashable)


def world_size() -> int:
    """How many processes share the work: 1 where ``torch.distributed`` is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is."""
    return dist.get_rank() if world_size() > 1 else 0


def rank_key() -> tuple[int, ...]:
    """What tells this process's random numbers from the first one's: nothing in the first."""
    return (rank(),) if rank() else ()


@torch.no_grad()
def mean(
    parts: Sequence[Tensor | None], like: Sequence[Tensor] | None = None
) -> tuple[Tensor | None, ...]:
    """Each part's average over the processes; ``parts`` as they are in a run of one.

    A part that is None on some processes counts as zero there, and stays None where it is None
    on all. A sharded part is an average already: FSDP2 reduces what it scatters. ``like`` gives
    the shapes of parts that may be None. Every process must call this with parts of the same
    shapes. One reduction a dtype, half precision in float32.
    """
    processes = world_size()
    like = like or [part for part in parts if part is not None]
    plain = [index for index, tensor in enumerate(like) if not is_sharded(tensor)]
    if processes == 1 or not plain:
        return tuple(parts)
    device = like[plain[0]].device
    present = torch.tensor([parts[index] is not None for index in plain], device=device).int()
    dist.all_reduce(present, dist.ReduceOp.MAX)
    buckets: dict[tuple[torch.dtype, torch.device], list[int]] = defaultdict(list)
    for index in (plain[k] for k in present.nonzero().flatten().tolist()):
        dtype = torch.float32 if like[index].dtype in HALF else like[index].dtype
        buckets[dtype, like[index].device].append(index)
    result = [part if is_sharded(tensor) else None for part, tensor in zip(parts, like)]
    for (dtype, _), indices in buckets.items():
        filled = [parts[i] if parts[i] is not None else torch.zeros_like(like[i]) for i in indices]
        flat = torch.cat([part.detach().reshape(-1).to(dtype) for part in filled])  # type: ignore[union-attr]
        dist.all_reduce(flat)
        chunks = flat.div_(processes).split([like[i].numel() for i in indices])
        for index, chunk in zip(indices, chunks, strict=True):
            result[index] = chunk.view(like[index].shape).to(like[index].dtype)
    return tuple(result)


def averages(values: Mapping[K, float]) -> dict[K, float]:
    """Each value's mean over those processes that have it."""
    if world_size() == 1:
        return dict(values)
    gathered: list[dict[K, float]] = [{}] * world_size()
    dist.all_gather_object(gathered, dict(values))
    return means(gathered)


def means(parts: Sequence[Mapping[K, float]]) -> dict[K, float]:
    """Each value's mean over those of ``parts`` that have it."""
    keys = {key: None for part in parts for key in part}
    of = {key: [part[key] for part in parts if key in part] for key in keys}
    return {key: sum(values) / len(values) for key, values in of.items()}


@torch.no_grad()
def average(tensor: Tensor) -> Tensor:
    """The average of ``tensor``, detached, over the processes."""
    (result,) = mean([tensor.detach()])
    assert result is not None
    return result


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Give every process the first one's ``tensors``, in place and by way of ``device``.

    Shards stay as they are.
    """
    if world_size() > 1:
        for tensor in tensors:
            if not is_sharded(tensor):
                sent = tensor.to(device)
                dist.broadcast(sent, src=0)
                tensor.copy_(sent)


def is_sharded(*tensors: Tensor) -> bool:
    """Whether any of ``tensors`` is spread over the processes."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


@torch.no_grad()
def to_local(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """What this process holds of each tensor, in the tensor's own memory; all of a plain one."""
    return tuple(x.to_local() if isinstance(x, DTensor) else x for x in tensors)


def gather(tensor: Tensor) -> Tensor:
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
