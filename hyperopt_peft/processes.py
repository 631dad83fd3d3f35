"""Averages over the processes of a distributed run; one process is a run of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from hyperopt_peft.graph import HALF
from hyperopt_peft.shards import is_sharded

K = TypeVar("K", bound=Hashable)


def count() -> int:
    """How many processes share the work: 1 where ``torch.distributed`` is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is."""
    return dist.get_rank() if count() > 1 else 0


def own() -> tuple[int, ...]:
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
    processes = count()
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
    if count() == 1:
        return dict(values)
    gathered: list[dict[K, float]] = [{}] * count()
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
    if count() > 1:
        for tensor in tensors:
            if not is_sharded(tensor):
                sent = tensor.to(device)
                dist.broadcast(sent, src=0)
                tensor.copy_(sent)
