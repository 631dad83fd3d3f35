"""What can befall a checkpoint, the disk below it, or the numbers that are trained on."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from small_runs import Final, small_trainer
from transformers import TrainerCallback

from hyperopt_peft import NonFiniteError, ProblemError
from hyperopt_peft.engine.checkpoint import MANIFEST, verify_manifest, write_manifest

NO_LIMIT = -1
STEP = 10  # where the disk is full, or a number is not finite
Change = Callable[[Path], object]
Job = Callable[[Path, Callable[[], object]], Final]


def damages(checkpoint: Path, marker: Path) -> Iterator[tuple[str, str, Change]]:
    """Kind, detail and function of the folder for each way to damage a copy of ``checkpoint``.

    A pickle that is executed makes the file ``marker``.
    """
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    for name in (*files, MANIFEST):
        yield "a file truncated", name, functools.partial(_cut, name)
    for name in files:
        yield "a file missing", name, functools.partial(_remove, name)
        yield "a byte changed", name, functools.partial(_flip, name)
    yield "never finished", MANIFEST, functools.partial(_remove, MANIFEST)
    yield "no such folder", "", shutil.rmtree
    for name in files:
        if name.endswith((".pt", ".pth")):
            yield "a pickle that runs code", name, functools.partial(_trap, name, marker)


def _cut(name: str, folder: Path) -> None:
    size = (folder / name).stat().st_size
    os.truncate(folder / name, size // 2)


def _remove(name: str, folder: Path) -> None:
    (folder / name).unlink()


def _flip(name: str, folder: Path) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


class Trap:
    """Unpickled, it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def _trap(name: str, marker: Path, folder: Path) -> None:
    """With hashes that fit: only the loading itself can refuse it."""
    record = verify_manifest(folder)
    torch.save({"state": Trap(marker)}, folder / name)
    write_manifest(folder, record)


def resume_from(name: str, **changes: Any) -> Job:
    """Resume from the checkpoint of that name, under other settings."""

    def job(folder: Path, ready: Callable[[], object]) -> Final:
        ready()
        trainer = small_trainer(folder, **changes)
        return attempt(lambda: trainer.train(resume_from_checkpoint=str(folder / name)))

    return job


def attempt(action: Callable[[], object]) -> Final:
    """The error that ``action`` ends in, by the name of its class, and its message."""
    try:
        action()
    except (ProblemError, NonFiniteError) as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": "none", "message": ""}


class _Full(TrainerCallback):  # type: ignore[misc]
    """From `STEP` on no file can be longer than ``size`` bytes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEP:
            _limit(self.size)


def _limit(size: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size < 0 else size, hard))


def full_disk(size: int) -> Job:
    """Train on a disk that takes ``size`` bytes of each file from `STEP` on."""

    def job(folder: Path, ready: Callable[[], object]) -> Final:
        ready()
        trainer = small_trainer(folder)
        trainer.add_callback(_Full(size))
        found = attempt(trainer.train)
        _limit(NO_LIMIT)
        return found

    return job


def not_finite(level: str, call: int) -> Job:
    """Train with an infinite loss at one evaluation, by number, of the ``level``."""

    def job(folder: Path, ready: Callable[[], object]) -> Final:
        ready()
        trainer = small_trainer(folder)
        problem: Any = getattr(trainer, level)
        loss, calls = problem.task_loss, iter(range(1, 10_000))
        problem.task_loss = lambda batch: (
            loss(batch) * (float("inf") if next(calls) == call else 1.0)
        )
        return attempt(trainer.train)

    return job


# One-sided darts evaluates f twice where the upper level moves: at the step, and displaced.
NUMBERS = {
    "the lower loss": not_finite("lower", 10),
    "the upper loss": not_finite("upper", 5),
    "the curvature": not_finite("lower", 15),
}
FULL = {f"{size} bytes of a file": full_disk(size) for size in (0, 1_000, 10_000, 15_000)}
OTHER = {
    f"{key}={value}": resume_from("checkpoint-20", **{key: value})
    for key, value in {
        "seed": 4,
        "gamma": 0.5,
        "learning_rate": 0.5,
        "hypergradient": "cg",
        "per_device_train_batch_size": 8,
    }.items()
}
