"""The peak memory of a computation."""

from typing import Any

import pytest
import torch

from benchmarks.memory import peak_memory

MB = 2**20


@pytest.mark.parametrize(
    ("run", "megabytes"),
    [
        (lambda: [torch.ones(MB // 4) for _ in range(3)], 3),
        (lambda: [torch.ones(MB // 4).sum() for _ in range(3)], 1),
        (lambda: torch.ones(MB // 4).view(2, -1)[0].add_(1), 1),
        (lambda: None, 0),
    ],
)
def test_peak_memory_counts_what_is_held_at_once(run: Any, megabytes: int) -> None:
    assert peak_memory(run, torch.device("cpu")) / MB == pytest.approx(megabytes, abs=1e-3)
