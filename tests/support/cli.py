"""Small runs of the command line: their options, what they print, and the adapters they leave."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer

from hyperopt_peft.cli.main import main
from hyperopt_peft.cli.text.tasks import TASKS
from tests.support.files import SMALL, flags, rows, save_model, write

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]  # of ``capsys``
COLUMNS: dict[str, dict[str, Any]] = {
    "token-classification": {"label_column": "tags"},
    "seq2seq": {"target_column": "target"},
}


def small_run(folder: Path, task: str = "text-classification", **options: Any) -> dict[str, Any]:
    """Options of a run of a model and data that are written to ``folder``; None leaves one out."""
    data = {
        "model": save_model(folder / "model", task),
        "task": task,
        "train_file": write(folder / "train.jsonl", rows(task)),
        "eval_file": write(folder / "eval.jsonl", rows(task, number=10, seed=1)),
        "output_dir": folder / "out",
    }
    every = {**data, **COLUMNS.get(task, {}), **SMALL, **options}
    return {name: value for name, value in every.items() if value is not None}


def run(command: str, *argv: str, **options: Any) -> None:
    """The command, which must succeed."""
    assert main([command, *argv, *flags(**options)]) == 0


def refused(
    capsys: Capture, command: str, options: dict[str, Any], *words: str, status: int = 2
) -> str:
    """The one line of a command that must fail; it has all of ``words``, regular expressions."""
    capsys.readouterr()
    assert main([command, *flags(**options)]) == status
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if not line.startswith("[transformers]")]
    assert len(lines) == 1 and lines[0].startswith("hyperopt-peft"), error
    assert all(re.search(word, lines[0]) for word in words), error
    return lines[0]


def start(folder: Path, *argv: object) -> subprocess.Popen[str]:
    """The command line as a process of its own in ``folder``."""
    return subprocess.Popen(
        [sys.executable, "-m", "hyperopt_peft", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        # A shell starts what runs in its background deaf to Ctrl-C, tests included.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def stock(folder: Path, task: str = "text-classification") -> tuple[Any, Any]:
    """The adapter on its base model, loaded without this library, and its tokenizer."""
    config = AutoConfig.from_pretrained(folder / "out/base_config")
    base = TASKS[task].model.from_pretrained(
        folder / "model", config=config, ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(base, folder / "out").eval()
    return model, AutoTokenizer.from_pretrained(folder / "out")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def results_of(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "out/all_results.json").read_text())
    return results


def state(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text())
    return result
