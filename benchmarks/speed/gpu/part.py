"""One part of the benchmark on a GPU, in a process of its own.

    python -m benchmarks.speed.gpu.part MODULE:FUNCTION MACHINE FILE

Each row is a line of JSON in FILE as soon as it is measured.
"""

from __future__ import annotations

import json
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.gpu.machine import Machine


def main() -> None:
    """Write the GPU's memory in use, then the rows; an error is the last line."""
    words, case, path = sys.argv[1:]
    machine = Machine(**json.loads(case))
    torch.set_num_threads(machine.threads)
    with Path(path).open("w") as file:

        def write(row: dict[str, Any]) -> None:
            print(json.dumps(row), file=file, flush=True)

        try:
            if machine.device != "cpu":
                free, total = torch.cuda.mem_get_info()
                write({"course": {"before, MB": (total - free) / 2**20}})
            module, _, function = words.partition(":")
            for row in getattr(import_module(module), function)(machine):
                write(row)
        except Exception as error:
            traceback.print_exc()
            write({"course": {"error": f"{type(error).__name__}: {str(error)[:300]}"}})
            sys.exit(1)


if __name__ == "__main__":
    main()
