"""The examples, end to end and made small."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from hyperopt_peft.hypergradients import registered
from tests.support.process import ROOT, python

pytestmark = pytest.mark.slow  # each starts a process and loads the pretrained encoder


def run(script: str, folder: Path | None = None, **flags: Any) -> tuple[list[str], Any]:
    """The lines that the example prints, and the results that it writes to ``folder``."""
    flags |= {} if folder is None else {"output_dir": folder}
    done = python(ROOT / "examples" / script, *(f"--{k}={x}" for k, x in flags.items()))
    # Also none of other libraries that a user cannot act on, as of a missing kernel.
    assert "Warning" not in done.stderr and "gemm_4bit" not in done.stderr
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


def test_quickstart(tmp_path: Path) -> None:
    lines, results = run("quickstart.py", tmp_path, rows=60, test_rows=60, passes=45, seeds=2)
    assert len(lines) <= 40 and max(map(len, lines)) <= 110
    assert not any("{" in line for line in lines)
    for part, count, scale, digits in (("adapters", 3, 100, 1), ("most harmful rows", 4, 1, 3)):
        assert len(results[part]) == count
        for name, accuracy in results[part].items():
            of_name = [x for x in lines if x.strip().startswith(f"{name} ")]
            assert any(f"{scale * accuracy:.{digits}f}" in line for line in of_name)
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("adapters", "rows"))
    assert PeftConfig.from_pretrained(tmp_path / "adapter").peft_type == "LORA"
    assert all(any(path.iterdir()) for path in tmp_path.rglob("*") if path.is_dir())


def test_bidora(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"rows": 48, "held_out": 24, "test_rows": 30, "passes": 48}
    lines, results = run("bidora.py", tmp_path, **flags, hypergradient="darts:xi=1.0")
    assert results["logits"] < 1e-4
    assert all(0 <= score <= 1 for score in results["scores"].values())
    spent = [int(line.split()[-1]) for line in lines if re.match(r"(LoRA|DoRA|BiDoRA) +0\.", line)]
    assert len(spent) == 3 and max(spent) - min(spent) <= 8
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("curves", "weights"))
    assert PeftConfig.from_pretrained(tmp_path / "adapter").use_dora


def test_define_a_method(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"rows": 48, "trusted": 24, "test_rows": 30, "passes": 54, "seeds": 2}
    lines, _ = run("define_a_method.py", **flags, output_dir=tmp_path)
    (padding,) = (line.split() for line in lines if line.startswith("padding changes"))
    assert float(padding[5].strip(",")) < 1e-5 < float(padding[-1])
    starts = [line.split("  ")[0] for line in lines]
    assert {"LoRA", "SoftLabels", "SoftLabels, upper level frozen"} <= {*starts}
    assert (tmp_path / "methods.png").stat().st_size > 10_000
    assert PeftConfig.from_pretrained(tmp_path / "adapter").peft_type == "LORA"


def test_swap_estimators(tmp_path: Path) -> None:
    """Solvers that may take all steps find the closed form, and all estimators are in the table."""
    lines, _ = run("swap_estimators.py", output_dir=tmp_path)
    rows = [line.split() for line in lines[1:] if line]
    last = {row[0].partition(":")[0]: float(row[-1]) for row in rows}
    assert {*last} == {*registered(), "steepest"}
    assert all(last[name] < 1e-7 for name in ("exact", "cg", "minres", "nystrom"))
    assert last["direct"] == 1 and last["steepest"] < 0.01 and max(last.values()) <= 1
    assert (tmp_path / "estimators.png").stat().st_size > 10_000
