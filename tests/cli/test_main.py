"""The entry point: usage, unknown commands, and errors that are one line."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from hyperopt_peft.cli import check, compare_estimators, compare_methods, merge, train
from hyperopt_peft.cli.main import COMMANDS, main
from hyperopt_peft.cli.options import Parser
from tests.support.files import SMALL, flags, rows, save_model, write

ROOT = Path(__file__).parents[2]


def failure(capsys, *argv):
    """What a command that fails writes to stderr: one line."""
    assert main([str(x) for x in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err.strip()


def test_usage_names_every_command(capsys):
    for argv in ([], ["--help"]):
        assert main(argv) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)


def test_unknown_command_gets_the_nearest(capsys):
    assert failure(capsys, "trian").endswith("unknown command 'trian'; did you mean 'train'?")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help_and_a_default_that_is_shown(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "[config.yaml] [options]" in text
    if command != "merge":  # what is of this library comes before the Trainer's hundred arguments
        assert text.index("\ntwo levels:\n  --hypergradient ") < text.index("\noptions:\n")
        assert text.index("--retrain_steps ") < text.index("\noptions:\n") < text.index("--optim ")
    own = {
        "train": (train.TrainArguments, *train.TYPES),
        "compare": (compare_methods.CompareArguments, *compare_methods.TYPES),
        "check": (check.CheckArguments, *check.TYPES),
        "compare-estimators": (compare_estimators.EstimatorArguments, *compare_estimators.TYPES),
        "merge": (merge.MergeArguments,),
    }
    assert all(action.help for action in Parser(own[command])._actions)


def test_no_warnings_of_other_libraries_renamings(monkeypatch):
    monkeypatch.setattr(train, "run", lambda _: warnings.warn("renamed", FutureWarning, 2))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert main(["train"]) == 0
        warnings.warn("renamed", FutureWarning, 2)
    assert len(seen) == 1  # and only while a command runs


def test_a_process_of_its_own_ends_with_one_line_and_status_2(tmp_path):
    def run(*argv):
        return subprocess.run(
            [sys.executable, "-m", "hyperopt_peft", *argv],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    model = save_model(tmp_path / "model")
    data = write(tmp_path / "train.csv", rows())
    given = {"model": model, "task": "text-classification", "train_file": data, **SMALL}
    done = run("train", *flags(**given), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("method: bidora\n")
    done = run("train", *flags(**given, text_columns="txet"))
    assert done.returncode == 2
    assert done.stderr == (
        "hyperopt-peft train: the training examples have no column 'txet'; did you mean 'text'?\n"
    )


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(argv):
        raise KeyError("a bug")

    monkeypatch.setattr(train, "run", broken)
    with pytest.raises(KeyError):
        main(["train"])
