"""The versions for a report of a bug."""

import platform

import pytest
import torch

import hyperopt_peft


def test_each_version_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    hyperopt_peft.show_versions()
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert torch.__version__.startswith(shown["torch"])  # without the local part, such as +cu132
    assert shown["Python"] == platform.python_version() and shown["platform"]
    assert {"hyperopt-peft", "transformers", "peft", "accelerate", "datasets"} <= {*shown}
