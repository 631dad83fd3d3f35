"""``compare-estimators`` and ``check``: at the user's own point, and in words."""

import re
from pathlib import Path
from typing import Any

import pytest

from hyperopt_peft.cli.compare_estimators import EstimatorArguments
from hyperopt_peft.cli.main import main
from hyperopt_peft.diagnostics.curvature import Spectrum
from tests.support.cli import NOWHERE, failure, given
from tests.support.files import flags

QUICK = {"reference_steps": 2, "directions": 1}


def compared(capsys: pytest.CaptureFixture[str], folder: Path, **options: Any) -> str:
    assert main(["compare-estimators", *flags(**given(folder), **options)]) == 0
    return capsys.readouterr().out


def table(text: str) -> dict[str, tuple[float, float]]:
    """Cosine and relative error by method."""
    rows = re.findall(r"^(\S+) +(-?[\d.]+) +([\d.e+-]+) +[\d.]+ ", text, re.MULTILINE)
    return {name: (float(cosine), float(error)) for name, cosine, error in rows}


@pytest.mark.parametrize("steps", [0, 2])
def test_every_default_estimator_is_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    text = compared(capsys, tmp_path, steps=steps, **QUICK)
    chosen = EstimatorArguments().chosen(Spectrum(1.0, 1.0), 1.0)
    assert [m.partition(":")[0] for m in table(text)] == [m.partition(":")[0] for m in chosen]
    assert "against retraining:steps=2,directions=1,lr=" in text and "ξ =" in text
    assert not (tmp_path / "out").exists()


def test_the_damping_is_the_measured_spectrum_s_or_one_s_own() -> None:
    measured = Spectrum(-0.11, 0.43)
    found = EstimatorArguments().chosen(measured, 1.0)
    assert f"cg:steps=5,damping={measured.damping():.3g}" in found
    assert "cg:steps=5,damping=7" in EstimatorArguments(damping=7.0).chosen(measured, 1.0)
    assert EstimatorArguments().truth(measured).endswith("lr=2.33")


def test_the_reference_itself_is_recommended_when_it_is_the_only_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = "minres:steps=20,damping=10"
    options = {"methods": ["direct", method], "reference": method, "min_cosine": 0.9999}
    text = compared(capsys, tmp_path, **options)
    assert table(text)[method] == (1, 0)
    assert f"Use {method}: of 1 within cosine ≥ 0.9999" in text


def test_xi_of_the_learning_rate_is_that_of_the_options() -> None:
    methods = ["darts:xi=lr,scheme=forward"]
    chosen = EstimatorArguments(methods=methods).chosen(Spectrum(1.0, 1.0), 0.01)
    assert chosen == ["darts:xi=0.01,scheme=forward"]


@pytest.mark.parametrize("steps", [0, 2])
def test_the_check_is_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    assert main(["check", *flags(**given(tmp_path), steps=steps, solver_steps=3)]) == 0
    text = capsys.readouterr().out
    assert "eigenvalues of the lower Hessian" in text and "note: " in text
    assert "signal-to-noise ratio" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "options", "named"),
    [
        ("compare-estimators", {"methods": ["drts"]}, "'drts'.*'darts'"),
        ("compare-estimators", {"reference": "exakt"}, "'exakt'.*'exact'"),
        ("compare-estimators", {"reference_steps": 0}, "steps"),
        ("compare-estimators", {"damping": -1}, "damping"),
        ("compare-estimators", {"steps": -1}, "steps.*-1"),
        ("compare-estimators", {"repeats": 0}, "repeats.*0"),
        ("compare-estimators", {"max_relative_error": 0}, "max_relative_error"),
        ("check", {"steps": -1}, "steps.*-1"),
        ("check", {"solver_steps": 0}, "solver_steps.*0"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    command: str, options: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(named, failure(capsys, command, *flags(**NOWHERE, **options)))
