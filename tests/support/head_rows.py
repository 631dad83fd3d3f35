"""Rows of a head: sources that are right, wrong by a class, and random, and trusted rows."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.problems.features import Features
from hyperopt_peft.problems.head_mix import HeadMix
from hyperopt_peft.problems.head_rows import HeadRows

CLASSES, SIZE = 3, 5
NAMES = ("good", "bad", "noise", "trusted")


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features ``(count, 5)`` around the mean of their class, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(count) % CLASSES
    noise = torch.randn(count, SIZE, generator=generator)
    return 2 * torch.eye(CLASSES, SIZE)[classes] + noise, classes


def answers(classes: Tensor, seed: int = 0) -> list[Tensor]:
    """What the three sources say."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(0, CLASSES, classes.shape, generator=generator)
    return [classes, (classes + 1) % CLASSES, random]


def by_source(count: int = 24, trusted: int = 18) -> HeadRows:
    """``count`` rows of each source, then the trusted ones."""
    x, classes = points(3 * count + trusted, 0)
    groups = torch.arange(3).repeat_interleave(count)
    labels = torch.stack(answers(classes[: 3 * count]))[groups, torch.arange(3 * count)]
    features = Features(x, torch.cat([labels, classes[3 * count :]]), torch.arange(len(x)))
    groups = torch.cat([groups, torch.full((trusted,), 3)])
    return HeadRows.of(NAMES, features, groups, outputs=CLASSES)


def by_votes(count: int = 24, trusted: int = 18) -> HeadRows:
    """Votes of the sources on two thirds of the rows each, and on all trusted rows."""
    x, classes = points(count + trusted, 0)
    votes = torch.stack(answers(classes), 1)
    of_trusted = votes[count:].clone()
    votes[torch.arange(count), torch.arange(count) % 3] = -1
    groups = torch.full((count + trusted, 4), -1)
    groups[:count, :3], groups[count:, 3] = votes[:count], classes[count:]
    features = Features(x, votes.amax(1), torch.arange(len(x)))
    features.labels[count:] = classes[count:]
    return HeadRows.of(NAMES, features, groups, outputs=CLASSES, trusted_votes=of_trusted)


def as_probabilities(votes: Tensor, classes: int = CLASSES, sure: float = 1.0) -> Tensor:
    """Votes for a class as probabilities, ``sure`` for that class and the rest for all others."""
    rest = torch.full((*votes.shape, classes), (1 - sure) / (classes - 1))
    soft = rest.scatter(-1, votes.clamp(min=0)[..., None], sure)
    return soft * (votes != -1)[..., None]


def by_soft_votes(sure: float = 0.8) -> HeadRows:
    """`by_votes` with probabilities."""
    rows = by_votes()
    assert rows.trusted_votes is not None
    soft = [as_probabilities(each, sure=sure) for each in (rows.groups, rows.trusted_votes)]
    return replace(rows, groups=soft[0], trusted_votes=soft[1])


def by_tokens(count: int = 20, trusted: int = 8, tokens: int = 4) -> HeadRows:
    """Rows of four tokens with a class each, of the three sources by turns."""
    x, classes = points(tokens * (count + trusted), 0)
    row = torch.arange(count + trusted).repeat_interleave(tokens)
    groups = torch.arange(count + trusted) % 3
    labels = torch.stack(answers(classes))[groups[row], torch.arange(len(row))]
    groups[count:] = 3
    labels = torch.where(row < count, labels, classes)
    return HeadRows.of(NAMES, Features(x, labels, row), groups, outputs=CLASSES)


def by_numbers(count: int = 24, trusted: int = 18) -> HeadRows:
    """A number of each row: right, its negative, or random."""
    x, _ = points(3 * count + trusted, 0)
    target = x[:, :1] - x[:, 1:2]
    groups = torch.arange(3).repeat_interleave(count)
    generator = torch.Generator().manual_seed(1)
    target[count : 2 * count] *= -1
    target[2 * count : 3 * count] = 2 * torch.randn(count, 1, generator=generator)
    groups = torch.cat([groups, torch.full((trusted,), 3)])
    features = Features(x, target, torch.arange(len(x)))
    return HeadRows.of(NAMES, features, groups, outputs=1)


ROWS: dict[str, Callable[[], HeadRows]] = {
    "rows": by_source,
    "votes": by_votes,
    "soft votes": by_soft_votes,
    "tokens": by_tokens,
    "numbers": by_numbers,
}


def mix(kind: str = "rows", **options: Any) -> HeadMix:
    return HeadMix(ROWS[kind](), **{"steps": 8, **options})
