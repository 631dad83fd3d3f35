"""Runs that SIGKILL ends at random moments and that go on from their last whole checkpoint.

python -m tests.support.killed SEED KILLS NAME

Prints how often the run was killed, and where its end differs from that of a run left alone. A
process of its own, since it forks: each run is a child of it.
"""

import json
import logging
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from hyperopt_peft import Engine
from hyperopt_peft.engine.checkpoint import MANIFEST, last_valid, read_state, write_state
from tests.support.networks import differences, network_levels
from tests.support.resume import end, logs_of, saving
from tests.support.trainers import data

FINAL, STATE = "final.pt", "engine.pt"
FORK = multiprocessing.get_context("fork")
Ready = Callable[[], object]


class Begin(TrainerCallback):
    def __init__(self, ready: Ready) -> None:
        self.ready = ready

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.ready()


def of_trainer(folder: Path, ready: Ready, **settings: Any) -> dict[str, Any]:
    common = {"max_steps": 18, "logging_steps": 1}
    options = {"eval_dataset": data(rows=9, seed=1)}
    made = saving(folder, [Begin(ready)], options=options, **{**common, **settings})
    made.train(resume_from_checkpoint=last_valid(folder) is not None)
    return {**end(made), "logs": logs_of(made)}


def of_engine(folder: Path, ready: Ready, steps: int = 100) -> dict[str, Any]:
    transformers.set_seed(0)
    path = folder / STATE

    def save(engine: Engine, record: dict[str, Any]) -> None:
        if record["step"] % 10 == 0:
            engine.save(path)

    options = {"lower_steps": 2, "callbacks": [save], "progress": False}
    engine = Engine(*network_levels(), "unrolled:steps=2", **options)
    ready()
    if path.exists():
        engine.load(path)
    engine.run(steps - engine.step)
    return engine.state_dict()


RUNS: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "retraining from scratch, two micro-batches": (
        of_trainer,
        {"retrain": "scratch", "gradient_accumulation_steps": 2, "max_steps": 12},
    ),
    "cg, best model, two checkpoints": (
        of_trainer,
        {
            "hypergradient": "cg:steps=2,damping=1.0",
            "eval_strategy": "steps",
            "eval_steps": 3,
            "load_best_model_at_end": True,
            "save_total_limit": 2,
        },
    ),
    "Engine, unrolled": (of_engine, {}),
}


class Child:
    """A process forked from this one that trains in ``folder`` and writes how it ended."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder, started = folder, FORK.Event()
        self.process = FORK.Process(target=self._work, args=(name, started.set))
        self.process.start()
        while self.process.is_alive() and not started.wait(0.01):
            pass  # until the first step is near

    def _work(self, name: str, ready: Ready) -> None:
        train, settings = RUNS[name]
        write_state(self.folder / FINAL, train(self.folder, ready, **settings))

    def finish(self) -> Any:
        self.process.join()
        assert self.process.exitcode == 0, "the run failed, see above"
        return read_state(self.folder / FINAL)

    def kill(self, delay: float, into_save: float | None) -> bool:
        """SIGKILL after ``delay`` seconds, or that far into the save that follows; was it alive?"""
        time.sleep(delay)
        if into_save is not None:
            begin = time.time()
            while self.process.is_alive() and not being_written(self.folder, begin):
                time.sleep(0.0002)
            time.sleep(into_save)
        self.process.kill()
        self.process.join()
        assert self.process.exitcode in (0, -signal.SIGKILL), "the run failed, see above"
        return not (self.folder / FINAL).exists()


def being_written(folder: Path, since: float) -> bool:
    """Whether a checkpoint is unfinished to which something was written after ``since``."""
    paths = [p for p in folder.glob("**/checkpoint-*") if not (p / MANIFEST).exists()]
    paths += folder.glob("*.part")
    with suppress(FileNotFoundError):  # finished by now
        return any(path.stat().st_mtime > since for path in paths)
    return False


def killed(name: str, kills: int, draw: random.Random) -> dict[str, Any]:
    """Train alone; then train again, killed ``kills`` times, every other time in a save."""
    with tempfile.TemporaryDirectory() as folder:
        alone, broken = Path(folder) / "alone", Path(folder) / "broken"
        alone.mkdir()
        broken.mkdir()
        child, begin = Child(name, alone), time.time()
        expected, seconds = child.finish(), time.time() - begin
        done = 0
        while done < kills:
            into_save = draw.uniform(0, 0.02) if done % 2 == 0 else None
            done += Child(name, broken).kill(draw.uniform(0, 0.3 * seconds), into_save)
            if (broken / FINAL).exists():
                break
        result = Child(name, broken).finish()
        return {"kills": done, "different": differences(result, expected)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("hyperopt_peft").setLevel(logging.ERROR)  # a killed checkpoint is skipped
    source = random.Random(int(sys.argv[1]))
    result = killed(sys.argv[3], int(sys.argv[2]), source)
    sys.stderr.flush()
    print(json.dumps(result))
