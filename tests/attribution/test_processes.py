"""Two processes, each with half of every batch, give the scores of one with all of it."""

from pathlib import Path

import torch

from tests.support import attributed_in_processes as attributed
from tests.support import two_processes


def test_scores_and_checks_are_those_of_one_process(tmp_path: Path) -> None:
    """Differences divide by their step, and their rounding with it."""
    two = two_processes.run(two_processes.LAUNCHER, "attributed_in_processes.py", tmp_path)
    for name, expected in attributed.results().items():
        first, other = (torch.as_tensor(result[name]) for result in two)
        rounding = 1e-6 if "difference" in name or name == "gradient" else 1e-9
        assert torch.equal(first, other), name
        assert torch.allclose(first, torch.as_tensor(expected), rtol=rounding), name
