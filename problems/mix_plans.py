"""The methods to train on sources and trusted rows, each as a `Plan`.

Each takes a `Mix`, of a head or of an adapter. The simple ones look at the sources once: at their
agreement with a model of the trusted rows, at their votes on trusted rows, or at what a training
without them gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from hyperopt_peft.problems.head_mix import HeadMix, Plan
from hyperopt_peft.problems.head_rows import HeadRows
from hyperopt_peft.problems.votes import NO_VOTE, decided, one_vote, only, summed, voted
from hyperopt_peft.problems.votes import agreement as agreement_of_votes

TRUSTED_ONLY = "trusted rows only"
EQUAL = "everything, equal weights"
SOURCES_ALIKE = "everything, each source alike"
THEN_TRUSTED = "everything, then the trusted rows"
AGREEMENT = "weights by agreement with the trusted rows"
LOG_ODDS = "weights by log odds of that agreement"
FILTERED = "everything but rows that disagree"
LABEL_MODEL = "labels of a label model"
WITHOUT_ONE = "everything but one source"
BELOW_HALF = "without sources below one half on trusted rows"
COORDINATES = "sources left out one after another"
LEARNED = "learned weights"
LEARNED_THEN = "learned weights, then the trusted rows"
#: The agreement with the trusted model from which a row is kept.
AGREES = 0.5
#: The most sources that are tried one at a time, the largest ones.
TRIED = 12
#: The rounds of expectation and maximization of a label model.
ROUNDS = 30
#: The settings that are tried: the λ of a training on the trusted rows alone, or how often they
#: are repeated; the learned weights have one of their own for the trusted rows.
SETTINGS = {
    TRUSTED_ONLY: (0.03, 0.1, 0.3),
    THEN_TRUSTED: (0.1, 0.3, 1.0),
    LEARNED: (1.0,),
    LEARNED_THEN: (0.1, 0.3, 1.0),
}
REPEATS = (1.0, 10.0, 30.0, 100.0)


class Mix(Protocol):
    """What the methods read: a `HeadMix`, or the `Baselines` of an adapter."""

    @property
    def rows(self) -> HeadRows:
        """The sources and labels of the rows; their features are not read."""

    @property
    def learned(self) -> Plan:
        """The weights that the search finds."""

    def predictions(self) -> Tensor:
        """The most likely class of each of the sources' rows by a model of the trusted ones."""

    def source_losses(self) -> Tensor:
        """The loss of each of the sources' rows by that model."""

    def objective(self, plan: Plan) -> float:
        """The mean loss of the trusted rows after a training by ``plan``, which has them too."""


def trusted_only(mix: Mix) -> Plan:
    """The trusted rows alone."""
    return Plan(torch.eye(len(mix.rows.names))[-1])


def equal(mix: Mix) -> Plan:
    """All rows with the same weight."""
    return Plan(torch.ones(len(mix.rows.names)))


def sources_alike(mix: Mix) -> Plan:
    """Each source with the same share of the loss."""
    return of_equal_shares(mix.rows.counts(mix.rows.groups))


def of_equal_shares(counts: Tensor) -> Plan:
    """All rows, with which each source has the same share; ``counts`` are of rows, or labels."""
    counts = counts.clamp(min=1)
    return Plan(counts.min() / counts)


def then_trusted(mix: Mix) -> Plan:
    """All rows with the same weight, then the trusted ones."""
    return Plan(torch.ones(len(mix.rows.names)), then_trusted=True)


def agreement(mix: Mix) -> Plan:
    """Each source with its agreement with a model of the trusted rows."""
    return _of_sources(_shares(mix, _agreements(mix)))


def log_odds(mix: Mix) -> Plan:
    """Each source with the log odds of that agreement, as in naive Bayes; below 0 it is out.

    log(q/(1 − q)·(C − 1)) for an agreement q of C classes, by the largest of them.
    """
    share = _shares(mix, _agreements(mix))
    odds = (share / (1 - share) * max(1, mix.rows.outputs - 1)).log().clamp(min=0)
    return _of_sources(odds / odds.max().clamp(min=1e-6))


def filtered(mix: Mix) -> Plan:
    """The rows, or votes, whose class a model of the trusted rows has; of numbers the better half.

    Without any these are the trusted rows alone.
    """
    groups = mix.rows.groups
    if mix.rows.votes:
        keep = decided(groups) == mix.predictions()[:, None]
    else:  # of tokens, the rows that agree on a half or more
        row, agrees = mix.rows.sources.row, _agreements(mix)
        counts, sums = row.bincount(), row.bincount(agrees)
        agrees = (sums / counts.clamp(min=1))[row].to(agrees.dtype)
        keep = agrees >= (agrees.median() if mix.rows.numbers else AGREES)
    if not keep.any():
        return trusted_only(mix)
    groups = only(groups, keep) if mix.rows.votes else groups.masked_fill(~keep, NO_VOTE)
    return Plan(torch.ones(len(mix.rows.names)), groups=groups)


def label_model(mix: Mix) -> Plan:
    """The most likely class of each row, of the votes alone.

    Source k gives the true class with probability q_k and each other one with the same: Dawid &
    Skene 1979, doi:10.2307/2346806, with one parameter a source, by expectation and maximization.
    The votes on trusted rows, where they are known, are of known classes.
    """
    rows, votes, classes = mix.rows, mix.rows.groups, mix.rows.outputs
    cast = voted(votes)
    counts, right = cast.sum(0).double(), torch.zeros(votes.shape[1]).double()
    if rows.trusted_votes is not None:
        counts = counts + voted(rows.trusted_votes).sum(0)
        right += agreement_of_votes(rows.trusted_votes, rows.trusted.labels).sum(0)
    posterior = summed(votes, cast.double(), classes) / cast.sum(1, keepdim=True).clamp(min=1)
    for _ in range(ROUNDS):
        hits = agreement_of_votes(votes, posterior).sum(0)
        q = (hits + right + 1) / (counts + classes)
        odds = (q / (1 - q) * (classes - 1)).log().expand(len(votes), -1)
        posterior = (summed(votes, odds, classes) + posterior.mean(0).log()).softmax(1)
    groups = only(one_vote(votes, posterior.argmax(1), 0), cast.any(1, keepdim=True))
    return Plan(torch.ones(len(rows.names)), groups=groups)


def without_one(mix: Mix) -> Plan:
    """All sources but the one, of the largest, without which the trusted loss is lowest."""
    return min((_out(mix, [source]) for source in _largest(mix)), key=mix.objective)


def below_half(mix: Mix) -> Plan:
    """Without the sources whose votes on trusted rows are right in less than a half of them.

    One right and one wrong vote more (a Beta(1, 1) prior) keep sources with few votes.
    """
    votes = mix.rows.trusted_votes
    assert votes is not None
    right = (decided(votes) == mix.rows.trusted.labels[:, None]).sum(0)
    share = (right + 1) / (voted(votes).sum(0) + 2)
    return _out(mix, (share < 0.5).nonzero().flatten().tolist())


def coordinates(mix: Mix) -> Plan:
    """A coordinate search: each of the largest sources is left out if the trusted loss falls."""
    out: list[int] = []
    best = mix.objective(_out(mix, out))
    for source in _largest(mix):
        loss = mix.objective(_out(mix, [*out, source]))
        if loss < best:
            out, best = [*out, source], loss
    return _out(mix, out)


def learned(mix: Mix) -> Plan:
    """The weights that a search finds."""
    return mix.learned


def learned_then(mix: Mix) -> Plan:
    """The same weights, then the trusted rows."""
    return replace(mix.learned, then_trusted=True)


def methods_of(mix: Mix) -> dict[str, Callable[[Mix], Plan]]:
    """The methods for a kind of rows, from the cheapest to the dearest."""
    return dict(_methods(mix))


def _methods(mix: Mix) -> Iterator[tuple[str, Callable[[Mix], Plan]]]:
    yield TRUSTED_ONLY, trusted_only
    yield EQUAL, equal
    yield SOURCES_ALIKE, sources_alike
    if mix.rows.trusted_votes is not None:
        yield BELOW_HALF, below_half
    if mix.rows.votes:
        yield LABEL_MODEL, label_model
    yield AGREEMENT, agreement
    if not mix.rows.numbers:
        yield LOG_ODDS, log_odds
    if mix.rows.sampled is None:  # a head knows some of a text's labels
        yield FILTERED, filtered
    yield THEN_TRUSTED, then_trusted
    yield WITHOUT_ONE, without_one
    yield COORDINATES, coordinates
    yield LEARNED, learned
    yield LEARNED_THEN, learned_then


def plan_of(mix: HeadMix, method: str, setting: float | None = None) -> Plan:
    """The plan of ``method``, with a ``setting`` as `compare_baselines` chooses one.

    Args:
        mix: the head.
        method: one of `methods_of`.
        setting: one of `settings_of`; the first with None.
    """
    plan = methods_of(mix)[method](mix)
    return with_setting(plan, settings_of(method)[0] if setting is None else setting)


def settings_of(method: str) -> tuple[float, ...]:
    """The settings that are tried of a method."""
    return SETTINGS.get(method, REPEATS)


def with_setting(plan: Plan, setting: float) -> Plan:
    """``plan`` with a λ for its training on the trusted rows alone, or with these repeated."""
    if plan.trusted_only or plan.then_trusted:
        return replace(plan, penalty=setting)
    return replace(plan, a=torch.cat([plan.a[:-1] / setting, plan.a[-1:]]))


def _of_sources(a: Tensor) -> Plan:
    return Plan(torch.cat([a.to(torch.float32), torch.ones(1)]))


def _out(mix: Mix, sources: list[int]) -> Plan:
    """All rows alike, without ``sources``."""
    a = torch.ones(len(mix.rows.names))
    a[sources] = 0
    return Plan(a)


def _largest(mix: Mix) -> list[int]:
    """The largest sources."""
    counts = mix.rows.counts(mix.rows.groups)[:-1]
    return counts.argsort(descending=True)[:TRIED].tolist()


def _agreements(mix: Mix) -> Tensor:
    """How far a model of the trusted rows agrees with each row or vote, ``(m,)`` or ``(m, K)``.

    Of a class the agreement is 0 or 1, of a vote its probability of the model's class, and NaN
    without one; of numbers exp(−loss).
    """
    rows = mix.rows
    if rows.votes:
        agrees = agreement_of_votes(rows.groups, mix.predictions())
        return agrees.masked_fill(~voted(rows.groups), torch.nan)
    if rows.numbers:
        return (-mix.source_losses()).exp()
    return (mix.predictions() == rows.sources.labels).float()


def _shares(mix: Mix, agrees: Tensor) -> Tensor:
    """The mean agreement of each source, ``(K,)``, with one right and C − 1 wrong ones more."""
    if mix.rows.votes:
        sums, counts = agrees.nansum(0), (~agrees.isnan()).sum(0)
    else:
        size = len(mix.rows.names) - 1
        sums = mix.rows.groups.bincount(agrees, size)
        counts = mix.rows.groups.bincount(minlength=size)
    return ((sums + 1) / (counts + max(2, mix.rows.outputs))).clamp(1e-3, 1 - 1e-3)
