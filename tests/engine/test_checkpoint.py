"""Checkpoints on disk: whole or refused, never executed; the last written one is the last."""

import json
import os
import resource
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperopt_peft import ProblemError
from hyperopt_peft.engine import checkpoint
from hyperopt_peft.engine.checkpoint import (
    MANIFEST,
    last_valid,
    read_state,
    rotate,
    verify_manifest,
    write_manifest,
    write_state,
)
from tests.support.damage import DAMAGES, Trap, no_space

RECORD = {"settings": {"seed": 1}, "skipped": 2}
STATE = {"weights": torch.arange(4.0), "steps": [1, 2], "name": "x"}


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a second later."""
    times = iter(range(1000, 10_000))
    monkeypatch.setattr("time.time", lambda: next(times))


def write(folder: Path, number: Any, *, complete: bool = True) -> Any:
    path = folder / f"checkpoint-{number}"
    (path / "part").mkdir(parents=True)
    write_state(path / "optimizer.pt", STATE)
    (path / "part" / "notes.txt").write_text(f"step {number}")
    if complete:
        write_manifest(path, RECORD)
    return path


def names(folder: Path) -> Any:
    return sorted(int(path.name.partition("-")[2]) for path in folder.iterdir())


def test_a_complete_folder_gives_its_record(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    record = verify_manifest(path)
    assert record.pop("written") == checkpoint.written(path) >= 1000
    assert record == RECORD
    assert set(json.loads((path / MANIFEST).read_text())["files"]) == {
        "optimizer.pt",
        "part/notes.txt",
    }
    assert not list(path.glob("*.part"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path, name = write(tmp_path, 3), "part/notes.txt"
    DAMAGES[damage](path / name)
    with pytest.raises(ProblemError, match=name):
        verify_manifest(path)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *((text, MANIFEST) for text in ("", "[]", "null", '{"files": {}}', '{"files": 3}')),
        ('{"files": {}, "written": "x"}', MANIFEST),
        ('{"files": {"../secret": "0"}, "written": 1}', "../secret"),  # no file outside
    ],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str, name: str) -> None:
    path = write(tmp_path, 3)
    (tmp_path / "secret").write_text("x")
    (path / MANIFEST).write_text(text)
    with pytest.raises(ProblemError, match=name):
        verify_manifest(path)
    assert last_valid(tmp_path) is None


def test_what_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="checkpoint-9"):
        verify_manifest(tmp_path / "checkpoint-9")
    with pytest.raises(ProblemError, match=MANIFEST):
        verify_manifest(write(tmp_path, 3, complete=False))
    assert last_valid(tmp_path) is None and last_valid(tmp_path / "nowhere") is None
    with pytest.raises(ProblemError, match=r"state\.pt: there is no such file"):
        read_state(tmp_path / "state.pt")


def test_the_last_one_is_the_last_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (2, 100, 4, 6):  # 100: of a longer run before
        write(tmp_path, number)
    write(tmp_path, 8, complete=False)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_valid(tmp_path).name == "checkpoint-6"
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    caplog.clear()
    assert last_valid(tmp_path).name == "checkpoint-4"
    assert "checkpoint-6: the file optimizer.pt" in caplog.text
    shutil.copytree(tmp_path, tmp_path / "copy")  # the order survives a copy
    assert last_valid(tmp_path / "copy").name == "checkpoint-4"


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 6, 8, 100]),
        (3, None, [4, 6, 8, 100]),
        (1, None, [8, 100]),
        (1, 2, [2, 8, 100]),
        (3, 2, [2, 6, 8, 100]),
    ],
)
def test_the_oldest_are_deleted_but_the_last_and_the_best(
    tmp_path: Path, limit: int | None, best: int | None, left: Any
) -> None:
    write(tmp_path, 100, complete=False)  # neither counted nor touched
    for number in (2, 4, 6, 8):
        write(tmp_path, number)
    rotate(tmp_path, limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert names(tmp_path) == left
    write(tmp_path, 1)  # the last one, though others have higher numbers
    rotate(tmp_path, 1, None)
    assert names(tmp_path) == [1, 100]


def test_a_state_comes_back(tmp_path: Path) -> None:
    write_state(tmp_path / "new" / "state.pt", STATE)
    state = read_state(tmp_path / "new" / "state.pt")
    assert torch.equal(state.pop("weights"), STATE["weights"])
    assert state == {"steps": [1, 2], "name": "x"}
    assert os.listdir(tmp_path / "new") == ["state.pt"]


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_state_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "state.pt"
    write_state(path, STATE)
    before = path.read_bytes()

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fails == "write":  # the kernel refuses to go on in the middle of the file
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    else:
        monkeypatch.setattr(os, fails, no_space)
    try:
        with pytest.raises(ProblemError, match=r"state\.pt"):
            write_state(path, {"weights": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["state.pt"]


def test_a_truncated_or_changed_state_is_one_error_or_loads(tmp_path: Path) -> None:
    """One error at every length; one or none with a byte changed."""
    path = tmp_path / "state.pt"
    write_state(path, STATE)
    content = path.read_bytes()
    for length in range(0, len(content), 31):
        path.write_bytes(content[:length])
        with pytest.raises(ProblemError, match=r"state\.pt"):
            read_state(path)
    for position in range(0, len(content), 13):
        changed = bytearray(content)
        changed[position] ^= 0x55
        path.write_bytes(changed)
        with suppress(ProblemError):
            read_state(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_state_is_not_executed(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "state.pt"
    hostile = {"weights": torch.ones(2), "trap": Trap(tmp_path / "executed")}
    torch.save(hostile, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ProblemError, match=r"state\.pt"):
        read_state(path)
    assert not (tmp_path / "executed").exists()
