"""What a caller is told of an estimate whose residual is large."""

from __future__ import annotations

import warnings

import pytest

from hyperopt_peft import Engine, HypergradientWarning, hypergradient
from hyperopt_peft.hypergradients.estimate import estimate, open_oracle
from tests.support.quadratic import program


@pytest.mark.parametrize("method", ["cg:steps=1", "f2sa:inner_steps=1"])
def test_hypergradient_warns_of_a_large_residual(method: str) -> None:
    levels = program(0).levels()
    residual = estimate(open_oracle(*levels), method).residual
    assert residual is not None and residual > 0.1
    with pytest.warns(HypergradientWarning, match=f"{method.split(':')[0]}: .*{residual:.3g}") as w:
        hypergradient(*levels, method)
    assert [warning.filename for warning in w] == [__file__]


@pytest.mark.parametrize("method", ["cg", "f2sa", "darts", "direct"])
def test_a_small_residual_or_none_is_no_warning(method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hypergradient(*program(0).levels(), method)


def test_in_training_the_log_holds_the_residual_and_there_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (record,) = Engine(*program(0).levels(), "cg:steps=1", progress=False).run(1)
    assert record["residual"] > 0.1
