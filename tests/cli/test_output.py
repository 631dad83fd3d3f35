"""No command replaces the work of an earlier run by accident, or trains nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import refused, small_run

COMMANDS = ("train", "attribute", "compare")
SHORT = {"max_steps": 1, "lower_steps": 1}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("result", ["adapter_config.json", "checkpoint-3"])
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
