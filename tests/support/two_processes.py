"""Runs ``work`` of a module in two processes, as a user would, and reads what they returned."""

import faulthandler
import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import distributed

ROOT = Path(__file__).parents[2]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(
    module: ModuleType, folder: Path, *arguments: Any, configuration: Path | None = None
) -> list[Any]:
    """``module.work(folder, *arguments)`` in each of two processes, by rank.

    They are started by torchrun, or by accelerate with the file ``configuration``.
    """
    accelerate = ["accelerate.commands.launch", "--config_file", str(configuration)]
    accelerate += ["--num_processes", "2", "--main_process_port", "0"]
    launcher = TORCHRUN if configuration is None else accelerate
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    one_thread = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, __file__, module.__name__, str(folder), *arguments],
        env={**os.environ, **one_thread},
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert done.returncode == 0, done.stderr[-20000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def main(module: str, folder: str, *arguments: str) -> None:
    """One of the processes; one that hangs ends with a trace of where it is."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(800, exit=True)
    result = importlib.import_module(module).work(Path(folder), *arguments)
    torch.save(result, Path(folder) / f"{distributed.get_rank()}.pt")
    # Where DDP is the last to hold the process group, Python waits for gloo's threads while they
    # wait for Python to drop the tensors of their last reduction.
    gc.collect()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
