"""Checks scores against retrainings without random rows, and measures the run's smoothness."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import trange

from hyperopt_peft.attribution.run import Run
from hyperopt_peft.attribution.scores import ScoreEstimator, Trained, scores
from hyperopt_peft.errors import ProblemError

#: Scores are trustworthy if LDS and metasmoothness reach the first, worthless below the second.
GOOD, POOR = 0.8, 0.4
#: Trustworthy scores have a slope in this range: their sizes are right within a third. Smooth runs
#: have slopes of 1.05 to 1.3, since leaving out a row lets the others pull further.
SLOPES = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class ScoreCheck:
    """Predicted and actual changes of Φ in retrainings without random rows.

    Attributes:
        predicted: −Σ s_i over the rows left out, ``(R,)``.
        actual: the changes of Φ in the retrainings, ``(R,)``.
        metasmoothness: the cosine between the scores and the scores at v = 1 ± ``perturbation``
            with random signs; near 1 for a smooth run, None if not measured. After Engstrom et al.
            2025 (arXiv:2503.13751, §3).
        share: the share of the rows that each retraining leaves out.
        of_head: whether the scores are a head's, which has no learning rate or batches to change.

    Example:
        >>> x = torch.linspace(-1, 1, 20)
        >>> check = ScoreCheck(predicted=x, actual=0.9 * x, metasmoothness=0.99, share=0.05)
        >>> round(check.lds, 2), round(check.slope, 2), check.trustworthy
        (1.0, 0.9, True)
    """

    predicted: Tensor
    actual: Tensor
    metasmoothness: float | None
    share: float
    of_head: bool = False

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
        """A 95 % interval of ``lds`` over retrainings of the same run; see `rank_interval`."""
        return rank_interval(self.lds, len(self.actual))

    @property
    def slope(self) -> float:
        """The slope of the regression of actual on predicted changes; 1 for exact scores."""
        x, y = self.predicted - self.predicted.mean(), self.actual - self.actual.mean()
        return float((x * y).sum() / (x * x).sum()) if float((x * x).sum()) else math.nan

    @property
    def trustworthy(self) -> bool:
        """Whether order and sizes of the scores are right: `ordered`, and ``slope`` in `SLOPES`."""
        return self.ordered and SLOPES[0] <= self.slope <= SLOPES[1]

    @property
    def ordered(self) -> bool:
        """Whether the interval of ``lds`` lies above `POOR` and ``lds`` is at least `GOOD`."""
        return self.lds >= GOOD and self.interval[0] > POOR

    @property
    def verdict(self) -> str:
        """Whether to rely on the scores, and if not, a remedy."""
        low, high = self.interval
        if self.trustworthy:
            return "the scores predict retraining without rows; test rows tell whether it is better"
        if self.ordered:
            return (
                "the scores order the rows as retraining does, but actual changes are "
                f"{self.slope:.2f} times the predicted ones: rely on the order, or multiply by this"
            )
        if low <= POOR and high >= GOOD:
            return (
                f"{len(self.actual)} retrainings cannot tell whether the scores predict "
                "retraining; check with 20 or more"
            )
        remedy = (
            "make the run smoother: warm-up, a lower learning rate, a larger epsilon in Adam, or "
            "larger batches (docs/attribution-reference.md)"
        )
        if self.of_head:
            remedy = "leave fewer rows out at a time (share), or check with more retrainings"
        elif self.metasmoothness is None or self.metasmoothness >= GOOD:
            remedy = f"use the estimator unrolled, check with more retrainings, or {remedy}"
        if not self.lds >= POOR:
            return f"the scores do not predict retraining: do not act on them; {remedy}"
        return f"the scores predict retraining roughly; {remedy}"

    def record(self) -> dict[str, Any]:
        """The numbers of the check, for a file."""
        names = ("lds", "interval", "slope", "metasmoothness", "share", "trustworthy", "verdict")
        return {
            **{name: getattr(self, name) for name in names},
            "predicted": self.predicted.tolist(),
            "actual": self.actual.tolist(),
        }

    def __str__(self) -> str:
        (low, high), smooth = self.interval, self.metasmoothness
        numbers = f"slope {self.slope:.2f}"
        if smooth is not None:
            numbers += f", metasmoothness {smooth:.2f}"
        return (
            f"LDS {self.lds:.2f} [{low:.2f}, {high:.2f}] over {len(self.actual)} retrainings "
            f"without {self.share:.0%} of the rows, {numbers}: {self.verdict}"
        )


def rank_interval(rho: float, count: int) -> tuple[float, float]:
    """A 95 % interval of the rank correlation ``rho`` of ``count`` pairs, at least 5.

    Fisher's transformation with the variance (1 + ρ²/2)/(n − 3) of Bonett & Wright 2000
    (doi:10.1007/BF02294183). For a perfect order, ρ is replaced by 1 − 6/(n³ − n), half an exchange
    of neighbours below 1; five pairs in perfect order then show only that ρ is above 0.16.
    """
    limit = 1 - 6 / (count**3 - count)
    middle = math.atanh(min(max(rho, -limit), limit)) if math.isfinite(rho) else math.nan
    half = 1.96 * math.sqrt((1 + math.tanh(middle) ** 2 / 2) / (count - 3))
    return math.tanh(middle - half), math.tanh(middle + half)


def check_scores(
    trained: Trained,
    estimator: ScoreEstimator,
    by_row: Tensor,
    before: float,
    retrainings: int,
    share: float,
    perturbation: float | None,
    seed: int,
) -> ScoreCheck:
    """See `Attribution.check`; ``before`` is Φ at the end of the run."""
    run = trained.run
    rows = run.visits.nonzero().flatten()
    count = round(share * len(rows))
    if not isinstance(retrainings, int) or retrainings < 5:
        raise ProblemError(f"retrainings: must be at least 5, got {retrainings}")
    if not 1 <= count < len(rows):
        raise ProblemError(f"share: {share:g} of {len(rows)} rows leaves out {count}; change it")
    generator = torch.Generator().manual_seed(seed)
    seen = torch.nan_to_num(by_row)
    predicted, actual = torch.zeros(2, retrainings, dtype=torch.float64)
    for number in trange(retrainings, desc="check", disable=not trained.progress):
        rows_out = rows[torch.randperm(len(rows), generator=generator)[:count]]
        with run.without(rows_out):
            actual[number] = trained.evaluation.value() - before
        predicted[number] = -(seen * run.row_weights.cpu())[rows_out].sum()
    smoothness = None
    if perturbation is not None and estimator.differentiates_run:
        smoothness = metasmoothness(trained, estimator, seen, perturbation, generator)
    return ScoreCheck(predicted, actual, smoothness, share, of_head=not isinstance(run, Run))


def metasmoothness(
    trained: Trained,
    estimator: ScoreEstimator,
    run_scores: Tensor,
    perturbation: float,
    generator: torch.Generator,
) -> float:
    """The cosine between ``run_scores`` and the scores at v = 1 ± ``perturbation``."""
    run = trained.run
    assert isinstance(run, Run)
    signs = torch.randint(0, 2, (len(run.row_weights),), generator=generator) * 2 - 1
    weights = run.row_weights * (1 + perturbation * signs.to(run.row_weights))
    with run.repeated(weights, keep=True) as checkpoints:
        moved_scores, _ = scores(trained, estimator, checkpoints)
    return float(torch.cosine_similarity(run_scores, torch.nan_to_num(moved_scores), dim=0))
