"""The examples that search ranks and learn hyper-parameters, end to end and made small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftConfig

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = {"train_size": 24, "test_size": 12, "max_length": 12, "batch_size": 4, "steps": 2}


def run(script, folder, **flags):
    flags = [f"--{name}={value}" for name, value in {**SIZES, **flags}.items()]
    command = [sys.executable, EXAMPLES / script, *flags, f"--output_dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "results.json").read_text())


def test_rank_selection(tmp_path):
    printed, found = run("rank_selection.py", tmp_path, search_steps=4, rank=4, warm=True)
    rows = {row["method"]: row for row in found["results"]}
    steps = {name: row["steps"] for name, row in rows.items()}
    assert steps.pop("uniform rank, longer") == 6 and set(steps.values()) == {2}
    assert "selected, warm" in steps
    sizes = {name: row["adapter_parameters"] for name, row in rows.items()}
    assert sizes["selected ranks"] == sizes["the same, shuffled"] <= sizes["uniform rank"]
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    ranks = found["ranks"].values()
    assert sorted(config.rank_pattern.values()) == sorted(ranks)
    assert f"| selected ranks | 2 | {sizes['selected ranks']:,} |" in printed


def test_hyperparameters(tmp_path):
    printed, found = run("hyperparameters.py", tmp_path, learning_rate=1e-3)
    first, *_, last = found["path"]
    assert first["learning_rate"] == pytest.approx(1e-3)
    assert all(first[name] != last[name] for name in first)
    names = [row["method"] for row in found["results"]]
    assert names[1:] == ["learnt, trained anew", "of the start", "learning rate picked by hand"]
    for name in names:
        PeftConfig.from_pretrained(tmp_path / name.replace(" ", "_"))
        assert f"| {name} | " in printed
