"""Retrains without the most harmful rows, and compares with simple alternatives on a test set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hyperopt_peft.attribution.scores import Trained
from hyperopt_peft.utils.tables import aligned

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Removal:
    """Metrics on a test set, such as ``loss``, after trainings without some rows.

    Attributes:
        count: the number of rows left out.
        plain: the metrics after training on all rows.
        without: the metrics without the ``count`` rows with the largest scores.
        highest_loss: the metrics without the ``count`` rows with the highest training loss.
        random: the metrics without ``count`` random rows, once for each draw.
        with_evaluation: the metrics after training on the evaluation rows too, with as many passes;
            None if this is not possible, as for two levels or levels of your own.

    Example:
        >>> plain, less, more = {"loss": 1.0}, {"loss": 0.9}, {"loss": 1.05}
        >>> print(Removal(3, plain, less, more, [more]).verdict)
        leaving 3 rows out by score moves the loss by -0.1000: a gain that no other removal has
    """

    count: int
    plain: Numbers
    without: Numbers
    highest_loss: Numbers
    random: Sequence[Numbers]
    with_evaluation: Numbers | None = None

    @property
    def verdict(self) -> str:
        """Whether removal by score improves the test accuracy, or without an accuracy the loss."""
        name, sign = ("accuracy", 1) if "accuracy" in self.plain else ("loss", -1)

        def move(numbers: Numbers) -> float:
            return numbers[name] - self.plain[name]

        gain, noise = sign * move(self.without), max(map(abs, map(move, self.random)), default=0.0)
        if gain <= noise:
            judgement = f"no gain beyond random removals, which move it by up to {noise:.4f}"
        elif gain > sign * move(self.highest_loss):
            judgement = "a gain that no other removal has"
        else:
            judgement = "a gain, but removal by highest loss gains at least as much"
        text = f"leaving {self.count} rows out by score moves the {name} by "
        text += f"{move(self.without):+.4f}: {judgement}"
        if self.with_evaluation is not None:
            other = move(self.with_evaluation)
            text += f"; training on the evaluation rows too moves it by {other:+.4f}"
        return text

    def table(self) -> list[list[str]]:
        """The cells of a table: the heads, then a row for each training."""
        rows = [
            ("on all rows", self.plain),
            (f"without {self.count} rows by score", self.without),
            (f"without {self.count} of highest loss", self.highest_loss),
            *((f"without {self.count} random rows", values) for values in self.random),
        ]
        if self.with_evaluation is not None:
            rows.append(("as many passes, evaluation rows too", self.with_evaluation))
        cells = [[title, *(f"{x:.4f}" for x in numbers.values())] for title, numbers in rows]
        return [["training", *self.plain], *cells]

    def __str__(self) -> str:
        return f"{self.verdict}\n{aligned(self.table())}"


def remove(
    trained: Trained,
    scores: Tensor,
    losses: Tensor,
    worst: list[int],
    test: Any,
    draws: int,
    seed: int,
) -> Removal:
    """Train without the rows ``worst``, and for comparison; see `Attribution.removal`."""
    measure, count = trained.test(test), len(worst)

    @torch.no_grad()
    def numbers() -> Numbers:
        result = measure()
        named = result if isinstance(result, Mapping) else {"loss": result}
        return {name: float(value) for name, value in named.items()}

    highest = torch.nan_to_num(losses, nan=-torch.inf).topk(count).indices.tolist()
    generator = torch.Generator().manual_seed(seed)
    seen = (~scores.isnan()).nonzero().flatten()
    random = [seen[torch.randperm(len(seen), generator=generator)[:count]] for _ in range(draws)]
    results = []
    for rows in tqdm([[], worst, highest, *random], "removal", disable=not trained.progress):
        with trained.run.without(rows):
            results.append(numbers())
    with_evaluation = None
    if trained.enlarged is not None:
        with trained.enlarged(seed):
            with_evaluation = numbers()
    plain, without, highest_loss, *others = results
    return Removal(count, plain, without, highest_loss, others, with_evaluation)
