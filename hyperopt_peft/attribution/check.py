"""Whether scores predict what happens: retrainings without random rows, and smoothness."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from scipy.stats import spearmanr
from torch import Tensor

from hyperopt_peft.attribution.methods import Method, Setting, scores
from hyperopt_peft.errors import ProblemError

#: LDS and metasmoothness from which scores are called trustworthy, and below which worthless.
GOOD, POOR = 0.8, 0.4


@dataclass(frozen=True)
class Check:
    """What retrainings without random rows say of the scores.

    Attributes:
        predicted: the predicted changes of Φ, −Σ s_i over the rows left out, ``(R,)``.
        actual: the changes of Φ in the retrainings, ``(R,)``.
        metasmoothness: the cosine between the scores and those at v = 1 ± ``perturbation`` (signs
            random), near 1 for a smooth run; None if not measured, or if the method does not
            differentiate the run. After Engstrom et al. 2025 (arXiv:2503.13751, §3).
        share: the share of the rows that each retraining leaves out.
        by_slice: the same of each slice; empty where there is one.

    Example:
        >>> x = torch.linspace(-1, 1, 20)
        >>> check = Check(predicted=x, actual=0.9 * x, metasmoothness=0.99, share=0.05)
        >>> round(check.lds, 2), round(check.slope, 2), check.trustworthy
        (1.0, 0.9, True)
    """

    predicted: Tensor
    actual: Tensor
    metasmoothness: float | None
    share: float
    by_slice: dict[str, Check] = field(default_factory=dict, repr=False)

    @property
    def lds(self) -> float:
        """The linear datamodelling score: Spearman's correlation of predicted and actual changes.

        Park et al. 2023, arXiv:2303.14186, Definition 2.3. NaN where either is constant.
        """
        if self.predicted.std() == 0 or self.actual.std() == 0:
            return math.nan
        return float(spearmanr(self.predicted.numpy(), self.actual.numpy()).statistic)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of ``lds``, by Fisher's transformation.

        The variance of the transformed rank correlation is (1 + ρ²/2)/(R − 3): Bonett and Wright
        2000, doi:10.1007/BF02294183.
        """
        rho = min(max(self.lds, -0.9999), 0.9999)
        half = 1.96 * math.sqrt((1 + rho**2 / 2) / max(len(self.actual) - 3, 1))
        return math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)

    @property
    def slope(self) -> float:
        """The slope of the regression of actual on predicted changes; 1 for exact scores."""
        x, y = self.predicted - self.predicted.mean(), self.actual - self.actual.mean()
        return float((x * y).sum() / (x * x).sum()) if float((x * x).sum()) else math.nan

    @property
    def trustworthy(self) -> bool:
        """Whether the interval of ``lds`` lies above `POOR` and ``lds`` is at least `GOOD`."""
        return self.lds >= GOOD and self.interval[0] > POOR

    @property
    def advice(self) -> str:
        """What the numbers mean, and what to change."""
        if self.trustworthy:
            return "the scores predict retraining; they can be acted on"
        smoother = (
            "make the run smoother: larger batches, a lower learning rate, warm-up, or a larger "
            "epsilon in Adam (see docs/attribution.md for what each brings)"
        )
        rough = self.metasmoothness is not None and self.metasmoothness < GOOD
        if not rough:
            smoother = (
                "use the method unrolled, more retrainings for a narrower interval, or " + smoother
            )
        if not self.lds >= POOR:
            return f"the scores do not predict retraining: do not act on them; {smoother}"
        why = ", since the run is rough" if rough else ""
        return f"the scores predict retraining roughly{why}; {smoother}"

    def __str__(self) -> str:
        low, high = self.interval
        smooth = (
            "" if self.metasmoothness is None else f", metasmoothness {self.metasmoothness:.2f}"
        )
        return (
            f"LDS {self.lds:.2f} [{low:.2f}, {high:.2f}] over {len(self.actual)} retrainings "
            f"without {self.share:.0%} of the rows, slope {self.slope:.2f}{smooth}: {self.advice}"
        )


def check(
    setting: Setting,
    method: Method,
    by_slice: dict[str, Tensor],
    before: dict[str, float],
    *,
    retrainings: int = 20,
    share: float = 0.05,
    perturbation: float | None = 0.1,
    seed: int = 0,
) -> Check:
    """Retrain without random rows, in the same order, and compare the changes of Φ.

    Args:
        setting: the run and Φ.
        method: how the scores were computed.
        by_slice: the scores, by slice.
        before: Φ after the run, by slice.
        retrainings: R.
        share: the share of the seen rows that each leaves out.
        perturbation: for ``metasmoothness``, how far the rows' weights move; None skips it.
            It is skipped for methods that do not differentiate the run.
        seed: of the random rows and signs.

    Raises:
        ProblemError: fewer than 5 retrainings, or a share that leaves out no row, or all.
        NonFiniteError: a retraining diverges.
    """
    run = setting.run
    rows = run.visits.nonzero().flatten()
    count = round(share * len(rows))
    if not isinstance(retrainings, int) or retrainings < 5:
        raise ProblemError(f"retrainings: a correlation needs at least 5, got {retrainings}")
    if not 1 <= count < len(rows):
        raise ProblemError(f"share: {share:g} of {len(rows)} rows leaves out {count}; change it")
    generator = torch.Generator().manual_seed(seed)
    known = {name: torch.nan_to_num(values) for name, values in by_slice.items()}
    predicted: dict[str, list[float]] = {name: [] for name in known}
    actual: dict[str, list[float]] = {name: [] for name in known}
    for _ in range(retrainings):
        out = rows[torch.randperm(len(rows), generator=generator)[:count]]
        with run.without(out):
            after = setting.value()
        for name, values in known.items():
            predicted[name].append(-float((values * run.center.cpu())[out].sum()))
            actual[name].append(after[name] - before[name])
    smoothness = None
    if perturbation is not None and method.whole_run:  # of another method it is not the run's
        smoothness = metasmoothness(setting, method, setting.whole(known), perturbation, generator)
    each = {
        name: Check(_exact(predicted[name]), _exact(actual[name]), smoothness, share)
        for name in known
    }
    return Check(
        setting.whole({name: one.predicted for name, one in each.items()}),
        setting.whole({name: one.actual for name, one in each.items()}),
        smoothness,
        share,
        each if len(each) > 1 else {},
    )


def metasmoothness(
    setting: Setting,
    method: Method,
    here: Tensor,
    perturbation: float,
    generator: torch.Generator,
) -> float:
    """The cosine between the scores ``here`` and those at v = 1 ± ``perturbation``; see `Check`.

    Raises:
        NonFiniteError: the run diverges with these weights.
    """
    run = setting.run
    signs = torch.randint(0, 2, (len(run.center),), generator=generator) * 2 - 1
    moved = run.center * (1 + perturbation * signs.to(run.center))
    with run.repeated(moved, keep=True) as checkpoints:
        there = setting.whole(scores(setting, method, checkpoints)[0])
    return float(torch.cosine_similarity(here, torch.nan_to_num(there), dim=0))


def _exact(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
