"""A release that renames a private name: each in turn, and what a user sees."""

import json
from typing import Any

import pytest

from tests.support.moved import NAMES
from tests.support.process import python

#: The names without which layers keep PEFT's forward pass, and how many of the program's models do.
NEEDED_BY_LAYERS = {"lora_variant": 3, "_embed": 1, "conv_fn": 1}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seen() -> Any:
    return json.loads(python("-m", "tests.support.moved").stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [name for _, name in NAMES])
def test_everything_works_and_one_line_says_what_does_not(seen: Any, name: str) -> None:
    programs = seen[name]
    assert programs["engine"] == {"value": None, "error": None, "warnings": []}
    warnings = programs["adapter"]["warnings"]
    assert programs["adapter"]["error"] is None and len(warnings) == NEEDED_BY_LAYERS.get(name, 0)
    assert all(name in warning for warning in warnings)
    assert programs["training"]["error"] is None
    assert {"levels.safetensors", "bilevel.json"} <= set(programs["training"]["value"])
