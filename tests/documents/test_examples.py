"""The examples, end to end and made small."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from tests.support.examples import EXAMPLES
from tests.support.process import python

pytestmark = pytest.mark.slow  # each starts a process and loads the pretrained encoder


def run(script: str, folder: Path | None = None, **flags: Any) -> tuple[list[str], Any]:
    """The lines that the example prints, and the results that it writes to ``folder``."""
    flags |= {} if folder is None else {"output_dir": folder}
    done = python(EXAMPLES / script, *(f"--{k}={x}" for k, x in flags.items()))
    assert "Warning" not in done.stderr
    results = folder and json.loads((folder / "results.json").read_text())
    return done.stdout.splitlines(), results


def test_attribution(tmp_path: Path) -> None:
    sizes = {"train_size": 24, "evaluation_size": 12, "test_size": 12, "max_length": 12}
    steps = {"max_steps": 4, "per_device_train_batch_size": 8, "retrainings": 5, "folds": 2}
    printed, results = run("attribution.py", tmp_path, **sizes, **steps)
    assert -1 <= results["lds"] <= 1
    assert all(0 <= area <= 1 for area in results["wrong_labels"].values())
    assert (tmp_path / "attribution.png").stat().st_size > 10_000
    lines = (tmp_path / "attribution.csv").read_text().splitlines()
    assert lines[0].startswith("row,text,label,score,rank,weight") and len(lines) >= 25
    assert all(any(x in y for y in printed) for x in ("24 tweets, 5 wrong labels", "LDS"))


def test_sources() -> None:
    lines, _ = run("sources.py", rows=16, trusted=12, test_size=30, folds=2)
    tables = [line for line in lines if line.startswith(("equal shares", "learned weights,"))]
    assert len(tables) == 2 * 2 and any(" is recommended: its mean loss" in line for line in lines)


def test_quickstart(tmp_path: Path) -> None:
    lines, results = run("quickstart.py", tmp_path, rows=60, test_rows=60, passes=45, seeds=2)
    assert len(lines) <= 40 and max(map(len, lines)) <= 110
    assert not any("{" in line for line in lines)
    for part, count, scale, digits in (("adapters", 3, 100, 1), ("rows that hurt", 4, 1, 3)):
        assert len(results[part]) == count
        for name, accuracy in results[part].items():
            of_name = [x for x in lines if x.strip().startswith(f"{name} ")]
            assert any(f"{scale * accuracy:.{digits}f}" in line for line in of_name)
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("adapters", "rows"))
    assert PeftConfig.from_pretrained(tmp_path / "adapter").peft_type == "LORA"
    assert all(any(path.iterdir()) for path in tmp_path.rglob("*") if path.is_dir())
