"""``check``: the levels in words, and every estimator beside a reference, at the user's point."""

import re
from pathlib import Path

from hyperopt_peft.cli.check import CheckArguments
from hyperopt_peft.diagnostics.curvature import Spectrum
from tests.support.cli import Capture, run, small_run

QUICK = {
    "reference": "minres:steps=2",
    "solver_steps": 3,
    "target_modules": ["query"],
}


def table(text: str) -> dict[str, tuple[float, float]]:
    """Cosine and relative error by method."""
    rows = re.findall(r"^(\S+) +(-?[\d.]+) +([\d.e+-]+) +[\d.e-]+", text, re.MULTILINE)
    return {name: (float(cosine), float(error)) for name, cosine, error in rows}


def test_the_levels_are_in_words_and_every_default_estimator_in_the_table(
    tmp_path: Path, capsys: Capture
) -> None:
    run("check", **small_run(tmp_path, search_steps=2, details=True, **QUICK))
    text = capsys.readouterr().out
    assert "eigenvalues of the lower Hessian" in text and "note: " not in text
    assert "signal-to-noise ratio" in text
    chosen = CheckArguments().chosen(Spectrum(1.0, 1.0), 1.0)
    assert [m.partition(":")[0] for m in table(text)] == [m.partition(":")[0] for m in chosen]
    assert re.search("\n(Use |None is within|No estimator)", text)
    assert "against minres:steps=2 (residual" in text and "ξ =" in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["check.html"]


def test_defaults_follow_from_the_measured_spectrum() -> None:
    measured = Spectrum(-0.11, 0.43)
    assert f"cg:steps=5,damping={measured.damping():.3g}" in CheckArguments().chosen(measured, 1.0)
    darts = CheckArguments(estimators=["darts:xi=lr,scheme=forward"])
    assert darts.chosen(measured, 0.01) == ["darts:xi=0.01,scheme=forward"]
