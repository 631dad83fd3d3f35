"""The entry point: usage, unknown commands, and ends that are one line and an exit status."""

import signal
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

import hyperopt_peft
from hyperopt_peft.cli import COMMANDS, train
from hyperopt_peft.cli.main import main
from tests.support.cli import Capture, refused, small_run, start
from tests.support.files import flags
from tests.support.process import python


def test_usage_names_every_command(capsys: Capture) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
    refused(capsys, "trian", {}, r"'trian'; did you mean 'train'\?")


def test_usage_and_version_load_no_library() -> None:
    program = (
        "import sys, hyperopt_peft; from hyperopt_peft.cli.main import main\n"
        "main(['--help']); main(['--version']); print(hyperopt_peft.__version__)\n"
        "assert not {'torch', 'numpy', 'transformers', 'datasets'} & set(sys.modules)"
    )
    *_, line, last = python("-c", program).stdout.splitlines()
    assert last == version("hyperopt-peft") == hyperopt_peft.__version__
    assert line == f"hyperopt-peft {last}"


def test_no_warnings_of_other_libraries_renamings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "run", lambda _: warnings.warn("renamed", FutureWarning, 2))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert main(["train"]) == 0
        warnings.warn("renamed", FutureWarning, 2)
    assert len(seen) == 1  # and only while a command runs


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_status_130(tmp_path: Path) -> None:
    """In a process of its own, with a progress bar."""
    options = small_run(tmp_path, disable_tqdm=False, max_steps=100_000)
    process = start(tmp_path, "train", *flags(**options))
    assert process.stderr is not None
    seen = ""
    while "0/100000" not in seen and (character := process.stderr.read(1)):
        seen += character
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=800)
    assert process.returncode == 130, seen + err
    assert "Traceback" not in err
    assert err.rstrip("\n").splitlines()[-1] == "hyperopt-peft train: interrupted"
