"""The peak memory of a computation."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """The peak memory of ``run`` on ``device`` in bytes, above the memory in use before.

    On CUDA the allocator reports it. Elsewhere it is the sum of the live storages that operations
    return, without memory that an operation uses internally.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = int(torch.cuda.memory_allocated(device))
        run()
        return int(torch.cuda.max_memory_allocated(device)) - before
    with _StorageCount() as count:
        run()
    return int(count.peak)


class _StorageCount(TorchDispatchMode):
    """The sum of the sizes of live storages created within the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.followed: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in self.followed | arguments:
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.followed.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def release() -> None:
            self.followed.discard(key)
            self.live -= size

        weakref.finalize(storage, release)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
