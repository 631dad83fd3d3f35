"""Two processes, each with half of every batch, are one process with all of it (gloo, float64).

Differences of gradients divide by their step, and their rounding with them.
"""

from functools import cache
from typing import Any

import pytest
import torch

from tests.support import levels_in_processes as levels
from tests.support import two_processes

# A poor solve of the whole batch is as poor on its parts.
pytestmark = pytest.mark.filterwarnings("ignore::hyperopt_peft.errors.HypergradientWarning")
KINDS = ("plain", "ddp", pytest.param("fsdp", marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each process has of every check of some kinds, by their names: one launch for these."""

    @cache
    def results(*kinds: str) -> Any:
        folder = tmp_path_factory.mktemp("two")
        return two_processes.run(levels, folder, *kinds)

    return results


@pytest.fixture
def two(kind: str, launched: Any) -> Any:
    return launched("fsdp") if kind == "fsdp" else launched("plain", "ddp")


def distance(found: Any, expected: Any) -> Any:
    """The largest relative error of a tensor, by norms."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def rounding(method: str) -> Any:
    first_order = method.startswith(("darts", "sama")) and "exact" not in method
    first_order |= "difference" in method or method.startswith("f2sa")
    return 1e-7 if first_order else 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_whole_batch(two: Any, kind: str) -> None:
    """Also of a tensor that one process's rows alone read; and no ``.grad`` has changed."""
    expected = levels.gradients("plain")
    for result in two:
        for name, found in result[kind]["gradients"].items():
            assert distance(found, expected[name]) < (1e-12 if name != "held" else 1e-300), name


@pytest.mark.parametrize("kind", KINDS)
def test_hypergradients_are_those_of_the_whole_batch(two: Any, kind: str) -> None:
    """Every registered estimator; where parameters are sharded, those with first-order passes."""
    methods = levels.FIRST_ORDER if kind == "fsdp" else levels.WHOLE
    expected = levels.estimates("plain", methods)
    for method in methods:
        first, second = (result[kind]["estimates"][method] for result in two)
        assert all(map(torch.equal, first, second)), method
        assert distance(first, expected[method]) < rounding(method), method


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_one_process(two: Any, kind: str) -> None:
    """Records, metrics included, and all variables; bit for bit the same on both processes."""
    for method, (records, variables) in two[0][kind]["runs"].items():
        assert records == two[1][kind]["runs"][method][0], method
        assert all(map(torch.equal, variables, two[1][kind]["runs"][method][1])), method
        expected, end = levels.trained("plain", method)
        assert distance(variables, end) < rounding(method), method
        for record, other in zip(records, expected, strict=True):
            for key, value in other.items():
                if isinstance(value, float):
                    # A residual is itself relative to what the estimator solves for.
                    least = rounding(method) if key == "residual" else 1e-12
                    value = pytest.approx(value, rel=rounding(method), abs=least)
                assert record[key] == value, (method, key)


@pytest.mark.parametrize("kind", KINDS)
def test_three_levels_are_those_of_one_process(two: Any, kind: str) -> None:
    """Difference quotients of difference quotients: rounding counts for more."""
    end = levels.chained("plain")
    first, second = (result[kind]["chained"] for result in two)
    assert all(map(torch.equal, first, second))
    assert distance(first, end) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_estimator_keeps_is_whole_and_goes_on(two: Any, kind: str) -> None:
    """Bit for bit, and in the state of one process: a vector over shards is saved in full."""
    _, expected = levels.resumed("plain", levels.KEPT)
    for result in two:
        end, kept = result[kind]["resumed"]
        assert all(map(torch.equal, end, result[kind]["runs"][levels.KEPT][1]))
        assert kept.keys() == expected.keys() >= {"v", "direction", "largest", "k"}
        for key, value in expected.items():
            if isinstance(value, list):
                assert [x.shape for x in kept[key]] == [x.shape for x in value]
                assert distance(kept[key], value) < rounding(levels.KEPT)
            else:
                assert kept[key] == pytest.approx(value, rel=rounding(levels.KEPT))


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_on_one_process_stops_both(two: Any, kind: str) -> None:
    for result in two:
        assert result[kind]["poisoned"].startswith("lower step 1: lower: the loss is nan; ")


@pytest.mark.parametrize("kind", KINDS)
def test_the_upper_losses_draw_numbers_of_their_own(two: Any, kind: str) -> None:
    """One mask for all processes would be half of the randomness of one."""
    drawn = [x for result in two for x in result[kind]["drawn"]]
    assert len(set(drawn)) == len(drawn) == 6


@pytest.mark.parametrize("kind", KINDS[2:])
def test_second_derivatives_and_half_precision_of_shards_are_refused(two: Any, kind: str) -> None:
    for result in two:
        half = result["refusals"].pop("darts")
        assert "turn mixed precision off" in half
        assert result["refusals"].keys() == set(levels.SECOND_ORDER)
        assert all('product="difference"' in text for text in result["refusals"].values())
