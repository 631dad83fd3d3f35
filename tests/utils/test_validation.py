"""Settings of a run that resumes: the first difference by name, and how many more there are."""

import pytest

from hyperopt_peft import ProblemError
from hyperopt_peft.utils.validation import require_settings


def settings(rank: int) -> dict[str, object]:
    return {"seed": 0, "shapes": {f"layers.{i}.lora_A": [rank, 384] for i in range(200)}}


@pytest.mark.parametrize(
    ("known", "now", "named"),
    [
        (settings(8), settings(16), "shapes.layers.0.lora_A[0]: "),
        ({"a": 1}, {"a": 2}, "a: "),
        ({}, {"a": 2}, "None"),
        ({"a": 1, "b": 1}, {"a": 1}, "b: "),
        ({"a": [1, 2]}, {"a": [1]}, "[1, 2]"),
        ({"a": "x" * 9000}, {"a": "y"}, "'xxx"),
    ],
)
def test_the_entry_is_named(known: dict[str, object], now: dict[str, object], named: str) -> None:
    with pytest.raises(ProblemError) as error:
        require_settings("the state", known, "this run", now)
    assert named in str(error.value) and len(str(error.value)) < 250
    words = str(error.value)
    assert words.count("199 more") == words.count("more") == ("shapes" in known)
