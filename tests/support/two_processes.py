"""Runs a script of this folder in two processes, as a user would, and reads what they wrote."""

import faulthandler
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(script: str, folder: Path, *arguments: Any, configuration: Path | None = None) -> list[Any]:
    """What each of two processes wrote to ``folder``, by rank.

    ``configuration`` is a file of accelerate; without one torchrun starts the processes.
    """
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if configuration is not None:
        launcher = ["accelerate.commands.launch", "--config_file", str(configuration)]
        launcher += ["--num_processes", "2", "--main_process_port", "0"]
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    one_thread = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(HERE / script), str(folder), *arguments],
        env={**os.environ, **one_thread},
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert done.returncode == 0, done.stderr[-20000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def main(work: Callable[[Path], Any]) -> None:
    """One of the processes: writes what ``work`` returns of the folder that `run` was given.

    One that hangs ends with a trace of where it is.
    """
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(800, exit=True)
    folder = Path(sys.argv[1])
    result = work(folder)
    torch.save(result, folder / f"{distributed.get_rank()}.pt")
    # Where DDP is the last to hold the process group, Python waits for gloo's threads while they
    # wait for Python to drop the tensors of their last reduction.
    gc.collect()
    distributed.destroy_process_group()
