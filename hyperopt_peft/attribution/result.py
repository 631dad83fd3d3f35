"""`Attribution`: the scores of the training rows, their check and their uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.attribution.check import ScoreCheck, check_scores
from hyperopt_peft.attribution.scores import ScoreEstimator, Trained, scores
from hyperopt_peft.attribution.suspects import Suspects, suspects
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.plots import row_scores
from hyperopt_peft.utils.tables import cells, write_csv

#: The note in tables and pictures before a check.
UNCHECKED = "unchecked: call check() before relying on them"


@dataclass
class Attribution:
    """A score per training row: the derivative of the evaluation loss Φ in the row's weight v.

    Attributes:
        scores: dΦ/dv, ``(n,)`` in float64. Positive: harmful. NaN: the run never saw the row.
        losses: the mean training loss of each row over its visits, ``(n,)``; for rows with several
            labels, relative to the mean number of labels of a row in the batch.
        value: Φ after the run.
        settings: metadata of the run and the estimator; ``seconds`` is the training time.
        columns: the columns of the training rows to show, by name.
        numbers: the number to show for each row; by default its index.
        checked: the last `check`, or None.
        trained, estimator: what was trained, and the estimator of the scores, for retrainings.

    Example:
        >>> scores = torch.tensor([0.5, -1.0, 0.1])
        >>> result = Attribution(scores, losses=scores, value=0.3, settings={})
        >>> result.ranks().tolist(), result.without(1 / 3), result.ends(1)
        ([1, 3, 2], [1, 2], ([0], [1]))
    """

    scores: Tensor
    losses: Tensor
    value: float
    settings: dict[str, Any]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    numbers: Sequence[int] = ()
    checked: ScoreCheck | None = None
    trained: Trained | None = field(default=None, repr=False)
    estimator: ScoreEstimator | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.numbers = self.numbers or range(len(self.scores))

    @classmethod
    def of(cls, trained: Trained, estimator: ScoreEstimator) -> Attribution:
        """The scores of ``trained``, whatever its source.

        Raises:
            NonFiniteError: a loss, a gradient or a score is NaN or infinite.
        """
        found, cost = scores(trained, estimator)
        run, unseen = trained.run, trained.run.visits == 0
        settings = {
            "estimator": estimator.name,
            "steps": len(run.steps),
            "rows": len(run.row_weights),
            "unseen": int(unseen.sum()),
            "variables": sum(v.numel() for v in run.variables),
            "model": "adapter",
            **run.settings,
            **cost,
        }
        return cls(
            found.masked_fill(unseen, torch.nan),
            run.losses / run.visits,
            trained.evaluation.value(),
            settings,
            trained.columns,
            trained=trained,
            estimator=estimator,
        )

    def check(
        self,
        retrainings: int = 20,
        *,
        share: float = 0.05,
        perturbation: float | None = 0.1,
        seed: int = 0,
    ) -> ScoreCheck:
        """How well the scores predict retrainings without random rows; see `ScoreCheck`.

        Args:
            retrainings: R, at least 5; use 20 or more. Each takes ``settings["seconds"]``.
            share: the share of the seen rows that each retraining leaves out.
            perturbation: the change of the row weights that measures the metasmoothness, at the
                cost of another attribution; None skips it. It needs the estimator unrolled.
            seed: the seed of the random rows and signs.

        Raises:
            ProblemError: fewer than 5 retrainings, or a share that leaves out no row, or all.
            NonFiniteError: a retraining diverges.
        """
        how = retrainings, share, perturbation, seed
        assert self.trained is not None and self.estimator is not None
        self.checked = check_scores(self.trained, self.estimator, self.scores, self.value, *how)
        return self.checked

    def ranks(self) -> Tensor:
        """The rank of each row, ``(n,)``: 1 for the most harmful row, 0 for an unseen row."""
        order = torch.argsort(torch.nan_to_num(self.scores, nan=-torch.inf), descending=True)
        return (order.argsort() + 1).masked_fill(self.scores.isnan(), 0)

    def weights(self) -> Tensor:
        """Row weights ``(n,)`` of mean 1 for another training: lower for a more harmful row.

        v_i ∝ clip(1 − (s_i − s̄)/σ, 0, 2), with the mean s̄ and the standard deviation σ of the
        scores: one step against the gradient. An unseen row has 1 before scaling.
        """
        seen = self.scores[~self.scores.isnan()]
        deviation = float(seen.std()) if len(seen) > 1 else 0.0
        offsets = (self.scores - seen.mean()) / (deviation or torch.inf)
        weights = (1 - torch.nan_to_num(offsets)).clamp(0, 2)
        return weights / weights.mean()

    def without(self, share: float) -> list[int]:
        """The rows to keep, in order: all but the ``share`` with the largest positive scores.

        Training on these rows alone has other batches, so the scores predict it less well. With a
        weight of 0 for the other rows the batches stay the same.

        Raises:
            ProblemError: a share that is not between 0 and 1.
        """
        if not 0 < share < 1:
            raise ProblemError(f"share: must be between 0 and 1, got {share}")
        worst = {*self.ends(max(1, round(share * len(self.scores))))[0]}
        return [row for row in range(len(self.scores)) if row not in worst]

    def suspects(self, folds: int = 5, *, seed: int = 0) -> Suspects:
        """Rows whose labels may be wrong, by ``folds`` trainings; see `Suspects`.

        Raises:
            ProblemError: the training is a level of your own, rows do not have one class each, or
                there are fewer than 2 folds, or more than rows.
            NonFiniteError: a training without a fold diverges.
        """
        assert self.trained is not None
        return suspects(self.trained, folds, seed)

    def ends(self, count: int) -> tuple[list[int], list[int]]:
        """The up to ``count`` most harmful rows, and as many of the most helpful."""
        order = torch.argsort(torch.nan_to_num(self.scores), descending=True).tolist()
        hurting = [row for row in order if self.scores[row] > 0]
        helping = [row for row in reversed(order) if self.scores[row] < 0]
        return hurting[:count], helping[:count]

    def table(self, count: int = 10) -> str:
        """The ``count`` most harmful and the ``count`` most helpful rows, as lines of text."""
        lines = []
        for title, rows in zip(("most harmful", "most helpful"), self.ends(count), strict=True):
            lines.append(f"{title}:")
            lines += [f"{self.scores[row]:+11.2e} {self.line(row)}" for row in rows]
        return "\n".join(lines if self.checked else [*lines, f"these scores are {UNCHECKED}"])

    def to_csv(
        self,
        path: str | Path,
        extra: Mapping[str, Sequence[Any]] | None = None,
        *,
        escape_formulas: bool = False,
    ) -> None:
        """Write row, the data's columns, score, rank, weight and training loss.

        A data column with one of these names becomes ``data_…``. ``extra`` adds columns by name.
        For ``escape_formulas`` see `write_csv`.
        """
        results: dict[str, Sequence[Any]] = {
            "score": self.scores.tolist(),
            "rank": self.ranks().tolist(),
            "weight": self.weights().tolist(),
            "training_loss": self.losses.tolist(),
            **(extra or {}),
        }
        data = {
            f"data_{name}" if name in {"row", *results} else name: values
            for name, values in self.columns.items()
        }
        table = {"row": self.numbers, **data, **results}
        rows = zip(*table.values(), strict=True)
        write_csv(path, table, rows, escape_formulas=escape_formulas)

    def plot(self, path: str | Path | None = None, count: int = 10) -> Any:
        """A matplotlib figure: the distribution of the scores, and ``count`` rows at both ends.

        It is also written to the file ``path``, whose suffix gives the format.
        """
        hurting, helping = self.ends(count)
        lines = {row: self.line(row, width=44) for row in (*hurting, *reversed(helping))}
        note = str(self.checked).partition(":")[0] if self.checked else UNCHECKED
        return row_scores(self.scores.numpy(), lines, note, path)

    def line(self, row: int, width: int = 80) -> str:
        """The number and the columns of ``row``, each column at most ``width`` characters."""
        return f"{self.numbers[row]:6d}  {cells(self.columns, row, width)}".rstrip()
