"""Killed at random moments and resumed: does a run end as if nothing had happened, bit for bit?

    python benchmarks/faults.py --json faults.json --kills 40 --seed 0

Each run is a process of its own, forked from this one, and ended by SIGKILL: at a moment drawn
from its whole length, every other time at one drawn from the writing of its next checkpoint. Then
a new process goes on from the last complete checkpoint, and may be killed again. The end result is
held against a run that was left alone: variables, optimizer, schedule and logs.

The second table damages a checkpoint, or the disk below it, or the numbers: the run must end in one
ProblemError (NonFiniteError for numbers), run nothing that a file holds, and go on from the
checkpoint before, to the same end.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from damages import FULL, NUMBERS, OTHER, Change, Job, damages, resume_from
from measure import Target, arguments, report
from small_runs import RUNS, Final, Run, being_written, trainer_run
from torch import Tensor

from hyperopt_peft.engine.checkpoint import read_state, write_state, written

FINAL, LOG = "final.pt", "log.txt"
Row = dict[str, Any]


class Child:
    """A process forked from this one that does ``job`` in ``folder`` and writes how it ended."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.folder, self.started = folder, time.time()
        (folder / FINAL).unlink(missing_ok=True)
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            _work(job, folder, writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            pipe.read(1)  # returns when the first step is near, or the child has ended
        self.ready = time.time()

    def running(self) -> bool:
        """Whether it has not ended; one that failed is an error here too."""
        if self.pid and os.waitpid(self.pid, os.WNOHANG)[0]:
            self.pid = 0
            if not (self.folder / FINAL).exists():
                raise RuntimeError(f"a run failed:\n{(self.folder / LOG).read_text()}")
        return self.pid != 0

    def finish(self) -> Final:
        """Wait for the end, and read it."""
        while self.running():
            time.sleep(0.001)
        final: Final = read_state(self.folder / FINAL)
        return final

    def kill(self, delay: float, into_save: float | None) -> bool:
        """SIGKILL after ``delay`` seconds, or that far into the save that follows; was it alive?"""
        time.sleep(delay)
        if into_save is not None:
            begin = time.time()
            while self.running() and not being_written(self.folder, begin):
                time.sleep(0.0002)
            time.sleep(into_save)
        if not self.running():
            return False
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        # It may have ended in that very moment.
        return not (self.folder / FINAL).exists()


def _work(job: Job, folder: Path, writer: int) -> None:
    """What a child does; it never returns."""

    def ready() -> None:
        with suppress(BrokenPipeError):  # nobody waits for the second phase
            os.write(writer, b".")

    try:
        log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        write_state(folder / FINAL, job(folder, ready))
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    os._exit(0)


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two structures of tensors and plain values are not equal bit by bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for k, pair in enumerate(zip(a, b)) for d in differences(*pair, f"{where}/{k}")]
    return [] if type(a) is type(b) and (a == b or (a != a and b != b)) else [where]


def kills(
    total: int, seed: int, runs: Sequence[Run] = RUNS, a_run: int = 3
) -> tuple[list[Row], list[Row]]:
    """Runs of all kinds, each killed up to ``a_run`` times, until ``total`` kills are done.

    Returns a row for each kind of run, and a record of each run.
    """
    draw = random.Random(seed)
    expected: dict[str, Final] = {}
    seconds: dict[str, float] = {}
    records: list[Row] = []
    done = 0
    while done < total:
        run = runs[len(records)] if len(records) < len(runs) else draw.choice(runs)
        with tempfile.TemporaryDirectory() as name:
            if run.name not in expected:
                folder = Path(name) / "alone"
                folder.mkdir()
                child = Child(run.train, folder)
                expected[run.name] = child.finish()
                seconds[run.name] = time.time() - child.ready
            folder = Path(name) / "killed"
            folder.mkdir()
            record: Row = {"driver": run.driver, "run": run.name, "during a save": 0, "from": []}
            for _ in range(min(draw.randint(1, a_run), total - done)):
                delay = draw.uniform(0, 0.9 * seconds[run.name])
                into_save = draw.uniform(0, 0.02) if draw.random() < 0.5 else None
                child = Child(run.train, folder)
                if not child.kill(delay, into_save):
                    break
                done += 1
                record["during a save"] += being_written(folder, child.started)
                record["from"].append(run.position(folder))
            record["different"] = differences(Child(run.train, folder).finish(), expected[run.name])
            records += [record] if record["from"] else []
    return [_row(run, [r for r in records if r["run"] == run.name]) for run in runs], records


def _row(run: Run, records: list[Row]) -> Row:
    positions = [position for record in records for position in record["from"]]
    return {
        "driver": run.driver,
        "run": run.name,
        "runs": len(records),
        "kills": len(positions),
        "during a save": sum(record["during a save"] for record in records),
        "begun anew": positions.count(None),
        "different checkpoints resumed": len({p for p in positions if p}),
        "identical": sum(not record["different"] for record in records),
    }


def faults(quick: bool) -> tuple[list[Row], list[Row]]:
    """Each fault once, or one of each kind where ``quick``: a row for each kind, a record for each.

    The run goes on afterwards, and ends as one without a fault.
    """
    records: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        base, marker = Path(name) / "base", Path(name) / "executed"
        base.mkdir()
        expected = Child(trainer_run, base).finish()
        last = max(base.glob("checkpoint-*"), key=written)
        cases: list[tuple[str, str, Job, Change | None]] = [
            (kind, detail, resume_from(last.name), change)
            for kind, detail, change in damages(last, marker)
        ]
        cases += [("other settings", key, job, shutil.rmtree) for key, job in OTHER.items()]
        cases += [("a full disk", key, job, None) for key, job in FULL.items()]
        cases += [("not finite", key, job, None) for key, job in NUMBERS.items()]
        for kind, detail, job, change in cases:
            if quick and any(record["fault"] == kind for record in records):
                continue
            folder = Path(name) / "damaged"
            if change is None:
                folder.mkdir()
            else:
                shutil.copytree(base, folder, ignore=shutil.ignore_patterns(FINAL))
                change(folder / last.name)
            found = Child(job, folder).finish()
            different = differences(Child(trainer_run, folder).finish(), expected)
            record = {"fault": kind, "detail": detail, **found, "different": different}
            record["message"] = found["message"].replace(f"{folder}/", "")
            record["executed"] = marker.exists()
            records.append(record)
            shutil.rmtree(folder)
    rows = []
    for kind in dict.fromkeys(record["fault"] for record in records):
        of = [record for record in records if record["fault"] == kind]
        error = "NonFiniteError" if kind == "not finite" else "ProblemError"
        rows.append(
            {
                "fault": kind,
                "cases": len(of),
                "one clear error": sum(record["error"] == error for record in of),
                "code executed": sum(record["executed"] for record in of),
                "goes on, identical": sum(not record["different"] for record in of),
            }
        )
    return rows, records


def main() -> None:
    """Kill, resume, compare; print, and write JSON where asked for."""
    given = arguments("runs that are killed and resumed, and damaged checkpoints", kills=40, seed=0)
    total = min(given.kills, 6) if given.quick else given.kills
    rows, records = kills(total, given.seed)
    targets = [Target("kills by SIGKILL", sum(r["kills"] for r in rows), total, at_least=True)]
    for driver in ("Trainer", "Engine"):
        of = [row for row in rows if row["driver"] == driver]
        identical, runs = (sum(row[key] for row in of) for key in ("identical", "runs"))
        name = f"{driver}: runs bit-identical after SIGKILL"
        targets.append(Target(name, identical, runs, at_least=True))
    damaged, faulty = faults(given.quick)
    cases = sum(row["cases"] for row in damaged)
    for key in ("one clear error", "goes on, identical"):
        targets.append(Target(f"Faults: {key}", sum(r[key] for r in damaged), cases, at_least=True))
    targets.append(Target("Faults: code executed", sum(r["code executed"] for r in damaged), 0))
    tables = {"Killed and resumed": rows, "Faults": damaged}
    report(given, tables, targets, {"runs": records, "faults": faulty})


if __name__ == "__main__":
    main()
