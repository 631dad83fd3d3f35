"""Every benchmark script runs with its smallest sizes; the pages have the tables of the results."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks  # noqa: F401 - its entry in sys.path is there before a test takes a copy

ROOT = Path(__file__).parents[2]
SLOW = [
    "speed timing --quick",
    "speed language --quick",
    "speed gpu --device cpu --small --threads 1 --parts layer head",
    "speed on_paper --quick",
    "speed head --quick",
    "estimators comparison --quick --methods direct cg:steps=10",
    "estimators convergence --quick",
    "estimators fidelity --quick",
    "estimators noise --quick",
    "attribution scores --quick --parts methods cost suspects",
    "attribution trainers --quick",
    "attribution heads --quick",
    "methods run --quick",
]


@pytest.mark.slow
@pytest.mark.parametrize("words", SLOW)
def test_a_script_runs(words: str) -> None:
    folder, *options = words.split()
    command = [sys.executable, ROOT / "benchmarks" / folder, *options]
    if folder in ("speed", "estimators") and "--quick" in options:
        command += ["--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("folder", ["methods", "attribution"])
def test_a_page_has_the_tables_of_the_results(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    main = ROOT / "benchmarks" / folder / "__main__.py"
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [str(main), "report", "--check"])
    runpy.run_path(str(main), run_name="__main__")
