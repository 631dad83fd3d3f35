"""The changes of magnitude (ΔM) and direction (ΔD) by training, and the line through them.

In full fine-tuning the slope of ΔM on ΔD is negative, in LoRA positive (arXiv:2402.09353, §3.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from hyperopt_peft.adapters.layers import (
    base_weight,
    direction,
    lora_layers,
    magnitude,
    require_plain,
    resolve_adapter,
    row_norm,
)
from hyperopt_peft.errors import ProblemError


@dataclass(frozen=True)
class ModuleChange:
    """The change of one adapted weight since initialisation.

    ``module`` is the module's name in ``peft_model.named_modules()``; ``delta_magnitude`` is ΔM,
    the mean over rows of |m − m0|; ``delta_direction`` is ΔD, the mean over rows of 1 − cos(V, W0).

    Example:
        >>> ModuleChange("encoder.0", delta_magnitude=0.1, delta_direction=0.02).delta_direction
        0.02
    """

    module: str
    delta_magnitude: float
    delta_direction: float


@dataclass(frozen=True)
class LineFit:
    """The least-squares line ΔM = intercept + slope·ΔD through ``n`` points.

    ``pearson_r`` is the correlation coefficient, NaN if ΔM is constant. The intervals have level
    ``confidence``: for the slope from Student's t with n − 2 degrees of freedom, for r from
    Fisher's z, [−1, 1] if n = 3.

    Example:
        >>> changes = [ModuleChange(str(x), 2.0 * x + 1.0, x) for x in (0.1, 0.2, 0.4)]
        >>> round(fit_line(changes).intercept, 6)
        1.0
    """

    slope: float
    intercept: float
    pearson_r: float
    slope_interval: tuple[float, float]
    pearson_interval: tuple[float, float]
    n: int
    confidence: float


@torch.no_grad()
def decompose(peft_model: PeftModel, adapter_name: str | None = None) -> list[ModuleChange]:
    """ΔM and ΔD of every adapted module (arXiv:2402.09353, Eq. 3 and 4), in model order.

    m0 is the row norm of W0; without DoRA m is the row norm of V.

    Args:
        adapter_name: the active adapter by default.

    Raises:
        ProblemError: as `lora_layers` and `require_plain`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> decompose(model)
        [ModuleChange(module='base_model.model.0', delta_magnitude=0.0, delta_direction=0.0)]
    """
    adapter = resolve_adapter(peft_model, adapter_name)
    changes = []
    for name, layer in lora_layers(peft_model, adapter):
        require_plain(layer, adapter, name)
        w0, v = _float64(base_weight(layer)), _float64(direction(layer, adapter))
        m0, n = row_norm(w0), row_norm(v)
        m_start, m = m0, n
        if adapter in layer.lora_magnitude_vector:
            # PEFT rounds the initial m to the dtype of W0.
            m_start = _float64(row_norm(base_weight(layer)))
            m = _float64(magnitude(layer, adapter))
        # 1 − cos(V_j, W0_j) without the cancellation of a cosine near one
        one_minus_cos = (v / n[:, None] - w0 / m0[:, None]).square().sum(dim=1) / 2
        changes.append(
            ModuleChange(name, (m - m_start).abs().mean().item(), one_minus_cos.mean().item())
        )
    return changes


def fit_line(changes: Sequence[ModuleChange], confidence: float = 0.95) -> LineFit:
    """Least-squares line of ΔM on ΔD and Pearson's r, each with a confidence interval.

    Raises:
        ProblemError: fewer than three points, constant ΔD, or a confidence outside (0, 1).

    Example:
        >>> changes = [ModuleChange(str(x), 2.0 * x + 1.0, x) for x in (0.1, 0.2, 0.4)]
        >>> round(fit_line(changes).slope, 6)
        2.0
    """
    # Imported here because training never needs it.
    from scipy import stats

    if not 0 < confidence < 1:
        raise ProblemError(f"confidence: must lie between 0 and 1, got {confidence}")
    if len(changes) < 3:
        raise ProblemError(
            f"changes: a line with an interval needs at least 3 modules, got {len(changes)}; "
            "pass the changes of more modules or of several checkpoints"
        )
    x = [change.delta_direction for change in changes]
    y = [change.delta_magnitude for change in changes]
    if min(x) == max(x):
        raise ProblemError(
            f"changes: delta_direction is {x[0]} for every module, so no line is defined; "
            "decompose an adapter that has been trained"
        )
    if min(y) == max(y):
        # A frozen magnitude: the line is flat and exact, the correlation undefined.
        undefined = (math.nan, math.nan)
        return LineFit(0.0, y[0], math.nan, (0.0, 0.0), undefined, len(x), confidence)

    line = stats.linregress(x, y)
    margin = stats.t.ppf((1 + confidence) / 2, df=len(x) - 2) * line.stderr
    r = stats.pearsonr(x, y)
    interval = r.confidence_interval(confidence)
    return LineFit(
        slope=float(line.slope),
        intercept=float(line.intercept),
        pearson_r=float(r.statistic),
        slope_interval=(float(line.slope - margin), float(line.slope + margin)),
        pearson_interval=(float(interval.low), float(interval.high)),
        n=len(x),
        confidence=confidence,
    )


def plot_decomposition(
    changes_by_method: Mapping[str, Sequence[ModuleChange]], path: str | Path
) -> dict[str, LineFit]:
    """Plot ΔM against ΔD with a fitted line for each method, and save the figure to ``path``.

    The legend has each slope and r with its 95 % interval.

    Returns:
        The fitted line of each method.

    Raises:
        ProblemError: there is no method; or as `fit_line`, with the method's name.

    Example:
        >>> changes = [ModuleChange(str(x), 2.0 * x + 1.0, x) for x in (0.1, 0.2, 0.4)]
        >>> lines = plot_decomposition({"lora": changes}, "changes.png")
        >>> round(lines["lora"].slope, 6)
        2.0
    """
    # Figure, not pyplot: no global state, no display.
    from matplotlib.figure import Figure

    if not changes_by_method:
        raise ProblemError("changes_by_method: is empty; pass the changes of at least one method")
    fits = {}
    for method, changes in changes_by_method.items():
        try:
            fits[method] = fit_line(changes)
        except ProblemError as error:
            raise ProblemError(f"{method}: {error}") from error

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, (method, changes) in enumerate(changes_by_method.items()):
        fit, colour = fits[method], f"C{index % 10}"
        x = [change.delta_direction for change in changes]
        y = [change.delta_magnitude for change in changes]
        ends = [min(x), max(x)]
        axes.scatter(x, y, s=22, color=colour, alpha=0.7, edgecolors="none")
        line = [fit.intercept + fit.slope * end for end in ends]
        axes.plot(ends, line, color=colour, label=f"{method}: {_legend(fit)}")
    axes.set_xlabel("ΔD: mean over rows of 1 − cos(V, W0)")
    axes.set_ylabel("ΔM: mean over rows of |m − m0|")
    axes.ticklabel_format(style="sci", scilimits=(-3, 3), useMathText=True)
    axes.grid(alpha=0.25)
    title = "least-squares line and correlation, 95 % intervals"
    figure.legend(loc="outside upper left", title=title, frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    return fits


def _legend(fit: LineFit) -> str:
    slope = f"slope {fit.slope:.3g} [{fit.slope_interval[0]:.3g}, {fit.slope_interval[1]:.3g}]"
    if math.isnan(fit.pearson_r):
        return f"{slope}, r undefined"
    low, high = fit.pearson_interval
    return f"{slope}, r {fit.pearson_r:.2f} [{low:.2f}, {high:.2f}]"


def _float64(tensor: Tensor) -> Tensor:
    # On the CPU, because some accelerators have no float64; contiguous, because the order of a sum
    # follows the strides, and equal weights must have equal norms.
    return tensor.detach().to("cpu", torch.float64).contiguous()
