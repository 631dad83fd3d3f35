"""Runs the tests over ms-swift apart: its import changes classes of Transformers."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(not find_spec("swift"), reason="ms-swift is installed in a set of the matrix")
def test_a_bilevel_trainer_over_that_of_ms_swift() -> None:
    file = Path(__file__).with_name("in_ms_swift.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert re.search(r"\b3 passed", done.stdout), done.stdout[-3000:]
