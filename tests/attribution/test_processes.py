"""Two processes, each with half of every batch, give the scores of one with all of it."""

from typing import Any

import pytest
import torch

from tests.support import attributed_in_processes as attributed
from tests.support import two_processes


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("two")
    return two_processes.run("attributed_in_processes.py", folder)


def test_scores_and_checks_are_those_of_one_process(two: Any) -> None:
    """Differences divide by their step, and their rounding with it."""
    for name, expected in attributed.results().items():
        first, other = (torch.as_tensor(result[name]) for result in two)
        rounding = 1e-6 if "difference" in name or name == "gradient" else 1e-9
        assert torch.equal(first, other), name
        assert torch.allclose(first, torch.as_tensor(expected), rtol=rounding), name
