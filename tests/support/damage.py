"""Files that are damaged or hostile, and a disk that is full."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


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


def no_space(*args: Any) -> None:
    """In place of a function of ``os``: the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
