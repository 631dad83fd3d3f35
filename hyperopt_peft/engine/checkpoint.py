"""Checkpoints with a manifest, so that an incomplete one is never used.

The manifest, a JSON file with the hashes of all other files, is written last. A checkpoint is
complete if its files have these hashes. Reading a file executes no code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hyperopt_peft.errors import ProblemError

MANIFEST = "bilevel.json"
PREFIX = "checkpoint-"
logger = logging.getLogger(__name__)


def failed(folder: Path, error: Exception) -> ProblemError:
    """Remove ``folder``, which could not be written; returns the exception to raise."""
    shutil.rmtree(folder, ignore_errors=True)
    last = last_valid(folder.parent)
    rest = f"the last complete one is {last}" if last else "there is no earlier one"
    return ProblemError(
        f"{folder}: the checkpoint could not be written ({error}); make room and resume: {rest}"
    )


def write_manifest(folder: Path, record: Mapping[str, Any]) -> None:
    """Declare ``folder`` complete: write the hashes of its files and ``record`` to the manifest.

    The manifest appears by an atomic rename, so that an interrupted write leaves none.
    """
    paths = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(MANIFEST)]
    files = {path.relative_to(folder).as_posix(): _digest(path) for path in sorted(paths)}
    text = json.dumps({**record, "written": time.time(), "files": files}, indent=1)
    temporary = folder / (MANIFEST + ".part")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)


def verify_manifest(folder: Path) -> dict[str, Any]:
    """The record in the manifest of ``folder``, after a check of the hashes of all files.

    ``"written"`` is the time of writing in seconds. A check that fails raises ProblemError.
    """
    if not (folder / MANIFEST).is_file():
        raise ProblemError(
            f"{folder}: no file {MANIFEST} (there is no such folder, writing was interrupted, or "
            "another program wrote it); resume from another checkpoint"
        )
    try:
        record = json.loads((folder / MANIFEST).read_text())
        files = dict(record.pop("files"))
        record["written"] = float(record["written"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProblemError(
            f"{folder / MANIFEST}: the file is damaged ({error}); resume from an earlier checkpoint"
        ) from error
    for name, digest in files.items():
        path = folder / name
        inside = folder.resolve() in path.resolve().parents
        if not inside or not path.is_file() or _digest(path) != digest:
            raise ProblemError(
                f"{folder}: the file {name} is missing, truncated or changed; resume from an "
                "earlier checkpoint"
            )
    return dict(record)


def valid_checkpoints(*folders: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The complete checkpoints in ``folders`` with their records, the newest first.

    The order is by time of writing, since an earlier run may have left higher numbers. An
    incomplete checkpoint is skipped with a warning.
    """
    for path in reversed(_in_order(*folders)):
        try:
            record = verify_manifest(path)
        except ProblemError as error:
            logger.warning("skipped %s", error)
        else:
            yield path, record


def last_valid(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, or None."""
    return next((path for path, _ in valid_checkpoints(folder)), None)


def to_resume(path: str | bool | None, *folders: Path) -> tuple[Path, dict[str, Any]] | None:
    """The complete checkpoint to resume from, and its record; None for a new run.

    ``path`` is a checkpoint, True for the newest complete one in ``folders``, or None.
    """
    if path is not True:
        return (Path(path), verify_manifest(Path(path))) if path else None
    if (last := next(valid_checkpoints(*folders), None)) is not None:
        return last
    raise ProblemError(
        f"{folders[0]}: there is no complete checkpoint; give the path of one, or start a new run"
    )


def written(folder: Path) -> float:
    """The time in seconds at which the manifest was written; -∞ if it cannot be read."""
    try:
        return float(json.loads((folder / MANIFEST).read_text())["written"])
    except (OSError, ValueError, KeyError, TypeError):
        return float("-inf")


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints in ``folder`` until ``limit`` are left; None keeps all.

    The newest checkpoint and ``best`` are never deleted. A folder without a manifest is ignored.
    """
    paths = [path for path in _in_order(folder) if (path / MANIFEST).is_file()]
    candidates = [p for p in paths[:-1] if best is None or p.resolve() != Path(best).resolve()]
    surplus = len(paths) - limit if limit and limit > 0 else 0
    for path in candidates[: max(0, surplus)]:
        shutil.rmtree(path, ignore_errors=True)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values to the file ``path`` atomically, or raise ProblemError."""
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
        raise ProblemError(f"{path}: the file could not be written ({error}); make room") from error


def read_state(path: Path) -> Any:
    """The tensors and plain values in a file, or ProblemError; no code is executed."""
    from accelerate.utils import load  # a slow import that only a resumed run needs

    try:
        return load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ProblemError(f"{path}: there is no such file; give the path of another") from error
    except Exception as error:  # a damaged file makes the unpickler raise exceptions of any kind
        raise ProblemError(
            f"{path}: the file is damaged or would execute code, and was not loaded; use an "
            "earlier checkpoint that you wrote yourself"
        ) from error


def _in_order(*folders: Path) -> list[Path]:
    """The checkpoints by time of writing; those without a readable manifest come first."""
    matches = (path for folder in folders for path in folder.glob(f"{PREFIX}*"))
    paths = [path for path in matches if path.name[len(PREFIX) :].isdigit()]
    return sorted(paths, key=lambda path: (written(path), int(path.name[len(PREFIX) :])))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
