"""Parts of the benchmark on a GPU that go as they should, and that do not."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any


def fine(machine: Any) -> Iterator[dict[str, Any]]:
    yield {"device": machine.device, "n": 1}
    yield {"device": machine.device, "n": 2}


def raises(machine: Any) -> Iterator[dict[str, Any]]:
    yield {"n": 1}
    raise MemoryError("out of memory")


def killed(machine: Any) -> Iterator[dict[str, Any]]:
    yield {"n": 1}
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(machine: Any) -> Iterator[dict[str, Any]]:
    time.sleep(600)
    yield {"n": 1}
