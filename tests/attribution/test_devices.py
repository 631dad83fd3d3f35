"""Heads on a device that is not the CPU, without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_heads_mix_no_tensors_of_two_devices(tmp_path: Path) -> None:
    """Scores, removals, reasons and a comparison: they are those of the CPU, on the CPU."""
    command = [sys.executable, "-m", "tests.support.heads_on_a_card", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-5000:]
    ours, theirs = torch.load(tmp_path / "results.pt")
    for name, expected in ours.items():
        torch.testing.assert_close(theirs[name], expected, rtol=1e-4, atol=1e-5, msg=name)
