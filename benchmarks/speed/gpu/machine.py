"""Where the parts run, and how large their models and batches are."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.speed import llama

#: The rounds of each part, after one to warm up, and of runs that take milliseconds.
ROUNDS, MANY = 3, 20


@dataclass(frozen=True)
class Machine:
    """A device, and whether the sizes are those of a GPU or of a first look.

    Attributes:
        device: as PyTorch names it.
        small: whether models and batches are tiny.
        threads: the threads of the CPU.
    """

    device: str
    small: bool
    threads: int

    @property
    def shape(self) -> str:
        """The shape of the language model, of `llama.SHAPES`."""
        return "tiny" if self.small else "1B"

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of a batch, and their tokens."""
        return {"size": 2, "length": 8} if self.small else {"size": 8, "length": 512}

    @property
    def batch(self) -> tuple[int, int]:
        """Rows of MiniLM's batch, and their tokens."""
        return (4, 8) if self.small else (32, 64)

    @property
    def rounds(self) -> int:
        """The rounds of each part; of a first look one."""
        return 1 if self.small else ROUNDS

    @property
    def many(self) -> int:
        """The rounds of runs that take milliseconds."""
        return 1 if self.small else MANY

    def model(self) -> Any:
        """An untrained Llama with an adapter, whose B is not zero, so that all gradients flow."""
        return opened(llama.adapted(llama.base(self.shape, device=self.device)))


def opened(adapted: Any) -> Any:
    """``adapted`` in training mode, with random numbers for B, which are equal at every call."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.02 * values)
    return adapted.train()


def attempted(function: Callable[[], Any]) -> tuple[Any, str]:
    """The result of ``function`` and "done"; where it fails, None and its error.

    So a run that lacks memory costs only itself.
    """
    gc.collect()
    try:
        return function(), "done"
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:200]}"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, text
