"""The BiDoRA example, end to end on the pretrained encoder and real text, made small."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

ROOT = Path(__file__).parents[2]
SMALL = {
    "train_size": 60,
    "test_size": 60,
    "per_device_train_batch_size": 8,
    "max_length": 16,
    "max_steps": 4,
    "logging_steps": 1,
    "lower_steps": 2,
    "retrain": "warm",
    "retrain_steps": 2,
    "estimators": True,
    "reference_steps": 3,
}


def run(*flags: Any) -> Any:
    script = ROOT / "examples/bidora_text_classification.py"
    return subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)


pytestmark = pytest.mark.slow  # it starts a process and loads the pretrained encoder


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("example")
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    done = run(*flags, f"--output_dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_one_row_a_method_with_equal_starts(output: Any) -> None:
    folder, printed = output
    results = json.loads((folder / "results.json").read_text())
    rows = {row["method"]: row for row in results["results"]}
    assert list(rows) == ["lora", "dora", "bidora"]
    for method, row in rows.items():
        assert f"| {method} | {row['test_accuracy']:.4f} |" in printed
        assert 0 < row["test_accuracy"] < 1

    def losses(method: str, level: Any) -> Any:
        return rows[method]["losses"][level]["losses"]

    # Equal budgets: four steps of the search and two of the retraining are six of the others.
    assert len(losses("lora", "")) == len(losses("dora", "")) == 6
    assert len(losses("bidora", "upper level")) == 2
    assert len(losses("bidora", "retraining")) == 2
    assert rows["dora"]["trainable_parameters"] == rows["bidora"]["trainable_parameters"]
    # Before the first step LoRA and DoRA are one function of one batch.
    first = [losses(method, "")[0] for method in ("lora", "dora")]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert {row["estimator"] for row in results["estimators"]} >= {"direct", "darts:scheme=forward"}


def test_pictures_and_adapter_are_written(output: Any) -> None:
    folder, printed = output
    for name in ("learning_curves", "estimators", "decomposition"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    assert PeftConfig.from_pretrained(folder / "adapter").use_dora
    assert "logits agree" in printed
