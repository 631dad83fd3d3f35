"""The most memory a computation held at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that ``run`` held at once on ``device``, above what was held before.

    CUDA's allocator keeps count. Elsewhere every storage that an operation returns is
    followed until it is freed; what an operation holds only while it runs is not seen.
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
    """Adds up the storages that come into being and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in self.known | given:
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)

        def release() -> None:
            self.known.discard(key)
            self.held -= size

        weakref.finalize(storage, release)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
