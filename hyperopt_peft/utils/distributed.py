"""Averages, sums and copies over the processes of a distributed run, and shards of tensors.

Every function also works in a single process without ``torch.distributed``.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from hyperopt_peft.utils.autograd import HALF
from hyperopt_peft.utils.types import Model

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def world_size() -> int:
    """The number of processes; 1 where ``torch.distributed`` is not initialised."""
    return dist.get_world_size() if initialised() else 1


def initialised() -> bool:
    """Whether ``torch.distributed`` is in use, even by a single process."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def rank_key() -> tuple[int, ...]:
    """The part of a seed that differs between processes; empty in process 0, as in a single one."""
    return (rank(),) if rank() else ()


@torch.no_grad()
def mean(
    parts: Sequence[Tensor | None], like: Sequence[Tensor] | None = None
) -> tuple[Tensor | None, ...]:
    """The average of each part over the processes; a sparse part becomes dense.

    None counts as zero, unless a part is None on all processes: then the result is None. A sharded
    part is returned unchanged, since FSDP2 has averaged it. There is one reduction for each dtype
    and device; half precision is averaged in float32. Every process must call this function, with
    parts of the same shapes.

    ``like`` has tensors with the shapes and dtypes of ``parts``; it is required if a part is None.
    """
    processes = world_size()
    parts = [x.to_dense() if x is not None and x.is_sparse else x for x in parts]
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
    """The mean of each value over the processes that have the value."""
    return means(_of_all(dict(values)))


def first(value: T) -> T:
    """The ``value`` of process 0."""
    return _of_all(value)[0]


def _of_all(value: T) -> list[T]:
    """The ``value`` of each process."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def means(parts: Sequence[Mapping[K, float]]) -> dict[K, float]:
    """The mean of each value over the ``parts`` that have the value.

    Example:
        >>> means([{"loss": 1.0}, {"loss": 3.0, "accuracy": 0.5}])
        {'loss': 2.0, 'accuracy': 0.5}
    """
    keys = {key: None for part in parts for key in part}
    by_key = {key: [part[key] for part in parts if key in part] for key in keys}
    return {key: sum(values) / len(values) for key, values in by_key.items()}


@torch.no_grad()
def average(tensor: Tensor) -> Tensor:
    """The average of ``tensor`` over the processes, detached."""
    (result,) = mean([tensor.detach()])
    assert result is not None
    return result


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Copy the ``tensors`` of process 0 to all processes, in place.

    The tensors are sent from and to ``device``. Sharded tensors do not change.
    """
    if world_size() > 1:
        for tensor in tensors:
            if not is_sharded(tensor):
                sent = tensor.to(device)
                dist.broadcast(sent, src=0)
                tensor.copy_(sent)


def is_sharded(*tensors: Tensor) -> bool:
    """Whether any of ``tensors`` is sharded over the processes."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


@torch.no_grad()
def to_local(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The shard of each tensor on this process, without a copy; a plain tensor unchanged."""
    return tuple(x.to_local() if isinstance(x, DTensor) else x for x in tensors)


def gather(tensor: Tensor) -> Tensor:
    """The full ``tensor`` on every process, gathered from its shards.

    Example:
        >>> gather(torch.ones(2))  # without shards
        tensor([1., 1.])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class ShardLayout:
    """The shape of a tensor, and its distribution over the processes.

    ``here`` is the shape of this process's shard. ``ranks`` is the number of processes with the
    same shard, or 0 for a plain tensor, which is equal on every process.
    """

    shape: torch.Size
    here: torch.Size
    stride: tuple[int, ...] = ()
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()
    ranks: int = 0

    @classmethod
    def of(cls, tensor: Tensor) -> ShardLayout:
        """The layout of ``tensor``."""
        if not isinstance(tensor, DTensor):
            return cls(tensor.shape, tensor.shape)
        mesh, placements = tensor.device_mesh, tensor.placements
        split = (mesh.size(k) for k, p in enumerate(placements) if isinstance(p, Shard))
        ranks = dist.get_world_size() // math.prod(split)
        here = tensor.to_local().shape
        return cls(tensor.shape, here, tensor.stride(), mesh, placements, ranks)

    def shaped(self, part: Tensor) -> Tensor:
        """The tensor of this layout that has the entries ``part`` on this process."""
        if self.mesh is None:
            return part.view(self.shape)
        return DTensor.from_local(
            part.view(self.here),
            self.mesh,
            self.placements,
            run_check=False,
            shape=self.shape,
            stride=self.stride,
        )


def sharded_like(full: Tensor, like: Tensor) -> Tensor:
    """The tensor ``full`` with the sharding, device and dtype of ``like``."""
    if not isinstance(like, DTensor):
        return full.to(like)
    full = full.to(like.device, like.dtype)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def reshard(model: Model) -> None:
    """Free the gathered parameters of ``model``, so that its parameters are shards again.

    FSDP2 frees gathered parameters in the backward pass. After a forward pass alone, the gathered
    tensors remain the parameters, and changes of the shards have no effect.
    """
    for module in model.modules():
        if shards(module):
            module.reshard()


def shards(module: nn.Module) -> bool:
    """Whether FSDP2 spreads the parameters of ``module`` over the processes."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # it takes half a second to import
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


@contextmanager
def seen_parameters() -> Iterator[list[Tensor]]:
    """The sharded parameters of modules that run in the body; autograd's graph lacks them."""
    sharded: list[Tensor] = []

    def see(module: nn.Module, _inputs: object) -> None:
        if shards(module):
            sharded.extend(p for p in module.parameters() if is_sharded(p))

    with nn.modules.module.register_module_forward_pre_hook(see):
        yield sharded


def totals(values: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """The sums over all shards of ``values``, scalars from the shards of tensors on this process.

    A value from a plain tensor does not change, since it is equal on all processes. Every process
    must call this function, with tensors of the same sharding; ``ranks`` are their
    `ShardLayout.ranks`.
    """
    result = list(values)
    sharded = [k for k, count in enumerate(ranks) if count]
    if sharded:
        here = torch.stack([values[k].double() / ranks[k] for k in sharded])
        dist.all_reduce(here)
        for k, value in zip(sharded, here, strict=True):
            result[k] = value
    return result
