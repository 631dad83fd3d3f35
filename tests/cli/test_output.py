"""No command replaces the work of an earlier run by accident, or trains nothing."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hyperopt_peft import ProblemError
from hyperopt_peft.cli.options import lock
from tests.support.cli import ROOT, Capture, refused, run, small_run

COMMANDS = ("train", "attribute", "compare")
SHORT = {"max_steps": 1, "lower_steps": 1}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("result", ["adapter_config.json", "checkpoint-3"])
def test_the_results_of_an_earlier_run_stay(
    tmp_path: Path, capsys: Capture, command: str, result: str
) -> None:
    out, chosen = tmp_path / "out", small_run(tmp_path, **SHORT)
    out.mkdir()
    (out / result).write_text("an earlier run")
    refused(capsys, command, chosen, str(out), result, "--overwrite_output_dir")
    if command == "train":  # only a checkpoint of that folder is resumed in it
        chosen["resume_from_checkpoint"] = tmp_path / "other/checkpoint-1"
        refused(capsys, command, chosen, str(out), result, "--overwrite_output_dir")
    assert {path.name for path in out.iterdir()} == {".lock", result}
    assert (out / result).read_text() == "an earlier run"


def test_two_runs_do_not_write_into_one_folder_and_a_killed_one_blocks_none(
    tmp_path: Path, capsys: Capture
) -> None:
    """The processes of one comparison share a folder."""
    out, chosen = tmp_path / "out", small_run(tmp_path, method="lora", **SHORT)
    program = (
        "import sys, pathlib; from hyperopt_peft.cli.options import lock\n"
        "held = lock(pathlib.Path(sys.argv[1]), shared=sys.argv[2] == 'shared')\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    for kind in ("shared", "alone"):
        argv = [sys.executable, "-c", program, str(out), kind]
        with subprocess.Popen(argv, cwd=ROOT, **pipes) as other:
            assert other.stdout is not None and other.stdout.readline() == b"held\n"
            for command in ("train", "attribute"):
                refused(capsys, command, chosen, "output_dir: another run is writing to .*out")
            if kind == "shared":
                os.close(lock(out, shared=True))
            else:
                with pytest.raises(ProblemError, match="another run"):
                    lock(out, shared=True)
            other.kill()
    run("train", **chosen)
