"""The ends of the spectrum, and the damping that follows from them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperopt_peft import ProblemError
from hyperopt_peft.diagnostics.curvature import Spectrum, lanczos, spectrum
from hyperopt_peft.hypergradients import Vector
from tests.support.quadratic import CONDITION, program, symmetric


@given(seed=st.integers(0, 1000), size=st.integers(1, 8), scale=st.floats(1e-6, 1e6))
def test_the_whole_krylov_space_has_the_ends(seed: int, size: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(size, dtype=torch.float64, generator=generator)
    matrix = symmetric(values, generator)
    start = Vector([torch.randn(size, dtype=torch.float64, generator=generator)])
    actual = lanczos(lambda v: Vector([matrix @ v.parts[0]]), start, 2 * size)
    tolerance = 1e-6 * float(values.abs().max())
    assert actual.smallest == pytest.approx(float(values.min()), abs=tolerance)
    assert actual.largest == pytest.approx(float(values.max()), abs=tolerance)


@given(ends=st.tuples(st.floats(-10, 10), st.floats(-10, 10)).map(sorted))
def test_damping_is_the_least_that_gives_the_condition_number(ends: list[float]) -> None:
    damping = Spectrum(*ends).damping()
    low, high = ends[0] + damping, ends[1] + damping
    if damping > 0:
        assert high == pytest.approx(10 * low, abs=1e-9)
    else:
        assert 0 <= high <= 10 * low + 1e-9


def test_the_spectrum_of_a_level_and_its_scale() -> None:
    actual = spectrum(*program(0).levels(), lanczos_steps=12)
    assert (actual.smallest, actual.largest) == pytest.approx((1, CONDITION))
    assert actual.damping() == pytest.approx(0, abs=1e-6)
    scaled = spectrum(*program(0).levels(scale=1e3), lanczos_steps=12)
    assert scaled.largest == pytest.approx(1e3 * CONDITION)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ProblemError, match="lanczos_steps"):
        spectrum(*program(0).levels(), lanczos_steps=0)
