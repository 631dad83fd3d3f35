"""Damaged checkpoints, a full disk, NaN: one clear error, nothing executed, and a way to go on."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hyperopt_peft import NonFiniteError, ProblemError
from hyperopt_peft.engine.checkpoint import (
    MANIFEST,
    last_valid,
    verify_manifest,
    write_manifest,
    write_state,
)
from tests.support.networks import differences
from tests.support.resume import Stop, StopAt, end, interrupted, saving

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


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run's folder, with checkpoints 3, 6 and 9, and how it ended."""
    folder = tmp_path_factory.mktemp("ended")
    made = saving(folder)
    made.train()
    return folder, end(made)


@pytest.fixture
def copied(ended: Any, tmp_path: Path) -> Any:
    """A copy of the folder, its last checkpoint, and how the run ended."""
    folder = tmp_path / "run"
    shutil.copytree(ended[0], folder)
    return folder, folder / "checkpoint-9", ended[1]


def require_refused(folder: Path, message: Any, expected: Any, **settings: Any) -> None:
    """The last checkpoint is refused; the run goes on from the one before, to the same end."""
    made = saving(folder, **settings)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    with pytest.raises(ProblemError, match=message):
        made.train(resume_from_checkpoint=str(folder / "checkpoint-9"))
    assert not differences(dict(made.model.named_parameters()), before)
    assert last_valid(folder) == folder / "checkpoint-6"
    resumed = saving(folder)
    resumed.train(resume_from_checkpoint=True)
    assert not differences(end(resumed), expected)


def test_these_are_the_files_of_a_checkpoint(copied: Any) -> None:
    assert set(json.loads((copied[1] / MANIFEST).read_text())["files"]) == set(FILES)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_truncated_file_is_refused(copied: Any, name: Any) -> None:
    folder, last, expected = copied
    os.truncate(last / name, (last / name).stat().st_size * 2 // 3)
    message = MANIFEST if name == MANIFEST else name
    require_refused(folder, message, expected)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_refused(copied: Any, name: Any) -> None:
    folder, last, expected = copied
    (last / name).unlink()
    message = MANIFEST if name == MANIFEST else name
    require_refused(folder, message, expected)


def test_a_missing_folder_is_refused(copied: Any) -> None:
    folder, last, expected = copied
    shutil.rmtree(last)
    require_refused(folder, "checkpoint-9", expected)


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Any) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "estimator.pt", "epoch_0.pt"]
)
def test_a_pickle_that_runs_code_is_not_executed(copied: Any, name: Any) -> None:
    """Its hash is that of the manifest, so only the loading itself can refuse it."""
    folder, last, _ = copied
    last = folder / "checkpoint-6"
    record = verify_manifest(last)
    torch.save({"state": Trap(folder / "executed")}, last / name)
    write_manifest(last, record)
    with pytest.raises(ProblemError, match="code"):
        saving(folder).train(resume_from_checkpoint=str(last))
    assert not (folder / "executed").exists()
    torch.load(last / name, weights_only=False)  # the trap works
    assert (folder / "executed").exists()


def test_the_pickled_arguments_are_never_loaded(copied: Any) -> None:
    folder, last, expected = copied
    record = verify_manifest(last)
    torch.save(Trap(folder / "executed"), last / "training_args.bin")
    write_manifest(last, record)
    resumed = saving(folder)
    resumed.train(resume_from_checkpoint=True)
    assert not (folder / "executed").exists() and not differences(end(resumed), expected)


@pytest.mark.parametrize("key", ["settings", "skipped"])
def test_a_seal_of_another_program_is_refused(copied: Any, key: Any) -> None:
    last = copied[1]
    write_manifest(last, {k: v for k, v in verify_manifest(last).items() if k != key})
    with pytest.raises(ProblemError, match=key):
        saving(copied[0]).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_the_model_alone_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path, (5,), save_only_model=True)
    with pytest.raises(ProblemError, match="save_only_model"):
        saving(tmp_path).train(resume_from_checkpoint=True)


def test_there_must_be_a_checkpoint_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match=tmp_path.name):
        saving(tmp_path).train(resume_from_checkpoint=True)


def test_initial_values_that_are_lost_are_missed_before_the_search(tmp_path: Path) -> None:
    interrupted(tmp_path, (5,), retrain="scratch")
    (tmp_path / "initial.pt").write_bytes(b"")
    with pytest.raises(ProblemError, match=r"initial\.pt"):
        saving(tmp_path, retrain="scratch").train(resume_from_checkpoint=True)
    write_state(tmp_path / "initial.pt", {"a": torch.zeros(2)})
    with pytest.raises(ProblemError, match=r"initial\.pt.*another model"):
        saving(tmp_path, retrain="scratch").train(resume_from_checkpoint=True)
    (tmp_path / "initial.pt").unlink()
    with pytest.raises(ProblemError, match=r"initial\.pt"):
        saving(tmp_path, retrain="scratch").train(resume_from_checkpoint=True)
    assert last_valid(tmp_path) == tmp_path / "checkpoint-3"


class Full(TrainerCallback):
    """From a step on the system writes no file beyond ``size`` bytes."""

    def __init__(self, step: Any, size: Any) -> None:
        self.step, self.size = step, size

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, hard))


@pytest.mark.parametrize("size", [1_500, 4_500, 15_000])  # in an adapter, in a pickle
def test_a_full_disk_is_one_error_and_leaves_the_last_checkpoint(
    ended: Any, tmp_path: Path, size: Any
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    made = saving(tmp_path, [Full(6, size)], save_total_limit=1)
    try:
        with pytest.raises(ProblemError) as found:
            made.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path}/checkpoint-6" in str(found.value)
    assert f"{tmp_path}/checkpoint-3" in str(found.value)
    assert not (tmp_path / "checkpoint-6").exists()
    resumed = saving(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert not differences(end(resumed), ended[1])


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_seal_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Any
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made = saving(tmp_path)
    monkeypatch.setattr(os, function, full)
    with pytest.raises(ProblemError, match="No space left"):
        made.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def spoil(made: Any, level: Any, step: Any, kind: Any) -> Any:
    """Make the level's loss infinite, or its gradient NaN, at one evaluation in a step.

    ``kind``: "loss", "gradient", or "curvature": only where the lower variables are displaced.
    """
    problem = getattr(made, level)
    loss, start = problem.task_loss, []

    def spoilt(batch: Any) -> Any:
        value = loss(batch)
        if made.state.global_step + 1 != step:
            return value
        now = [v.detach().clone() for v in made.lower.variables]
        start.append(now)
        displaced = any(not torch.equal(a, b) for a, b in zip(now, start[0]))
        if kind == "curvature" and not displaced:
            return value
        if kind == "loss":
            return value * float("inf")
        # Of these alone is a derivative taken at the displaced point.
        variable = (made.upper if kind == "curvature" else made.lower).variables[0]
        return value + (variable * 0).sum().abs().sqrt()  # the root of 0 has no derivative

    problem.task_loss = spoilt
    return made


FAULTS = {
    "lower loss": ("lower", "loss", "Direction: .*loss"),
    "lower gradient": ("lower", "gradient", "Direction: .*gradient"),
    "upper loss": ("upper", "loss", "darts: Magnitude: .*loss"),
    "upper gradient": ("upper", "gradient", "darts: Magnitude: .*gradient"),
    "curvature": ("lower", "curvature", "darts: .*not finite"),
}


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_finite_stops_with_a_checkpoint_of_the_step_before(
    tmp_path: Path, fault: Any, micro: Any
) -> None:
    """From which the run goes on as if nothing had been."""
    level, kind, message = FAULTS[fault]
    settings = {"gradient_accumulation_steps": micro, "gamma": 1e-3}
    whole = saving(tmp_path / "whole", **settings)
    whole.train()
    made = spoil(saving(tmp_path / "spoilt", **settings), level, 8, kind)
    where = rf"^step 8 \(epoch \d+\.\d\d, {micro} micro-batches\): {message}"
    kept = f"the state before it is in {tmp_path}/spoilt/checkpoint-7$"
    with pytest.raises(NonFiniteError, match=f"{where}.*{kept}"):
        made.train()
    assert last_valid(tmp_path / "spoilt").name == "checkpoint-7"
    resumed = saving(tmp_path / "spoilt", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert not differences(end(resumed), end(whole))


def test_what_is_not_finite_in_the_first_step_leaves_a_checkpoint_too(tmp_path: Path) -> None:
    require_goes_on_after(tmp_path, step=1)


@pytest.mark.parametrize("step", [5, 6, 7])
def test_what_is_not_finite_about_the_begin_of_an_epoch_leaves_a_checkpoint_too(
    tmp_path: Path, step: Any
) -> None:
    require_goes_on_after(tmp_path, step=step, rows=25)


def require_goes_on_after(folder: Path, step: Any, **settings: Any) -> None:
    whole = saving(folder / "whole", **settings)
    whole.train()
    made = spoil(saving(folder / "spoilt", **settings), "lower", step, "loss")
    with pytest.raises(NonFiniteError, match=rf"^step {step} .*checkpoint-{step - 1}$"):
        made.train()
    resumed = saving(folder / "spoilt", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert not differences(end(resumed), end(whole))


def test_what_is_not_finite_on_a_full_disk_is_still_named(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    made = spoil(saving(tmp_path, [Full(7, 1_500)]), "lower", 8, "loss")
    try:
        with pytest.raises(NonFiniteError, match=r"^step 8.*no checkpoint could be written$"):
            made.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert last_valid(tmp_path) == tmp_path / "checkpoint-6"


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_finite_can_be_skipped_and_is_counted(
    tmp_path: Path, fault: Any, micro: Any
) -> None:
    level, kind, _ = FAULTS[fault]
    states = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            values = dict(made.model.named_parameters())
            states[state.global_step] = {n: p.detach().clone() for n, p in values.items()}

    settings = {"gradient_accumulation_steps": micro, "non_finite": "skip", "logging_steps": 1}
    made = spoil(saving(tmp_path, [Keep()], **settings), level, 8, kind)
    made.train()
    assert made.skipped == 1 and made.state.global_step == 9
    assert not differences(states[8], states[7])
    assert differences(states[9], states[8]) and differences(states[7], states[6])
    assert all(torch.isfinite(value).all() for value in states[9].values())
    logs = {r["step"]: r.get("skipped") for r in made.state.log_history if "loss" in r}
    assert logs == {**dict.fromkeys(range(1, 8)), 8: 1, 9: 1}


def test_the_count_of_skipped_steps_is_resumed(tmp_path: Path) -> None:
    whole = spoil(saving(tmp_path / "whole", non_finite="skip"), "lower", 5, "loss")
    whole.train()
    made = spoil(saving(tmp_path / "broken", [StopAt(8)], non_finite="skip"), "lower", 5, "loss")
    with pytest.raises(Stop):
        made.train()
    resumed = saving(tmp_path / "broken", non_finite="skip")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.skipped == 1 and not differences(end(resumed), end(whole))
