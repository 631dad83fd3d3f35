"""Damaged and hostile files, a full disk and SIGKILL: one clear error, and a way to go on."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hyperopt_peft import ProblemError
from hyperopt_peft.engine.checkpoint import (
    MANIFEST,
    last_valid,
    verify_manifest,
    write_manifest,
    write_state,
)
from tests.support.damage import DAMAGES, Trap
from tests.support.killed import RUNS
from tests.support.networks import differences
from tests.support.process import python
from tests.support.resume import end, interrupted, saving

#: Some files of a checkpoint, each with a damage that it may have.
FILES = {
    "README.md": "missing",
    "adapter_model.safetensors": "truncated",
    "levels.safetensors": "changed",
    "rng_state.pth": "truncated",
    "trainer_state.json": "truncated",
    MANIFEST: "missing",
}
PICKLES = ("optimizer.pt", "rng_state.pth", "estimator.pt", "epoch_0.pt")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run's folder, with checkpoints 3, 6 and 9, and how it ended."""
    folder = tmp_path_factory.mktemp("ended")
    made = saving(folder)
    made.train()
    return folder, end(made)


@pytest.fixture
def folder(ended: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ended[0], tmp_path / "run"))


def require_same_end(folder: Path, ended: Any) -> None:
    resumed = saving(folder)
    resumed.train(resume_from_checkpoint=True)
    assert not differences(end(resumed), ended[1])


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused(folder: Path, name: str) -> None:
    """Nothing of its checkpoint is loaded, and the one before it is the last valid one."""
    DAMAGES[FILES[name]](folder / "checkpoint-9" / name)
    made = saving(folder)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    with pytest.raises(ProblemError, match=name):
        made.train(resume_from_checkpoint=str(folder / "checkpoint-9"))
    assert not differences(dict(made.model.named_parameters()), before)
    assert last_valid(folder) == folder / "checkpoint-6"


def test_the_run_goes_on_from_the_checkpoint_before(folder: Path, ended: Any) -> None:
    DAMAGES["truncated"](folder / "checkpoint-9/optimizer.pt")
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


def test_a_checkpoint_of_the_model_alone_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path, (5,), save_only_model=True)
    with pytest.raises(ProblemError, match="save_only_model"):
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


@pytest.mark.parametrize("size", [1_500, 15_000])  # in an adapter, in a pickle
def test_a_full_disk_leaves_the_last_checkpoint(ended: Any, tmp_path: Path, size: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(TrainerCallback):
        """From the sixth step on the system writes no file beyond ``size`` bytes."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    made = saving(tmp_path, [Full()], save_total_limit=1)
    try:
        with pytest.raises(ProblemError) as error:
            made.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(f"{tmp_path}/checkpoint-{step}" in str(error.value) for step in (6, 3))
    assert not (tmp_path / "checkpoint-6").exists()
    require_same_end(tmp_path, ended)


@pytest.mark.parametrize(
    ("seed", "kills", "name"),
    [
        (0, 1, next(iter(RUNS))),
        *(pytest.param(k, 3, name, marks=pytest.mark.slow) for k, name in enumerate(RUNS)),
    ],
)
def test_a_killed_run_ends_as_if_left_alone(seed: int, kills: int, name: str) -> None:
    done = python("-W", "ignore", "-m", "tests.support.killed", seed, kills, name)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] >= 1
    assert not result["different"]
