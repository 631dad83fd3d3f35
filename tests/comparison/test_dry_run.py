"""A dry run knows what the run will refuse, and says about how long the missing runs take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hyperopt_peft import Method, ProblemError
from hyperopt_peft.comparison import Choice, Runs
from hyperopt_peft.comparison.task import Task
from hyperopt_peft.problems import BiDoRA, DoRA, LoRA
from tests.support.comparisons import compared
from tests.support.faulty_methods import Idle, Parametrised, Peeks, Refuses
from tests.support.trainers import data

ONE = {"LoRA": LoRA()}
TWO = Choice([1e-2, 1e-1])
HEAD = {"heads": True}


class Unfinished(Method):
    """Has a second phase that cannot begin."""

    def upper_variables(self, model: Any) -> Any:
        return {n: p for n, p in model.named_parameters() if "lora_B" in n}

    def finish(self, model: Any) -> Any:
        raise ProblemError("finish: nothing is left")


@pytest.mark.parametrize(
    ("methods", "options", "refused"),
    [
        (ONE, {"passes": 1}, "LoRA a phase of 1 steps"),
        (ONE, {"choice": Choice([1e-4])}, "LoRA a phase of 12 steps"),
        ({"m": BiDoRA()}, {"passes": 3, "arguments": {"optim": "sgd"}}, "m a phase of 0 steps"),
        ({**ONE, "late": Refuses()}, {}, "label_smoothing_factor"),
        ({**ONE, "late": Unfinished()}, {}, "finish: nothing is left"),
        ({"m": Idle()}, {}, "changed no logit"),
        ({"m": Parametrised()}, {}, "finish leaves a parametrisation"),
        ({"m": Peeks()}, {}, "m: trains on 3 of 20 test rows"),
        (ONE, {"metric": "f1"}, "metric: f1 is none of"),
        (ONE, {"upper_dataset": data(rows=1, seed=9), "choice": TWO}, "upper_dataset|held_out"),
        (ONE, {**HEAD, "metric": "f1"}, "metric: f1 is none of"),
        ({**ONE, "m": DoRA()}, HEAD, "m: a head lacks"),
        ({**ONE, "m": BiDoRA()}, {}, ""),
        (ONE, {"choice": Choice([6e-2, 90.0])}, ""),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_dry_run_refuses_what_the_run_refuses_before_any_run(
    methods: Any, options: Any, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:

    def begun(self: Task, run: Any) -> Any:
        raise ProblemError("begun")

    monkeypatch.setattr(Task, "run", begun)
    if refused:
        with pytest.raises(ProblemError, match=refused):
            compared(methods, **options, runs=Runs(progress=False, dry_run=True))
    else:
        compared(methods, **options, runs=Runs(progress=False, dry_run=True))
    with pytest.raises(ProblemError, match=refused or "^begun$"):
        compared(methods, **options)


def test_a_dry_run_counts_the_runs_that_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {"LoRA": LoRA(), "m": BiDoRA()}
    compared({"LoRA": LoRA()}, runs=Runs(tmp_path, progress=False))
    compared(methods, runs=Runs(tmp_path, progress=False, dry_run=True))
    _, first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.split()[:4] == ["LoRA", "0", "0", "12"]
    assert second.split()[:6] == ["m", "0", "2", "4", "+", "4"]
    compared(methods, seeds=[3, 4], passes=30, runs=Runs(tmp_path, progress=False, dry_run=True))
    assert "other settings" not in capsys.readouterr().out


def test_too_few_passes_are_refused_with_what_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, before any run, for all methods; the least passes that it names suffice."""
    methods: dict[str, Method] = {"LoRA": LoRA(), "m": BiDoRA()}
    rates, runs = Choice([2e-2], [1e-2]), Runs(progress=False, dry_run=True)
    with pytest.raises(ProblemError, match="LoRA a phase of 2 steps and m a phase of 0") as refused:
        compared(methods, passes=2, choice=rates, runs=runs)
    found = re.search(r"give (\d+) passes", str(refused.value))
    assert found is not None
    compared(methods, passes=float(found[1]), choice=rates, runs=runs)
    lines = capsys.readouterr().out.splitlines()
    heads, first, second = lines[0].split(), lines[1].split(), lines[2].split()
    assert first[heads.index("least")] == "5" and second[:1] == ["m"] and second[-2] == found[1]


def test_an_estimate_is_printed_before_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    compared({"LoRA": LoRA()}, runs=Runs(progress=True))
    assert "minutes" in capsys.readouterr().err
