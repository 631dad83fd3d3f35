"""What do the two levels cost on a language model: memory and time of lower and upper steps?

    python benchmarks/speed language                  # the 100M model; half an hour
    python benchmarks/speed language --shapes 1B

Untrained models of Llama's shapes with LoRA (r = 16, all linear layers), `Sources` on two
sources and trusted rows, bf16. *Memory*: 8 × 128 tokens at each level, each program in a
process of its own, the peak of its resident memory above that of the loaded model, of a run of
lower steps alone and of a run with upper steps. *Time*: ten lower steps and an upper one, by
eleven steps of `transformers.Trainer`; the programs take turns in one process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from benchmarks.measure import arguments, report, rounds, table_of, wait
from benchmarks.pages import RESULTS, ROOT
from benchmarks.speed import llama

#: An estimator, whose lower steps alone are measured too.
ESTIMATORS = ("direct", "darts:product=dots", "darts")
DOTS = ESTIMATORS[1]
TIMED = (DOTS, "darts")
#: Steps of a timed run, the last of which is an upper step too.
LOWER = 10
PLAIN = f"{LOWER + 1} plain steps"
#: The lower steps of the same method without an upper level.
ALONE = f"{LOWER + 1} lower steps alone"
Row = dict[str, Any]


class Meter(TrainerCallback):  # type: ignore[misc]
    """The seconds of a run's steps, and its memory in MB, the GPU's or the process's.

    Attributes:
        before: the memory before the first step.
        peak: the peak above it.
        seconds: from the first step to the end of the last one.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def on_train_begin(self, *arguments: Any, **more: Any) -> None:
        """Count memory from here on."""
        self.begin: float | None = None
        if self.device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts
            self.before = resident("VmRSS")
            return
        wait(self.device)
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated() / 2**20

    def on_step_begin(self, *arguments: Any, **more: Any) -> None:
        """Count seconds from the first step on."""
        if self.begin is None:
            wait(self.device)
            self.begin = time.perf_counter()

    def on_train_end(self, *arguments: Any, **more: Any) -> None:
        """Read both."""
        assert self.begin is not None
        wait(self.device)
        self.seconds = time.perf_counter() - self.begin
        cpu = self.device == "cpu"
        peak = resident("VmHWM") if cpu else torch.cuda.max_memory_allocated() / 2**20
        self.peak = peak - self.before


def resident(name: str) -> float:
    """An entry of this process's memory, in MB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def peak_here(case: Row) -> float:
    """The peak of two steps of a program, in MB; ``estimator`` None has lower steps alone."""
    options = {"max_steps": 2, "lower_steps": 1, "gradient_checkpointing": case["checkpointing"]}
    model, meter = llama.adapted(llama.base(case["shape"])), Meter()
    sizes = {name: case[name] for name in ("size", "length")}
    trainer = llama.sources(case["shape"], model, case["estimator"], **sizes, **options)
    trainer.add_callback(meter)
    trainer.train()
    return meter.peak


def peak_of(case: Row) -> float | None:
    """`peak_here`, in a process of its own; None where it fails, which is printed."""
    command = [sys.executable, str(ROOT / "benchmarks/speed"), "language", "--case"]
    done = subprocess.run([*command, json.dumps(case)], capture_output=True, text=True)
    if done.returncode:
        print(case, *done.stderr.strip().splitlines()[-1:], flush=True)
        return None
    return float(done.stdout.splitlines()[-1])


def memory(shape: str, checkpointing: bool, sizes: Row, estimators: Sequence[str]) -> list[Row]:
    """A row for each estimator: the peak of a lower and of an upper step, and their ratio."""
    case = {"shape": shape, "checkpointing": checkpointing, **sizes}
    lower, *upper = (peak_of({**case, "estimator": name}) for name in (None, *estimators))
    return [
        {
            "model": shape,
            "checkpointing": "yes" if checkpointing else "no",
            "estimator": name,
            "lower step, MB": lower,
            "upper step, MB": peak,
            "÷": peak / lower if peak and lower else None,
        }
        for name, peak in zip(estimators, upper, strict=True)
    ]


def run(name: str, shape: str, model: Any, sizes: Row, device: str = "cpu") -> Meter:
    """A run of `PLAIN`, of `ALONE`, or of ten lower steps and an upper one by ``name``."""
    trainer: Trainer
    options = {**sizes, "device": device, "gradient_checkpointing": True, "max_steps": LOWER + 1}
    if name == PLAIN:
        trainer = llama.plain(shape, model, **options)
    elif name == ALONE:
        trainer = llama.sources(shape, model, None, **options)
    else:
        options |= {"max_steps": LOWER, "lower_steps": LOWER}
        trainer = llama.sources(shape, model, name, **options)
    meter = Meter(device)
    trainer.add_callback(meter)
    trainer.train()
    return meter


def steps(shape: str, sizes: Row, estimators: Sequence[str], repeats: int) -> list[Row]:
    """Ten lower steps and an upper one of each estimator, by eleven plain steps."""
    model, names = llama.adapted(llama.base(shape)), (PLAIN, *estimators)
    one = lambda name: run(name, shape, model, sizes).seconds  # noqa: E731
    words = {name: f"{LOWER} lower steps and an upper one, {name}" for name in estimators}
    return [
        {"model": shape, **row, "run": words.get(row["run"], row["run"])}
        for row in table_of(rounds(names, one, repeats, warmup=0), PLAIN)
    ]


def main() -> None:
    """Measure, print, and write JSON where asked for."""
    if "--case" in sys.argv:  # a process of `peak_of`
        torch.set_num_threads(1)
        print(peak_here(json.loads(sys.argv[-1])))
        return
    options = arguments("memory and time of steps on language models", shapes=["100M", "1B"])
    quick = options.quick
    if not quick and options.json is None:
        options.json = RESULTS / "speed_language.json"
    sizes = {"size": 2, "length": 8} if quick else {"size": 8, "length": 128}
    timed_sizes = sizes if quick else {"size": 4, "length": 64}
    estimators, timed = ((DOTS,), (DOTS,)) if quick else (ESTIMATORS, TIMED)
    peaks, times = [], []
    for shape in ("tiny",) if quick else options.shapes:
        for checkpointing in (False, True):
            peaks += memory(shape, checkpointing, sizes, estimators)
        times += steps(shape, timed_sizes, timed, 1 if quick else 3)
    tables = {"Peak of memory above the model's": peaks, "Time, checkpointing": times}
    report(options, tables, sizes)
