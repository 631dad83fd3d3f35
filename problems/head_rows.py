"""The rows of a mix as features: what a head is trained on in place of the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.problems.data_sources import SOURCE
from hyperopt_peft.problems.features import Features
from hyperopt_peft.problems.source_data import SourceData
from hyperopt_peft.problems.votes import NO_VOTE, VOTES, one_source_more, one_vote, voted


@dataclass(frozen=True)
class HeadRows:
    """Features of the sources' rows and of the trusted ones.

    Attributes:
        names: the sources, then ``trusted``.
        sources: m rows, or tokens, of the sources.
        groups: the number of the source of each, ``(m,)``; or the `votes` of the K sources on it,
            ``(m, K)`` or ``(m, K, C)``.
        trusted: the n trusted rows, or their tokens.
        n: the number of the trusted rows.
        trusted_votes: those on the trusted rows, if they are known.
        sampled: of texts, the share of each source's labels, and of the trusted rows', that are
            among these, ``(K + 1,)``.
        outputs: the number of classes, or of numbers to predict.
        problem_type: as in `Head`.

    Example:
        >>> features = Features(torch.eye(4), torch.tensor([0, 1, 0, 1]), torch.arange(4))
        >>> groups = torch.tensor([0, 0, 1, 2])  # the last row is trusted
        >>> rows = HeadRows.of(("web", "books", "trusted"), features, groups, outputs=2)
        >>> rows.counts(rows.groups), rows.trusted.labels
        (tensor([2, 1, 1]), tensor([1]))
    """

    names: tuple[str, ...]
    sources: Features
    groups: Tensor
    trusted: Features
    n: int
    outputs: int
    trusted_votes: Tensor | None = None
    problem_type: str | None = None
    sampled: Tensor | None = None

    @classmethod
    def of(
        cls, names: tuple[str, ...], features: Features, groups: Tensor, **rest: Any
    ) -> HeadRows:
        """The rows of ``features``, of which the ones with the last group are trusted.

        ``groups`` are those of the data's rows, as in a batch of `Mixture`. The features are
        standardized. A trusted row without a label is left out.
        """
        features, last = features.standardized(), len(names) - 1
        is_trusted = groups == last if groups.dim() == 1 else voted(groups)[:, last]
        trusted = features.row[is_trusted[features.row]].unique()
        sources = features.select((~is_trusted).nonzero().flatten())
        of_sources = groups[sources.row] if groups.dim() == 1 else groups[sources.row, :last]
        chosen = features.select(trusted)
        numbered = replace(chosen, row=torch.searchsorted(trusted, chosen.row))
        return cls(names, sources, of_sources, numbered, len(trusted), **rest)

    @property
    def votes(self) -> bool:
        """Whether the sources vote on rows."""
        return self.groups.dim() > 1

    @property
    def numbers(self) -> bool:
        """Whether labels are no classes."""
        return self.sources.labels.is_floating_point()

    def counts(self, groups: Tensor) -> Tensor:
        """The rows, labels or votes of each source in ``groups``, and the trusted ones, ``(K+1,)``.

        Of a sample they are those of all that it stands for.
        """
        if self.votes:
            counts = voted(groups).sum(0)
        else:
            counts = groups[groups != NO_VOTE].bincount(minlength=len(self.names) - 1)
        counts = torch.cat([counts, torch.tensor([len(self.trusted.x)])])
        return counts if self.sampled is None else counts / self.sampled

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
        keep = voted(groups).any(1) if self.votes else groups != NO_VOTE
        x = torch.cat([sources.x[keep], trusted.x])
        if self.votes:
            votes = one_source_more(groups[keep])
            of_trusted = one_vote(votes, trusted.labels, last)
            return {"features": x, VOTES: torch.cat([votes, of_trusted])}
        return {
            "features": x,
            "labels": torch.cat([sources.labels[keep], trusted.labels]),
            SOURCE: torch.cat([groups[keep], torch.full((len(trusted.x),), last)]),
        }


def of_classes(labels: Tensor, like: Tensor, most: int) -> tuple[Tensor, int]:
    """The tokens ``labels`` as classes, and their number: those of ``like``, and one of all others.

    Only the ``most`` most frequent of ``like`` have a class of their own.

    Example:
        >>> of_classes(torch.tensor([7, 5, 9, 8]), like=torch.tensor([9, 7, 7]), most=10)
        (tensor([0, 2, 1, 2]), 3)
    """
    tokens, counts = like.unique(return_counts=True)
    tokens = tokens[counts.argsort(descending=True, stable=True)[:most]].sort().values
    place = torch.searchsorted(tokens, labels).clamp(max=len(tokens) - 1)
    return place.where(tokens[place] == labels, len(tokens)), len(tokens) + 1


def kept(data: SourceData, groups: Tensor, rows: HeadRows) -> SourceData:
    """``data`` with the ``groups`` of ``rows`` in place of their own; see `HeadRows.batch`."""
    if rows.votes:
        return data.with_votes(one_source_more(groups))
    return data.with_sources(rows.sources.row[groups != NO_VOTE].unique().tolist())
