"""Damaged and hostile files and a full disk: one clear error, nothing executed, a way to go on."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hyperopt_peft import Engine, ProblemError
from hyperopt_peft.engine.checkpoint import (
    MANIFEST,
    last_valid,
    verify_manifest,
    write_manifest,
    write_state,
)
from tests.support.networks import differences, network_levels
from tests.support.resume import end, interrupted, saving

FILES = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "bilevel_settings.json",
    "levels.safetensors",
    "epoch_0.pt",
    "estimator.pt",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
)
PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "estimator.pt", "epoch_0.pt")


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


def change_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "missing": Path.unlink,
    "changed": change_a_byte,
}


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run's folder, with checkpoints 3, 6 and 9, and how it ended."""
    folder = tmp_path_factory.mktemp("ended")
    made = saving(folder)
    made.train()
    return folder, end(made)


@pytest.fixture
def folder(ended: Any, tmp_path: Path) -> Path:
    """A copy of the finished run's folder."""
    return Path(shutil.copytree(ended[0], tmp_path / "run"))


def require_same_end(folder: Path, ended: Any) -> None:
    resumed = saving(folder)
    resumed.train(resume_from_checkpoint=True)
    assert not differences(end(resumed), ended[1])


def require_refused(folder: Path, message: str) -> None:
    """The last checkpoint is refused, and the one before it is the last valid one."""
    made = saving(folder)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    with pytest.raises(ProblemError, match=message):
        made.train(resume_from_checkpoint=str(folder / "checkpoint-9"))
    assert not differences(dict(made.model.named_parameters()), before)
    assert last_valid(folder) == folder / "checkpoint-6"


def test_these_are_the_files_of_a_checkpoint(folder: Path) -> None:
    manifest = json.loads((folder / "checkpoint-9" / MANIFEST).read_text())
    assert set(manifest["files"]) == set(FILES)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        *((damage, name) for damage in DAMAGES for name in FILES),
        *((damage, MANIFEST) for damage in ("truncated", "missing")),
    ],
)
def test_a_damaged_file_is_refused(folder: Path, damage: str, name: str) -> None:
    DAMAGES[damage](folder / "checkpoint-9" / name)
    require_refused(folder, name)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_the_run_goes_on_from_the_checkpoint_before(folder: Path, ended: Any, damage: str) -> None:
    DAMAGES[damage](folder / "checkpoint-9/optimizer.pt")
    require_same_end(folder, ended)


def test_a_missing_folder_is_refused(folder: Path, ended: Any) -> None:
    shutil.rmtree(folder / "checkpoint-9")
    require_refused(folder, "checkpoint-9")
    require_same_end(folder, ended)


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_runs_code_is_not_executed(folder: Path, name: str) -> None:
    """Its hash is that of the manifest, so only the loading itself can refuse it."""
    last, marker = folder / "checkpoint-6", folder / "executed"
    record = verify_manifest(last)
    torch.save({"state": Trap(marker)}, last / name)
    write_manifest(last, record)
    with pytest.raises(ProblemError, match="code"):
        saving(folder).train(resume_from_checkpoint=str(last))
    assert not marker.exists()
    torch.load(last / name, weights_only=False)  # the trap works
    assert marker.exists()


def test_the_pickled_arguments_are_never_loaded(folder: Path, ended: Any) -> None:
    last = folder / "checkpoint-9"
    record = verify_manifest(last)
    torch.save(Trap(folder / "executed"), last / "training_args.bin")
    write_manifest(last, record)
    require_same_end(folder, ended)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("damage", ["truncated", "missing", "hostile"])
def test_a_damaged_state_of_an_engine_is_refused(tmp_path: Path, damage: str) -> None:
    """Nothing of it is taken over, and nothing executed."""
    path, marker = tmp_path / "engine.pt", tmp_path / "executed"
    engine = Engine(*network_levels(), "darts", progress=False)
    engine.run(2)
    engine.save(path)
    if damage == "hostile":
        torch.save(engine.state_dict() | {"step": Trap(marker)}, path)
    else:
        DAMAGES[damage](path)
    other = Engine(*network_levels(), "darts", progress=False)
    before = other.state_dict()
    with pytest.raises(ProblemError, match=r"engine\.pt"):
        other.load(path)
    assert not differences(other.state_dict(), before) and not marker.exists()


@pytest.mark.parametrize("key", ["settings", "skipped"])
def test_a_manifest_of_another_program_is_refused(folder: Path, key: str) -> None:
    last = folder / "checkpoint-9"
    write_manifest(last, {k: v for k, v in verify_manifest(last).items() if k != key})
    with pytest.raises(ProblemError, match=key):
        saving(folder).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_the_model_alone_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path, (5,), save_only_model=True)
    with pytest.raises(ProblemError, match="save_only_model"):
        saving(tmp_path).train(resume_from_checkpoint=True)


def test_there_must_be_a_checkpoint_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match=tmp_path.name):
        saving(tmp_path).train(resume_from_checkpoint=True)


def test_initial_values_that_are_lost_are_missed_before_the_search(tmp_path: Path) -> None:
    interrupted(tmp_path, (5,), retrain="scratch")
    path = tmp_path / "initial.pt"
    for damage, message in (
        (lambda: path.write_bytes(b""), r"initial\.pt"),
        (lambda: write_state(path, {"a": torch.zeros(2)}), r"initial\.pt.*another model"),
        (path.unlink, r"initial\.pt"),
    ):
        damage()
        with pytest.raises(ProblemError, match=message):
            saving(tmp_path, retrain="scratch").train(resume_from_checkpoint=True)
    assert last_valid(tmp_path) == tmp_path / "checkpoint-3"


class Full(TrainerCallback):
    """From a step on the system writes no file beyond ``size`` bytes."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, hard))


@pytest.fixture
def file_size_limit() -> Any:
    """The limit on the size of files is as before after the test."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [0, 1_500, 4_500, 15_000])  # in an adapter, in a pickle
def test_a_full_disk_is_one_error_and_leaves_the_last_checkpoint(
    ended: Any, tmp_path: Path, file_size_limit: Callable[[], None], size: int
) -> None:
    made = saving(tmp_path, [Full(6, size)], save_total_limit=1)
    with pytest.raises(ProblemError) as error:
        made.train()
    file_size_limit()
    assert all(f"{tmp_path}/checkpoint-{step}" in str(error.value) for step in (6, 3))
    assert not (tmp_path / "checkpoint-6").exists()
    require_same_end(tmp_path, ended)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_manifest_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made = saving(tmp_path)
    monkeypatch.setattr(os, function, full)
    with pytest.raises(ProblemError, match="No space left"):
        made.train()
    assert not list(tmp_path.glob("checkpoint-*"))
