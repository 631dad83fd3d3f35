"""Runs the tests over ms-swift apart: its import changes classes of Transformers."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.process import python


@pytest.mark.skipif(not find_spec("swift"), reason="ms-swift is installed in a set of the matrix")
def test_a_bilevel_trainer_over_that_of_ms_swift() -> None:
    file = Path(__file__).with_name("in_ms_swift.py")
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", file)
    assert re.search(r"\b3 passed", done.stdout), done.stdout
