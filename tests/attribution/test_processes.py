"""Scores by two processes, each with half of every batch, and by a device that is no CPU."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import attributed_in_processes as attributed
from tests.support import two_processes


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return two_processes.run(attributed, tmp_path_factory.mktemp("two"))


def test_scores_and_checks_are_those_of_one_process(two: Any) -> None:
    """Differences divide by their step, and their rounding with it."""
    for name, expected in attributed.results().items():
        first, other = (torch.as_tensor(result[name]) for result in two)
        rounding = 1e-6 if "difference" in name or name == "gradient" else 1e-9
        assert torch.equal(first, other), name
        assert torch.allclose(first, torch.as_tensor(expected), rtol=rounding), name


@pytest.mark.slow
def test_heads_mix_no_tensors_of_two_devices(tmp_path: Path) -> None:
    """Scores, reasons and a comparison: they are those of the CPU, on the CPU."""
    command = [sys.executable, "-m", "tests.support.heads_on_a_card", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=two_processes.ROOT)
    assert done.returncode == 0, done.stderr[-5000:]
    ours, theirs = torch.load(tmp_path / "results.pt")
    for name, expected in ours.items():
        torch.testing.assert_close(theirs[name], expected, rtol=1e-4, atol=1e-5, msg=name)
