"""NaN and infinity: an error that names the step, or a step that is skipped and counted."""

import math

import pytest
import torch

from hyperopt_peft import Engine, NonFiniteError, ProblemError, hypergradient
from hyperopt_peft.hypergradients import Direct, Estimate, Oracle
from tests.support.quadratic import FunctionLevel, program


def non_finite_levels(bad: set[tuple[str, int]]) -> tuple[FunctionLevel, FunctionLevel]:
    """Levels whose losses are NaN at their ``bad`` evaluations, counted from 1."""
    w, u = (torch.tensor([value], requires_grad=True) for value in (3.0, 1.0))
    counts = {"upper": 0, "lower": 0}

    def factor(level: str) -> float:
        counts[level] += 1
        return math.nan if (level, counts[level]) in bad else 1.0

    upper = FunctionLevel(lambda _: factor("upper") * (w * u).sum(), [u], lr=0.1, name="above")
    lower = FunctionLevel(
        lambda _: factor("lower") * (w - u).square().sum(), [w], lr=0.1, name="below"
    )
    return upper, lower


def test_losses_that_are_not_finite_name_the_step() -> None:
    levels = non_finite_levels({("lower", 3)})
    with pytest.raises(NonFiniteError, match=r"lower step 3: below: .*loss"):
        Engine(*levels, "direct", progress=False).run(5)
    levels = non_finite_levels({("upper", 2)})
    with pytest.raises(NonFiniteError, match=r"upper step 2: direct: above: .*loss"):
        Engine(*levels, "direct", progress=False).run(5)


@pytest.mark.parametrize("method", ["direct", "darts", "unrolled:steps=2"])
def test_steps_that_are_not_finite_can_be_skipped_and_are_counted(method: str) -> None:
    upper, lower = non_finite_levels({("upper", 2), ("upper", 4)})
    engine = Engine(upper, lower, method, lower_steps=2, non_finite="skip", progress=False)
    history = engine.run(5)
    assert engine.skipped == 2 and [record["step"] for record in history] == [1, 3, 5]
    assert torch.isfinite(torch.cat([*upper.variables, *lower.variables])).all()


def test_an_upper_step_needs_a_lower_step() -> None:
    """With every lower step since the last upper one skipped, so is the upper one."""
    levels = non_finite_levels({("lower", 2)})
    engine = Engine(*levels, "direct", non_finite="skip", progress=False)
    assert [record["step"] for record in engine.run(3)] == [1, 3]
    assert engine.skipped == 2


def test_curvatures_that_are_not_finite_name_step_and_estimator() -> None:
    upper, lower = program(0).levels()
    with pytest.raises(NonFiniteError, match="upper step 1: neumann"):
        Engine(upper, lower, "neumann:step_size=1e9,terms=200", progress=False).run(1)


@pytest.mark.parametrize("owner", ["upper", "lower"])
def test_a_skipped_first_step_does_not_hide_a_variable_that_no_loss_reads(owner: str) -> None:
    upper, lower = non_finite_levels({(owner, 1)})
    levels = {"upper": upper, "lower": lower}
    variables = [*levels[owner].variables, torch.ones(1, requires_grad=True)]
    function = levels[owner].function
    levels[owner] = FunctionLevel(function, variables, lr=0.1)
    engine = Engine(**levels, hypergradient="direct", non_finite="skip", progress=False)
    with pytest.raises(ProblemError, match="'variable 1'"):
        engine.run(3)


def test_an_estimate_that_is_not_finite_names_its_estimator() -> None:
    class Overflowing(Direct):
        def estimate(self, oracle: Oracle) -> Estimate:
            result = super().estimate(oracle)
            return Estimate(result.direct / 0.0, result.implicit)

    with pytest.raises(NonFiniteError, match="direct"):
        hypergradient(*program(0).levels(), Overflowing())
