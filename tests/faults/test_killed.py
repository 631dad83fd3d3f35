"""A run that SIGKILL ends at any moment goes on from its last whole checkpoint, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ALL = [
    "retraining from scratch, two micro-batches",
    "cg, best model, two checkpoints",
    "Engine, unrolled",
]


@pytest.mark.parametrize(
    ("seed", "kills", "names"),
    [
        (0, 1, ALL[:1]),
        *(pytest.param(k, 3, [name], marks=pytest.mark.slow) for k, name in enumerate(ALL)),
    ],
)
def test_a_killed_run_ends_as_if_left_alone(seed: int, kills: int, names: list[str]) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.killed", str(seed), str(kills)]
    root = Path(__file__).parents[2]
    done = subprocess.run([*command, *names], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert list(results) == names
    for name, result in results.items():
        assert result["kills"] >= 1, name
        assert not result["different"], name
