"""Every benchmark script runs with its smallest sizes; the pages have the tables of the results."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLOW = [
    "speed timing --quick",
    "speed dora_layer --quick",
    "speed language --quick",
    "speed gpu --device cpu --small --threads 1",
    "speed on_paper --quick",
    "estimators comparison --quick --methods direct cg:steps=10",
    "estimators convergence --quick",
    "estimators cost --quick",
    "estimators fidelity --quick",
    "estimators noise --quick",
    "attribution scores --quick --parts methods cost memory suspects",
    "attribution trainers --quick",
    "study run --quick",
]
FAST = ["study report --check", "attribution report --check"]


def script(words: str, *more: str) -> subprocess.CompletedProcess[str]:
    folder, *options = words.split()
    command = [sys.executable, ROOT / "benchmarks" / folder, *options, *more]
    threads = (
        ["--threads", "1"] if folder in ("speed", "estimators") and "--quick" in options else []
    )
    return subprocess.run([*command, *threads], capture_output=True, text=True)


@pytest.mark.parametrize(
    "words", [*FAST, *(pytest.param(words, marks=pytest.mark.slow) for words in SLOW)]
)
def test_a_script_runs(words: str) -> None:
    done = script(words)
    assert done.returncode == 0, done.stderr
    assert done.stdout or "--check" in words
