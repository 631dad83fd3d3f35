"""A run that SIGKILL ends at any moment goes on from its last whole checkpoint, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.killed import RUNS


@pytest.mark.parametrize(
    ("seed", "kills", "name"),
    [
        (0, 1, next(iter(RUNS))),
        *(pytest.param(k, 3, name, marks=pytest.mark.slow) for k, name in enumerate(RUNS)),
    ],
)
def test_a_killed_run_ends_as_if_left_alone(seed: int, kills: int, name: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.killed", str(seed), str(kills)]
    root = Path(__file__).parents[2]
    done = subprocess.run([*command, name], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] >= 1
    assert not result["different"]
