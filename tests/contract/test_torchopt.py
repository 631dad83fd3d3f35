"""What TorchOpt does not promise and `optimizer_rules` uses: a failure names what moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchopt
from torchopt.base import GradientTransformation

from hyperopt_peft.hypergradients.unrolled.optimizer_rules import RULES

SGD = torchopt.sgd(1.0, momentum=0.5)
# Each optimizer's state: the fields that a rule fills, with what a fresh one holds for one entry.
STATES: dict[str, tuple[GradientTransformation, dict[str, Any]]] = {
    "sgd": (SGD, {"trace": [0.0]}),
    "adam": (torchopt.adam(1.0), {"mu": [0.0], "nu": [0.0], "count": [0]}),
    "rmsprop": (
        torchopt.rmsprop(1.0, momentum=0.5, centered=True),
        {"mu": [0.0], "nu": [0.0], "trace": [0.0]},
    ),
    "adagrad": (torchopt.adagrad(1.0), {"sum_of_squares": [0.0], "count": [0]}),
    "adadelta": (torchopt.adadelta(1.0), {"mu": [0.0], "nu": [0.0]}),
    "adamax": (torchopt.adamax(1.0), {"mu": [0.0], "nu": [0.0], "t": 1}),
    "radam": (torchopt.radam(1.0), {"mu": [0.0], "nu": [0.0], "t": 1}),
}


def fields(state: Any) -> dict[str, Any]:
    """All fields of a chain of transformations' states."""
    return {name: getattr(part, name) for part in state for name in part._fields}


@pytest.mark.parametrize("name", STATES)
def test_the_fields_of_a_fresh_state(name: str) -> None:
    transformation, expected = STATES[name]
    found = fields(transformation.init((torch.zeros(()),)))
    assert found == expected, f"torchopt.{name}: the fields of its state are {sorted(found)}"


def test_every_field_that_a_rule_fills_is_held_to_its_name() -> None:
    known = {field for _, expected in STATES.values() for field in expected}
    assert {field for rule in RULES.values() for field in rule.moments} <= known
