import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from hyperopt_peft.adapters import ModuleChange, decompose, fit_line, plot_decomposition
from tests.support.adapted_models import (
    KINDS,
    Single,
    adapted_layer,
    bert,
    dora_bert,
    randomise,
    single,
    wrap,
)


def changes(x: object, y: object) -> list[ModuleChange]:
    """Points with ΔD = x and ΔM = y."""
    pairs = zip(np.asarray(x).tolist(), np.asarray(y).tolist(), strict=True)
    return [ModuleChange(f"m{i}", dm, dd) for i, (dd, dm) in enumerate(pairs)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_has_changed_at_initialisation(
    kind: str, use_dora: bool, dtype: torch.dtype
) -> None:
    """Exactly, so that rounding is not taken for training."""
    (change,) = decompose(single(kind, use_dora=use_dora, dtype=dtype))
    assert (change.delta_magnitude, change.delta_direction) == (0, 0)


def test_an_untrained_adapter_has_no_line() -> None:
    model = dora_bert(target_modules="all-linear", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"changes: .*0\.0"):
        fit_line(decompose(model))


def test_changes_come_by_module_in_model_order() -> None:
    model = randomise(dora_bert())
    found = decompose(model)
    assert [c.module for c in found] == [
        f"base_model.model.bert.encoder.layer.{i}.attention.self.{target}"
        for i in (0, 1)
        for target in ("query", "value")
    ]
    assert all(c.delta_magnitude > 0 and 0 < c.delta_direction < 2 for c in found)


def test_a_moved_magnitude_is_a_change_of_magnitude_only() -> None:
    model = single()
    m = adapted_layer(model).lora_magnitude_vector["default"].weight
    with torch.no_grad():
        m += torch.tensor([0.1, -0.2, 0.3, 0.0, -0.4])
    (change,) = decompose(model)
    assert change.delta_magnitude == pytest.approx(0.2, rel=1e-7)
    assert change.delta_direction == 0


@pytest.mark.parametrize("angles", [(0.5, 1.0, 2.0), (1e-6, 2e-6, 0.0)])
def test_turned_rows_change_by_one_minus_the_cosine(angles: tuple[float, ...]) -> None:
    """W0 = diag(1, 2, 3); row j is turned by angle j towards the next axis, length doubled."""
    lengths = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    base = nn.Linear(3, 3, bias=False).double()
    base.weight.data = torch.diag(lengths)
    theta = torch.tensor(angles, dtype=torch.float64)
    turned = torch.diag(theta.cos()) + torch.diag(theta.sin()).roll(1, dims=1)
    expected = (2 * (theta / 2).sin() ** 2).mean().item()

    for use_dora in (True, False):
        model = wrap(Single(base), r=3, lora_alpha=3, use_dora=use_dora)
        layer = adapted_layer(model)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(torch.eye(3))
            v = 2 * lengths[:, None] * turned
            layer.lora_B["default"].weight.copy_(v - base.weight)
        (change,) = decompose(model)
        assert change.delta_direction == pytest.approx(expected, rel=1e-6)
        # DoRA's magnitude has not moved; without one, it is the length of V.
        assert change.delta_magnitude == pytest.approx(0.0 if use_dora else 2.0, abs=1e-12)
        base = model.unload().layer


def test_an_exact_line_is_recovered() -> None:
    x = np.linspace(0.01, 0.2, 8)
    fit = fit_line(changes(x, 0.7 - 2.5 * x))
    assert (fit.slope, fit.intercept) == (pytest.approx(-2.5), pytest.approx(0.7))
    assert fit.pearson_r == pytest.approx(-1)
    assert fit.slope_interval == pytest.approx((-2.5, -2.5))
    assert (fit.n, fit.confidence) == (8, 0.95)


def test_intervals_by_their_formulas() -> None:
    """Slope: Student's t, 95 % point 2.776 for 4 degrees of freedom; r: tanh(z ± 1.960/√3)."""
    x = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    y = np.array([1.1, 1.9, 3.2, 3.8, 5.3, 5.7])
    fit = fit_line(changes(x, y))
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - intercept - slope * x
    error = math.sqrt((residual @ residual) / 4 / ((x - x.mean()) @ (x - x.mean())))
    assert fit.slope == pytest.approx(slope)
    assert fit.slope_interval == pytest.approx(
        (slope - 2.776445 * error, slope + 2.776445 * error), rel=1e-6
    )
    z = math.atanh(np.corrcoef(x, y)[0, 1])
    half = 1.959964 / math.sqrt(3)
    assert fit.pearson_interval == pytest.approx((math.tanh(z - half), math.tanh(z + half)))


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_cover_the_truth_as_often_as_they_say(confidence: float) -> None:
    generator, rho, trials = np.random.default_rng(0), 0.6, 1000
    slope_hits = r_hits = 0
    for _ in range(trials):
        x = generator.standard_normal(15)
        y = rho * x + math.sqrt(1 - rho**2) * generator.standard_normal(15)
        fit = fit_line(changes(x, y), confidence)
        slope_hits += fit.slope_interval[0] <= rho <= fit.slope_interval[1]
        r_hits += fit.pearson_interval[0] <= rho <= fit.pearson_interval[1]
    tolerance = 4 * math.sqrt(confidence * (1 - confidence) / trials)
    assert slope_hits / trials == pytest.approx(confidence, abs=tolerance)
    assert r_hits / trials == pytest.approx(confidence, abs=tolerance)


def test_three_points_say_nothing_about_the_correlation() -> None:
    fit = fit_line(changes([1, 2, 3], [1.0, 2.2, 2.9]))
    assert fit.pearson_interval == (-1, 1)
    assert fit.slope_interval[0] < fit.slope < fit.slope_interval[1]


@pytest.mark.filterwarnings("error")
def test_a_frozen_magnitude_gives_a_flat_line_without_a_correlation() -> None:
    fit = fit_line(changes([0.1, 0.2, 0.4], [0.5, 0.5, 0.5]))
    assert (fit.slope, fit.intercept, fit.slope_interval) == (0, 0.5, (0, 0))
    assert math.isnan(fit.pearson_r)


def test_errors_of_the_fit() -> None:
    with pytest.raises(ValueError, match=r"changes: .*2"):
        fit_line(changes([1, 2], [1, 2]))
    with pytest.raises(ValueError, match=r"changes: .*0\.5"):
        fit_line(changes([0.5, 0.5, 0.5], [1, 2, 3]))
    with pytest.raises(ValueError, match=r"confidence: .*95"):
        fit_line(changes([1, 2, 3], [1, 2, 3]), confidence=95)


def test_errors_of_the_model() -> None:
    with pytest.raises(ValueError, match="peft_model: "):
        decompose(bert())


def test_the_plot_shows_every_method_with_its_slope_and_correlation(tmp_path: Path) -> None:
    x = np.array([0.01, 0.02, 0.04, 0.05])
    points = {
        "LoRA": changes(x, 2 * x + 0.001 * np.array([1, -1, 1, -1])),
        "BiDoRA": changes(x, 0.3 - 4 * x),
        "frozen m": changes(x, 0 * x),
    }
    fits = plot_decomposition(points, tmp_path / "plot.svg")
    assert list(fits) == list(points)
    assert fits["LoRA"] == fit_line(points["LoRA"])
    drawing = (tmp_path / "plot.svg").read_text()
    assert "BiDoRA: slope -4 [-4, -4], r -1.00 [-1.00, -1.00]" in drawing
    assert "LoRA: slope 1.9" in drawing
    assert "frozen m: slope 0 [0, 0], r undefined" in drawing
    plot_decomposition(points, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_has_the_points_and_the_fitted_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    x, y = np.array([0.01, 0.02, 0.04, 0.05]), np.array([0.3, 0.1, 0.2, 0.4])
    fit = plot_decomposition({"DoRA": changes(x, y)}, "plot.png")["DoRA"]
    (axes,) = drawn[0].axes
    (line,), (dots,) = axes.lines, axes.collections
    np.testing.assert_array_equal(dots.get_offsets(), np.stack([x, y], 1))
    np.testing.assert_array_equal(line.get_xdata(), [0.01, 0.05])
    np.testing.assert_allclose(line.get_ydata(), fit.intercept + fit.slope * line.get_xdata())


def test_errors_of_the_plot_name_the_method(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DoRA: changes: "):
        plot_decomposition({"DoRA": changes([1], [1])}, tmp_path / "plot.png")
    with pytest.raises(ValueError, match="changes_by_method: "):
        plot_decomposition({}, tmp_path / "plot.png")
