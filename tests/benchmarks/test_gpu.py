"""The benchmark on a GPU, tried on the CPU: each part, and parts that fail."""

import json
import os
import signal
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed import report
from benchmarks.speed.gpu import PARTS, Part, run
from benchmarks.speed.gpu.machine import Machine

#: The rest takes a few seconds, and is tried without ``-m slow``.
MARKS: dict[str, Any] = dict.fromkeys(
    ("layer", "step", "levels", "attribution", "4-bit"), pytest.mark.slow
)
CPU = Machine("cpu", small=True, threads=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(x, marks=MARKS.get(x, [])) for x in PARTS])
def test_a_part_makes_a_table(name: str) -> None:
    """Of rows with the same columns, which JSON holds."""
    part = PARTS[name]
    if part.missing:
        pytest.skip(part.missing)
    module, _, function = part.function.partition(":")
    rows = list(getattr(import_module(module), function)(CPU))
    assert rows and all(row.keys() == rows[0].keys() for row in rows)
    assert json.loads(json.dumps(rows)) == rows
    for row in rows:
        assert row.get("result", "done") == "done"
        for column in ("with − without", "again"):
            assert row.get(column) in (None, 0.0)


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


def test_a_part_that_fails_costs_only_itself(tmp_path: Path, capsys: Any) -> None:
    parts = {
        name: Part(name, f"{__name__}:{name}", 0.2 if name == "hangs" else 60)
        for name in ("raises", "hangs", "killed", "fine")
    }
    parts["missing"] = Part("missing", f"{__name__}:fine", 60, ("a_package",))
    path = tmp_path / "speed_gpu.json"
    run(parts, CPU, path)
    content = json.loads(path.read_text())
    reason = "a_package is not installed"
    assert content["left out"] == {"missing": reason}
    assert capsys.readouterr().out.startswith(f"left out: missing: {reason}")
    assert content["tables"]["fine"] == [{"device": "cpu", "n": n} for n in (1, 2)]
    assert content["tables"]["raises"] == content["tables"]["killed"] == [{"n": 1}]
    errors = {name: course.get("error") for name, course in content["parts"].items()}
    assert errors.pop("fine") is None and errors.pop("raises") == "MemoryError: out of memory"
    assert errors["hangs"].startswith("stopped after") and errors["killed"].startswith("ended")
    page = report.of_gpu(path)
    assert "**fine**" in page and f"- missing: {reason}" in page and "- raises: MemoryError" in page


def test_without_a_file_the_page_says_that_nothing_was_measured(tmp_path: Path) -> None:
    assert "Nothing" in report.of_gpu(tmp_path / "speed_gpu.json")
