"""The examples, end to end and made small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.slow  # each starts a process and loads the pretrained encoder


def test_attribution(tmp_path: Path) -> None:
    sizes = {"train_size": 24, "evaluation_size": 12, "test_size": 12, "max_length": 12}
    steps = {"max_steps": 4, "per_device_train_batch_size": 8, "retrainings": 5, "folds": 2}
    flags = {**sizes, **steps, "output_dir": tmp_path}
    command = [sys.executable, EXAMPLES / "attribution.py"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert -1 <= results["lds"] <= 1 and len(results["removal"]["random"]) == 2
    assert all(0 <= area <= 1 for area in results["wrong_labels"].values())
    assert (tmp_path / "attribution.png").stat().st_size > 10_000
    lines = (tmp_path / "attribution.csv").read_text().splitlines()
    assert lines[0].startswith("row,text,label,score,rank,weight") and len(lines) >= 25
    assert "24 tweets, 5 wrong labels" in done.stdout and "LDS" in done.stdout


def test_sources() -> None:
    sizes = ["--rows=16", "--trusted=12", "--test_size=30", "--folds=2"]
    command = [sys.executable, EXAMPLES / "sources.py", *sizes]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    tables = [line for line in lines if line.startswith(("equal shares", "learned weights,"))]
    assert len(tables) == 2 * 3 and any(" is recommended: its mean loss" in line for line in lines)
