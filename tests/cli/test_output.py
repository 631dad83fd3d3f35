"""No command replaces the work of an earlier run by accident, or trains nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import refused, run, small_run

COMMANDS = ("train", "attribute", "compare")
SHORT = {"max_steps": 1, "lower_steps": 1}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs .*got 0"),
        ({"output_dir": "/dev/null"}, "output_dir: /dev/null is no folder"),
        ({"output_dir": "/dev/null/below"}, "output_dir: /dev/null is no folder"),
    ],
)
def test_a_training_of_nothing_or_to_nowhere_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    changes: dict[str, Any],
    words: str,
) -> None:
    refused(capsys, command, {**small_run(tmp_path, **SHORT), **changes}, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("result", ["adapter_config.json", "checkpoint-3", "comparison.json"])
def test_the_results_of_an_earlier_run_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, result: str
) -> None:
    out, chosen = tmp_path / "out", small_run(tmp_path, **SHORT)
    out.mkdir()
    (out / result).write_text("an earlier run")
    refused(capsys, command, chosen, str(out), result, "--overwrite_output_dir")
    if command == "train":  # only a checkpoint of that folder is resumed in it
        chosen["resume_from_checkpoint"] = tmp_path / "other/checkpoint-1"
        refused(capsys, command, chosen, str(out), result, "--overwrite_output_dir")
    assert [path.name for path in out.iterdir()] == [result]
    assert (out / result).read_text() == "an earlier run"


def test_an_earlier_run_is_replaced_on_demand(tmp_path: Path) -> None:
    chosen = small_run(tmp_path, method="lora", **SHORT)
    run("train", **chosen)
    before = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    run("train", **{**chosen, "seed": 4, "overwrite_output_dir": True})
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() != before
