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
from functools import partial
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


class Peak(TrainerCallback):  # type: ignore[misc]
    """The memory before training and the peak above it, in MB: the GPU's or the process's."""

    before: float
    value: float

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def on_train_begin(self, *arguments: Any, **more: Any) -> None:
        """Count from here on."""
        if self.device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts
            self.before = resident("VmRSS")
            return
        wait(self.device)
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated() / 2**20

    def on_train_end(self, *arguments: Any, **more: Any) -> None:
        """Read the peak."""
        cpu = self.device == "cpu"
        peak = resident("VmHWM") if cpu else torch.cuda.max_memory_allocated() / 2**20
        self.value = peak - self.before


def resident(name: str) -> float:
    """An entry of this process's memory, in MB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measured(case: Row) -> Row:
    """The peak of two steps of a program; ``estimator`` None has lower steps alone."""
    shape, estimator = case["shape"], case["estimator"]
    options = {"max_steps": 2, "gradient_checkpointing": case["checkpointing"]}
    model = llama.adapted(llama.base(shape))
    sizes = case["size"], case["length"]
    trainer = llama.sources(shape, model, estimator, *sizes, lower_steps=1, **options)
    peak = Peak()
    trainer.add_callback(peak)
    trainer.train()
    return {"MB": peak.value}


def peak_of(case: Row) -> float | None:
    """`measured`, in a process of its own, in MB; None where it fails, which is printed."""
    command = [sys.executable, str(ROOT / "benchmarks/speed"), "language", "--case"]
    done = subprocess.run([*command, json.dumps(case)], capture_output=True, text=True)
    if done.returncode:
        print(case, *done.stderr.strip().splitlines()[-1:], flush=True)
        return None
    value: float = json.loads(done.stdout.splitlines()[-1])["MB"]
    return value


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


class Clock(TrainerCallback):  # type: ignore[misc]
    """The seconds from the first step of a run to the end of the last one."""

    begin: float | None = None
    seconds: float

    def on_step_begin(self, args: Any, *arguments: Any, **more: Any) -> None:
        """Begin with the first step."""
        if self.begin is None:
            wait(args.device.type)
            self.begin = time.perf_counter()

    def on_train_end(self, args: Any, *arguments: Any, **more: Any) -> None:
        """End with the last one."""
        assert self.begin is not None
        wait(args.device.type)
        self.seconds = time.perf_counter() - self.begin


def seconds_of(trainer: Trainer, *callbacks: TrainerCallback) -> float:
    """The seconds from the first step of ``trainer`` to the end of its last one."""
    clock = Clock()
    for callback in (clock, *callbacks):
        trainer.add_callback(callback)
    trainer.train()
    return clock.seconds


def run_seconds(
    name: str, shape: str, model: Any, sizes: Row, *callbacks: TrainerCallback
) -> float:
    """The seconds of `PLAIN`, of `ALONE`, or of ten lower steps and an upper one by ``name``."""
    trainer: Trainer
    options = {**sizes, "gradient_checkpointing": True, "max_steps": LOWER + 1}
    if name == PLAIN:
        trainer = llama.plain(shape, model, **options)
    elif name == ALONE:
        trainer = llama.sources(shape, model, None, **options)
    else:
        options |= {"max_steps": LOWER, "lower_steps": LOWER}
        trainer = llama.sources(shape, model, name, **options)
    return seconds_of(trainer, *callbacks)


def steps(shape: str, sizes: Row, estimators: Sequence[str], repeats: int) -> list[Row]:
    """Ten lower steps and an upper one of each estimator, by eleven plain steps."""
    model, one = llama.adapted(llama.base(shape)), partial(run_seconds, shape=shape, sizes=sizes)
    names = (PLAIN, *estimators)
    seconds = rounds(names, lambda name: one(name, model=model), repeats, warmup=0)
    words = {name: f"{LOWER} lower steps and an upper one, {name}" for name in estimators}
    return [
        {"model": shape, **row, "run": words.get(row["run"], row["run"])}
        for row in table_of(seconds, PLAIN)
    ]


def main() -> None:
    """Measure, print, and write JSON where asked for."""
    if "--case" in sys.argv:  # a process of `in_a_process`
        torch.set_num_threads(1)
        print(json.dumps(measured(json.loads(sys.argv[-1]))))
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
