"""examples/accelerate: accelerate accepts every file, and two CPU processes save once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from hyperopt_peft import ProblemError
from tests.support.trainers import trainer

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples/accelerate"

SCRIPT = """
import gc, json, sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from tests.support.trainers import arguments, data, peft_model
from hyperopt_peft import BiDoRA, BilevelTrainer

torch.set_num_threads(1)
written = []


def watch(event, args):
    if event == "open" and "outputs" in str(args[0]) and "w" in str(args[1]):
        written.append(Path(args[0]).name)


sys.addaudithook(watch)
args = arguments("outputs", max_steps=2)
trainer = BilevelTrainer(peft_model(), args, method=BiDoRA(), train_dataset=data())
trainer.train()
trainer.save_model()
record = {"processes": trainer.args.world_size, "written": written}
Path(f"rank_{trainer.args.process_index}.json").write_text(json.dumps(record))
leave = Accelerator.end_training


def leave_without_ddp(accelerator):  # gloo's threads may wait for a process that waits for them
    assert not [x for x in gc.get_objects() if type(x) is DistributedDataParallel]
    leave(accelerator)


Accelerator.end_training = leave_without_ddp
trainer.end_training()
tasks = Path("/proc/self/task")
if tasks.exists():  # gloo's threads would abort the process at its exit
    assert not [t.name for t in tasks.iterdir() if "gloo" in (t / "comm").read_text()]
"""


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.iterdir()))
def test_accelerate_accepts_the_file(name: str) -> None:
    config = load_config_from_file(str(CONFIGS / name))
    assert config.num_machines == 1
    command = ["--config_file", str(CONFIGS / name), "train.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert args.num_processes == config.num_processes
    assert (args.multi_gpu or args.use_fsdp) == (config.num_processes > 1)
    assert args.mixed_precision == ("bf16" if "language" in name else "no")
    assert args.use_cpu == ("cpu" in name)


def launch(script: str, folder: Path) -> Any:
    """Run ``script`` in two processes; returns the launcher's end, and what each one wrote."""
    (folder / "train.py").write_text(script)
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(CONFIGS / "two_cpu_processes.yaml"), "train.py"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return run, [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json"))]


@pytest.mark.slow  # processes of its own
def test_two_processes_save_a_model_once(tmp_path: Path) -> None:
    run, records = launch(SCRIPT, tmp_path)
    assert run.returncode == 0, run.stderr
    first, second = records
    assert first.pop("written").count("adapter_config.json") == 1
    assert second.pop("written") == []
    assert first == second == {"processes": 2}
    assert (tmp_path / "outputs/adapter_model.safetensors").exists()


@pytest.mark.slow  # processes of its own
def test_processes_that_the_trainer_does_not_know_of_are_refused(tmp_path: Path) -> None:
    """Without ``use_cpu`` and a GPU, the Trainer takes each of them for the only one."""
    run, records = launch(SCRIPT.replace("max_steps=2", "use_cpu=False"), tmp_path)
    if run.returncode == 0:  # an older accelerate counts them all the same
        assert [record["processes"] for record in records] == [2, 2]
        return
    assert "there are 2 processes, but the Trainer counts 1" in run.stderr
    assert not any((tmp_path / "outputs").iterdir())  # nothing was written


def test_fp16_of_the_launcher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ProblemError, match="fp16"):
        trainer(tmp_path)
