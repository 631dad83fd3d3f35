"""Checkpoints that are whole or are not used: sealed by their files' hashes, never executed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import load as safe_load
from safetensors import SafetensorError

from hyperopt_peft.errors import ProblemError

SEAL = "bilevel.json"
PREFIX = "checkpoint-"
logger = logging.getLogger(__name__)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Write the files of a checkpoint in the body; where that fails, ``folder`` is removed.

    Raises:
        ProblemError: a file could not be written, a full disk for example; names the last
            whole checkpoint.
    """
    try:
        yield
    # torch.save and safetensors have errors of their own kinds for a disk that is full.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise failed(folder, error) from error


def failed(folder: Path, error: Exception) -> ProblemError:
    """What to raise where ``error`` ended the writing of ``folder``, which is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    last = last_valid(folder.parent)
    rest = f"the last whole one is {last}" if last else "there is no earlier one"
    return ProblemError(
        f"{folder}: the checkpoint could not be written ({error}); make room and resume: {rest}"
    )


def seal(folder: Path, record: Mapping[str, Any]) -> None:
    """Declare ``folder`` whole: write the hashes of its files and ``record``, last and at once."""
    files = {path.relative_to(folder).as_posix(): _digest(path) for path in _files(folder)}
    text = json.dumps({**record, "written": time.time(), "files": files}, indent=1)
    temporary = folder / (SEAL + ".part")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / SEAL)


def unseal(folder: Path) -> dict[str, Any]:
    """The record of the checkpoint in ``folder``, whose files are what they were when sealed.

    It has the time at which it was ``written``, in seconds.

    Raises:
        ProblemError: no checkpoint there, or one that is not whole.
    """
    if not folder.is_dir():
        raise ProblemError(f"there is no checkpoint {folder}")
    if not (folder / SEAL).is_file():
        raise ProblemError(
            f"{folder} has no {SEAL}: writing it was interrupted, or another program wrote it; "
            "resume from an earlier checkpoint"
        )
    try:
        record = json.loads((folder / SEAL).read_text())
        files = dict(record.pop("files"))
        record["written"] = float(record["written"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProblemError(
            f"{folder / SEAL} is damaged ({error}); resume from an earlier checkpoint"
        ) from error
    for name, digest in files.items():
        path = folder / name
        if folder.resolve() not in path.resolve().parents or not path.is_file():
            raise ProblemError(f"{folder} lacks the file {name}; resume from an earlier checkpoint")
        if _digest(path) != digest:
            raise ProblemError(
                f"{path} is not what was written (truncated or changed); resume from an earlier "
                "checkpoint"
            )
    return dict(record)


def valid_checkpoints(*folders: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The checkpoints in ``folders`` that `unseal` accepts, with their records; it warns of others.

    The last written one is first: not the one with the highest number, which a longer run may
    have left there before.
    """
    for path in reversed(_in_order(*folders)):
        try:
            record = unseal(path)
        except ProblemError as error:
            logger.warning("skipped %s: %s", path, error)
        else:
            yield path, record


def last_valid(folder: Path) -> Path | None:
    """The last written checkpoint in ``folder`` that `unseal` accepts."""
    return next((path for path, _ in valid_checkpoints(folder)), None)


def to_resume(given: str | bool | None, *folders: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint ``given`` and its record; for True the last whole one in ``folders``.

    Raises:
        ProblemError: there is none there, or `unseal` does not accept it.
    """
    if given is not True:
        return (Path(given), unseal(Path(given))) if given else None
    for found in valid_checkpoints(*folders):
        return found
    raise ProblemError(f"there is no whole checkpoint in {folders[0]}")


def written(folder: Path) -> float:
    """When the checkpoint in ``folder`` was sealed, in seconds; -∞ where that cannot be read."""
    try:
        return float(json.loads((folder / SEAL).read_text())["written"])
    except (OSError, ValueError, KeyError, TypeError):
        return float("-inf")


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete the first written checkpoints in ``folder`` until ``limit`` are left.

    The last one and ``best`` stay. A folder without seal is neither counted nor deleted.
    """
    paths = [path for path in _in_order(folder) if (path / SEAL).is_file()]
    kept = [path for path in paths if best and path.resolve() == Path(best).resolve()]
    spare = [path for path in paths[:-1] if path not in kept]
    surplus = len(paths) - limit if limit and limit > 0 else 0
    for path in spare[: max(0, surplus)]:
        shutil.rmtree(path, ignore_errors=True)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values to the file ``path``, all or nothing.

    Raises:
        ProblemError: the file could not be written; what ``path`` held before is still there.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise ProblemError(f"could not write {path} ({error}); make room for it") from error


def read_state(path: Path) -> Any:
    """What `write_state`, or a Trainer, wrote: tensors and plain values; nothing is executed.

    Raises:
        ProblemError: no file, a truncated one, or a pickle that would run code.
    """
    try:
        return safe_load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ProblemError(f"there is no checkpoint {path}") from error
    except pickle.UnpicklingError as error:
        raise ProblemError(
            f"{path} is truncated or asks to run code; it was not loaded. Use a checkpoint of your "
            "own"
        ) from error
    # A damaged file ends the unpickler in errors of any kind.
    except Exception as error:
        raise ProblemError(f"{path} is damaged ({error}); use an earlier checkpoint") from error


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(SEAL))


def _in_order(*folders: Path) -> list[Path]:
    """The checkpoints as they were written; those without a readable seal first."""
    found = (path for folder in folders for path in folder.glob(f"{PREFIX}*"))
    paths = [path for path in found if path.name[len(PREFIX) :].isdigit()]
    return sorted(paths, key=lambda path: (written(path), int(path.name[len(PREFIX) :])))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
