"""The README says what is true: its programs run, its table is what its command prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "benchmarks"))
import estimator_table  # noqa: E402


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), namespace)
    assert (tmp_path / "outputs/adapter/adapter_model.safetensors").exists()
    assert namespace["penalty"][:3].max() < namespace["penalty"][3:].mean()


def numbers(table):
    return [
        [float(x) for x in re.findall(r"(?<=\| )\d[\d.e-]*(?= \|)", row)]
        for row in table.splitlines()[2:]
    ]


def test_estimator_table_is_what_its_command_prints():
    written = README.partition(estimator_table.BEGIN)[2].partition(estimator_table.END)[0].strip()
    measured = estimator_table.table()
    assert [row.split("|")[1] for row in written.splitlines()] == [
        row.split("|")[1] for row in measured.splitlines()
    ]
    for said, found in zip(numbers(written), numbers(measured), strict=True):
        assert said == pytest.approx(found, rel=0.2, abs=1e-6)


def test_custom_problem_example_runs():
    script = ROOT / "examples/custom_problem.py"
    assert len(script.read_text().splitlines()) < 60
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, env=os.environ
    )
    assert "steepest" in run.stdout
    before, after = map(float, re.search(r"loss ([\d.]+) → ([\d.]+)", run.stdout).groups())
    assert after < before / 10
