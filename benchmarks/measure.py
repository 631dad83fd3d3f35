"""What the benchmarks share: interleaved timing, kept memory, tables and JSON."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_peft.utils.versions import versions

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "betty-ml",
    "torchopt",
    "trl",
    "bitsandbytes",
    "flash_attn",
)


def arguments(description: str, **more: int | list[str]) -> argparse.Namespace:
    """Parse ``--json FILE``, ``--quick``, ``--threads N`` and ``--device``, and set the threads.

    ``more`` has further options with their defaults: False, an integer, or a list of names.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--quick", action="store_true", help="under a minute, for a first look")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    for name, default in more.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true")
            continue
        names = {"nargs": "+", "choices": default} if isinstance(default, list) else {"type": int}
        parser.add_argument(f"--{name}", default=default, **names)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """The seconds of each run in ``repeats`` rounds, which take all runs in turn."""

    def timed(name: str) -> float:
        wait(device)
        begin = clock()
        runs[name]()
        wait(device)
        return clock() - begin

    return rounds(list(runs), timed, repeats, warmup)


def rounds(
    names: Sequence[str], seconds_of: Callable[[str], float], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """As `interleaved`, for runs that return their own seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-warmup, repeats):
        for name in names:
            of_run = seconds_of(name)
            if repeat >= 0:
                seconds[name].append(of_run)
    return seconds


def keep_memory() -> bool:
    """Make the C library keep freed memory from now on; False if the library is not glibc.

    By default glibc returns the free top of its heap to the system. A later training step may then
    pay for page faults, about 2 µs for 4 KiB, depending on the heap's layout.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    trim_threshold, mmap_max = -1, -4  # malloc.h
    return bool(library.mallopt(mmap_max, 0) and library.mallopt(trim_threshold, 2**31 - 1))


def wait(device: str) -> None:
    """Wait for the work of a GPU."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def ratio(seconds: Mapping[str, Sequence[float]], name: str, unit: str) -> float:
    """The median, over the rounds, of the time of ``name`` divided by the time of ``unit``."""
    pairs = zip(seconds[name], seconds[unit], strict=True)
    return statistics.median(one / other for one, other in pairs)


def table_of(seconds: Mapping[str, Sequence[float]], unit: str) -> list[dict[str, Any]]:
    """A row for each run: the median of its seconds, and its `ratio` to ``unit``."""
    return [
        {"run": name, "s": statistics.median(each), f"÷ {unit}": ratio(seconds, name, unit)}
        for name, each in seconds.items()
    ]


def kept_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once.

    The module's own parameters and buffers do not count.
    """
    owned = {x.untyped_storage()._cdata for x in (*module.parameters(), *module.buffers())}
    tensors: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def keep(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        tensors.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        result = forward()
    # Tensors of a part of the graph that has been freed (a detached norm) are gone by now.
    storages = [saved.tensor.untyped_storage() for saved in tensors]
    total = sum({x._cdata: x.nbytes() for x in storages if x._cdata not in owned}.values())
    del result
    return total


class _Saved:
    """A tensor for as long as autograd holds it."""

    def __init__(self, tensor: Tensor) -> None:
        # Detached: a node that kept its own output with its graph would never be freed.
        self.tensor = tensor.detach()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of rows with the same keys."""
    heads = list(rows[0])
    cells = [[_cell(row[head]) for head in heads] for row in rows]
    widths = [max(len(head), *(len(line[i]) for line in cells)) for i, head in enumerate(heads)]
    lines = [heads, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def report(
    options: argparse.Namespace,
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    details: Mapping[str, Any] | None = None,
) -> None:
    """Print the tables; write them with versions and machine where asked for."""
    show(tables)
    if options.json is not None:
        content = {
            "tables": {title: list(rows) for title, rows in tables.items()},
            "details": dict(details or {}),
            **environment(options.device),
            "quick": options.quick,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def show(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print the tables."""
    for title, rows in tables.items():
        print(f"\n{title}\n\n{table(rows)}")


def environment(device: str = "cpu") -> dict[str, Any]:
    """The versions of the packages, the commit of this one, and the machine."""
    return {
        "versions": versions(PACKAGES),
        "commit": _commit(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": device,
            "name": torch.cuda.get_device_name() if device != "cpu" else None,
            "python": platform.python_version(),
        },
    }


def _commit() -> str | None:
    """The commit of this clone, "-dirty" with changes; an installed version may be of another."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None


def run_script(folder: str, scripts: Mapping[str, str]) -> None:
    """Run the script of a folder that the first argument names, with the others.

    Args:
        scripts: what each script measures, by its name.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in scripts:
        lines = "\n".join(f"  {key:<12} {words}" for key, words in scripts.items())
        print(f"usage: python benchmarks/{folder} SCRIPT [--help]\n\n{lines}")
        raise SystemExit(0 if name in ("-h", "--help") else 2)
    sys.argv[:2] = [f"benchmarks/{folder} {name}"]
    importlib.import_module(f"benchmarks.{folder}.{name}").main()
