"""A run is stored by what it depends on: its own method, and what all methods share."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hyperopt_peft import Method, ProblemError
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import Price, Run, Task
from hyperopt_peft.utils.plugins import import_file
from tests.support.comparisons import compared

#: Files of four methods, two of which are in one file, and two files that these import.
FILES = {
    "store_scale.py": "SCALE = 1.0",
    "store_base.py": """
from hyperopt_peft import Method

class Base(Method):
    defaults = {"weight_decay": 0.1}
""",
    "store_one.py": """
from hyperopt_peft import Method

class One(Method):
    pass
""",
    "store_two.py": """
from dataclasses import dataclass
from store_scale import SCALE
from hyperopt_peft import Method

FACTOR = 1.0

@dataclass
class Two(Method):
    factor: float = 2.0
    def lower_loss(self, model, batch, task_loss):
        return self.factor * task_loss(batch)

class Four(Method):
    def lower_loss(self, model, batch, task_loss):
        return scaled(task_loss(batch))

def scaled(loss):
    return loss * FACTOR * SCALE
""",
    "store_three.py": """
from store_base import Base

class Three(Base):
    pass
""",
}
NAMES = {"One": "one", "Two": "two", "Three": "three", "Four": "two"}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that writes the files, each with changes, and imports them anew."""
    monkeypatch.syspath_prepend(tmp_path)

    def written(**changes: str) -> dict[str, Any]:
        for name, text in FILES.items():
            for old, new in changes.items():
                text = text.replace(old, new)
            (tmp_path / name).write_text(text)
            for module in (str(tmp_path / name), Path(name).stem):
                sys.modules.pop(module, None)
        paths = {name: tmp_path / f"store_{file}.py" for name, file in NAMES.items()}
        return {name: getattr(import_file(str(x), "method"), name)() for name, x in paths.items()}

    yield written
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods of the runs, which are made up."""
    names: list[str] = []

    def run(self: Task, run: Run) -> dict[str, Any]:
        names.append(run.method)
        metrics = {"eval_accuracy": 0.5 + 0.1 * run.seed, "eval_loss": 1.0}
        return self.line(run, metrics, passes=12.0, spent={}, seconds=1.0, memory=1.0, steps=[12])

    monkeypatch.setattr(Task, "run", run)
    monkeypatch.setattr(Task, "check", lambda *_: Price(0))
    return names


def new_of(done: list[str], methods: Any, folder: Path, **options: Any) -> list[str]:
    """The methods that have new runs."""
    done.clear()
    compared(methods, folder=folder, **options)
    return sorted({*done}, key=[*methods].index)


def test_after_editing_a_file_only_runs_of_its_methods_are_new(
    tmp_path: Path, files: Any, done: list[str]
) -> None:
    assert new_of(done, files(), tmp_path) == [*NAMES]
    for change, of in {
        ("2.0", "3.0"): ["Two", "Four"],
        ("factor", "size"): ["Two", "Four"],  # an option with another name
        ("0.1", "0.2"): ["Three"],  # the base class, in a file of its own
        ("FACTOR = 1", "FACTOR = 2"): ["Two", "Four"],  # a constant that a helper reads
        ("SCALE = 1", "SCALE = 2"): ["Two", "Four"],  # one of another file
        ("class One", "# a remark\nclass One"): ["One"],
    }.items():
        assert new_of(done, files(**dict([change])), tmp_path) == of
        assert not new_of(done, files(), tmp_path)  # the version before
    dropped = {name: files()[name] for name in ("One", "Three")}
    assert not new_of(done, dropped, tmp_path)
    methods = files()
    assert not new_of(done, {**dropped, "Five": methods["One"]}, tmp_path)  # another name
    assert new_of(done, {**methods, "Six": type(methods["Two"])(4.0)}, tmp_path) == ["Six"]


def test_another_metric_and_other_seeds_reuse_the_runs(
    tmp_path: Path, files: Any, done: list[str]
) -> None:
    compared(methods := files(), folder=tmp_path)
    done.clear()
    comparison = compared(methods, folder=tmp_path, metric="loss")
    assert comparison.scores()["One"].tolist() == [1.0, 1.0] and not done
    compared(methods, folder=tmp_path, seeds=[0, 1, 2])
    assert len(done) == len(NAMES)


def test_other_settings_reuse_nothing_and_are_remarked(
    tmp_path: Path, files: Any, done: list[str]
) -> None:
    compared(methods := files(), folder=tmp_path)
    done.clear()
    comparison = compared(methods, folder=tmp_path, arguments={"lr_scheduler_type": "constant"})
    remark = "8 stored runs were made with other settings (args.lr_scheduler_type: 'linear' → "
    assert len(done) == 8 and remark in str(comparison)
    store = Store.of(tmp_path)  # of the newest runs
    assert store.shared["args"]["lr_scheduler_type"] == "constant"
    assert len(store.results) == 8 == len(store.unused)


class Made(Method):
    def __init__(self, lock: Any) -> None:
        self.lock = lock


def test_what_has_no_contents_is_run_anew_and_remarked(tmp_path: Path, done: list[str]) -> None:
    methods = {"LoRA": Method(), "mine": Made(threading.Lock())}
    assert new_of(done, methods, tmp_path) == ["LoRA", "mine"]
    assert new_of(done, methods, tmp_path) == ["mine"]
    text = "methods.mine.lock: a lock has no contents to compare, so the runs of mine are made"
    assert str(compared(methods, folder=tmp_path)).count(text) == 1
    with pytest.raises(ProblemError, match=r"^part: .*methods\.mine\.lock: a lock"):
        compared(methods, folder=tmp_path, part=(1, 2))
    with (tmp_path / "log").open("w") as log:
        score: Any = lambda outputs: log and {"accuracy": 1.0}  # noqa: E731
        with pytest.raises(ProblemError, match=r"options\.compute_metrics\.log: a TextIOWrapper"):
            compared(folder=tmp_path, part=(1, 2), compute_metrics=score)
