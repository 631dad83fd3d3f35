"""The rows of a mix as features: what a head is trained on in place of the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperopt_peft.problems.data_sources import NO_VOTE, SOURCE, VOTES
from hyperopt_peft.problems.features import Features
from hyperopt_peft.problems.source_data import SourceData


@dataclass(frozen=True)
class HeadRows:
    """Features of the sources' rows and of the trusted ones.

    Attributes:
        names: the sources, then ``trusted``.
        sources: m rows, or tokens, of the sources.
        groups: the number of the source of each, ``(m,)``; or the class that each source gives to
            it, ``(m, K)``, -1 for none.
        trusted: the n trusted rows, or their tokens.
        n: the number of the trusted rows.
        trusted_votes: the class that each source gives to a trusted row, ``(n, K)``, if it is
            known.
        outputs: the number of classes, or of numbers to predict.
        problem_type: as in `Head`.

    Example:
        >>> features = Features(torch.eye(4), torch.tensor([0, 1, 0, 1]), torch.arange(4))
        >>> groups = torch.tensor([0, 0, 1, 2])  # the last row is trusted
        >>> rows = HeadRows.of(("web", "books", "trusted"), features, groups, outputs=2)
        >>> rows.counts(rows.groups), rows.trusted.labels
        (tensor([2, 1]), tensor([1]))
    """

    names: tuple[str, ...]
    sources: Features
    groups: Tensor
    trusted: Features
    n: int
    outputs: int
    trusted_votes: Tensor | None = None
    problem_type: str | None = None

    @classmethod
    def of(
        cls, names: tuple[str, ...], features: Features, groups: Tensor, **rest: Any
    ) -> HeadRows:
        """The rows of ``features``, of which the ones with the last group are trusted.

        ``groups`` are those of the data's rows, as in a batch of `Mixture`, ``(n,)`` or ``(n, K)``.
        The features are standardized.
        """
        features, last = features.standardized(), len(names) - 1
        is_trusted = groups == last if groups.dim() == 1 else groups[:, last] != NO_VOTE
        trusted = is_trusted.nonzero().flatten()
        sources = features.select((~is_trusted).nonzero().flatten())
        of_sources = groups[sources.row] if groups.dim() == 1 else groups[sources.row, :last]
        chosen = features.select(trusted)
        numbered = replace(chosen, row=torch.searchsorted(trusted, chosen.row))
        return cls(names, sources, of_sources, numbered, len(trusted), **rest)

    @property
    def votes(self) -> bool:
        """Whether the sources vote on rows."""
        return self.groups.dim() == 2

    def counts(self, groups: Tensor) -> Tensor:
        """The rows, tokens or votes of each source in ``groups``, ``(K,)``."""
        if self.votes:
            return (groups != NO_VOTE).sum(0)
        return groups[groups != NO_VOTE].bincount(minlength=len(self.names) - 1)

    def with_trusted(self, rows: Tensor) -> HeadRows:
        """With these trusted rows alone, ``(n,)``, which increase; they are renumbered from 0."""
        chosen = self.trusted.select(rows)
        numbered = replace(chosen, row=torch.searchsorted(rows, chosen.row))
        votes = None if self.trusted_votes is None else self.trusted_votes[rows]
        return replace(self, trusted=numbered, n=len(rows), trusted_votes=votes)

    def without_features(self) -> HeadRows:
        """With one feature that is 0, of which a head learns a constant."""
        sources, trusted = (
            replace(each, x=torch.zeros_like(each.x[:, :1]))
            for each in (self.sources, self.trusted)
        )
        return replace(self, sources=sources, trusted=trusted)

    def batch(self, groups: Tensor) -> dict[str, Tensor]:
        """A batch of `Mixture` with the sources' rows and the trusted ones.

        ``groups`` are in place of the sources' own; a row of the group -1, or without a vote, is
        left out.
        """
        last, sources, trusted = len(self.names) - 1, self.sources, self.trusted
        keep = (groups != NO_VOTE).any(1) if self.votes else groups != NO_VOTE
        x = torch.cat([sources.x[keep], trusted.x])
        if self.votes:
            of_trusted = torch.full((len(trusted.x), last + 1), NO_VOTE)
            of_trusted[:, last] = trusted.labels
            return {
                "features": x,
                VOTES: torch.cat([pad(groups[keep], (0, 1), value=NO_VOTE), of_trusted]),
            }
        return {
            "features": x,
            "labels": torch.cat([sources.labels[keep], trusted.labels]),
            SOURCE: torch.cat([groups[keep], torch.full((len(trusted.x),), last)]),
        }


def kept(data: SourceData, groups: Tensor, rows: HeadRows) -> SourceData:
    """``data`` with the ``groups`` of ``rows`` in place of their own; see `HeadRows.batch`."""
    if rows.votes:
        return data.with_votes(pad(groups, (0, 1), value=NO_VOTE).numpy())
    return data.with_sources(rows.sources.row[groups != NO_VOTE].unique().tolist())
