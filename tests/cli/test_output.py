"""No command replaces the work of an earlier run by accident, or trains nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import refused, run, small_run

COMMANDS = ("train", "attribute", "compare")
RESULTS = ["adapter_config.json", "checkpoint-3", "comparison.json"]

#: A run of one step.
SHORT = {"max_steps": 1, "lower_steps": 1}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_training_of_no_step_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    chosen = {**small_run(tmp_path, **SHORT), "max_steps": -1, "num_train_epochs": 0}
    refused(capsys, command, chosen, "num_train_epochs .*got 0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("result", RESULTS)
def test_the_results_of_an_earlier_run_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, result: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / result).write_text("an earlier run")
    chosen = small_run(tmp_path, **SHORT)
    refused(capsys, command, chosen, str(out), result, "--overwrite_output_dir")
    if command != "train":
        return
    # Only a checkpoint of that folder is resumed in it.
    elsewhere = {**chosen, "resume_from_checkpoint": tmp_path / "other/checkpoint-1"}
    refused(capsys, command, elsewhere, str(out), result, "--overwrite_output_dir")
    assert [path.name for path in out.iterdir()] == [result]
    assert (out / result).read_text() == "an earlier run"


def test_an_earlier_run_is_replaced_on_demand(tmp_path: Path) -> None:
    chosen = small_run(tmp_path, method="lora", **SHORT)
    run("train", **chosen)
    before = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    run("train", **{**chosen, "seed": 4, "overwrite_output_dir": True})
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() != before


@pytest.mark.parametrize("folder", ["/dev/null", "/dev/null/below"])
def test_an_output_dir_that_is_or_lies_in_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    chosen = small_run(tmp_path, output_dir=folder)
    refused(capsys, "train", chosen, "output_dir: /dev/null is no folder")
