"""The rows of a head: the same loss as `Mixture` has over the plain rows."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from hyperopt_peft.problems.data_sources import Mixture, SourceWeights
from hyperopt_peft.problems.example_weights import example_losses
from hyperopt_peft.problems.features import Features
from hyperopt_peft.problems.head import Head
from hyperopt_peft.problems.head_rows import HeadRows, kept, of_classes
from hyperopt_peft.problems.source_data import SourceData
from tests.support import mix_runs
from tests.support.head_rows import NAMES as NAMES_OF_ROWS
from tests.support.head_rows import ROWS, by_source, by_tokens, by_votes

NAMES = ("a", "b", "trusted")


def mixed(counts: Any, batch: Any, outputs: int = 3) -> Any:
    """The loss, and the derivative by the weights, of a head that is no minimum."""
    torch.manual_seed(0)
    head, weights = Head(4, outputs), SourceWeights(counts)
    torch.nn.init.normal_(head.weight)
    torch.nn.init.normal_(weights.logits)
    loss = Mixture(head, weights).loss(batch)["loss"]
    return loss, *torch.autograd.grad(loss, weights.logits)


@pytest.mark.parametrize("votes", [False, True])
def test_a_batch_is_that_of_the_mixture(votes: bool) -> None:
    """The trusted rows lie between others, and the features are standardized."""
    x, labels = torch.randn(9, 4), torch.arange(9) % 3
    source = torch.tensor([0, 2, 1, 1, 0, 2, 0, 1, 1])
    groups, counts = source, dict(zip(NAMES, [3, 4, 2], strict=True))
    if votes:
        groups = torch.full((9, 3), -1)
        groups[torch.arange(9), source] = labels
        groups[[0, 4], 1] = 2
        counts["b"] += 2
    features = Features(x, labels, torch.arange(9))
    rows = HeadRows.of(NAMES, features, groups, outputs=3)
    assert rows.votes == votes and rows.n == 2
    assert rows.trusted.row.tolist() == [0, 1] and rows.trusted.labels.tolist() == [1, 2]
    plain = {"features": features.standardized().x}
    plain |= {"votes": groups} if votes else {"labels": labels, "source": source}
    assert rows.counts(rows.groups).tolist() == list(counts.values())
    for found, expected in zip(
        mixed(counts, rows.batch(rows.groups)), mixed(counts, plain), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ROWS)
def test_trusted_rows_are_chosen_and_numbered_again(kind: str) -> None:
    rows = ROWS[kind]()
    chosen = rows.with_trusted(torch.tensor([1, 4, 5]))
    assert chosen.n == 3 and chosen.trusted.row.unique().tolist() == [0, 1, 2]
    of_fourth = rows.trusted.row == 4
    assert torch.equal(chosen.trusted.x[chosen.trusted.row == 1], rows.trusted.x[of_fourth])
    assert chosen.sources is rows.sources
    if rows.trusted_votes is not None and chosen.trusted_votes is not None:
        assert torch.equal(chosen.trusted_votes[1], rows.trusted_votes[4])


def test_rows_that_are_left_out_are_in_no_batch() -> None:
    rows, votes, tokens = by_source(), by_votes(), by_tokens()
    groups = rows.groups.masked_fill(rows.groups == 1, -1)
    batch = rows.batch(groups)
    assert sorted(batch["source"].unique().tolist()) == [0, 2, 3]
    assert len(batch["features"]) == 48 + 18 and rows.counts(groups).tolist() == [24, 0, 24, 18]
    alone = votes.groups.clone()
    alone[:, 1:] = -1
    assert len(votes.batch(alone)["features"]) == 16 + 18
    assert votes.counts(alone).tolist() == [16, 0, 0, 18]
    assert len(tokens.batch(tokens.groups)["features"]) == len(tokens.groups) + 8 * 4


def test_a_sample_s_sources_have_the_shares_of_all_rows() -> None:
    """At equal weights a source's mean loss counts by the number of all its labels."""
    rows = by_source()
    sampled = torch.tensor([0.5, 0.25, 1.0, 0.5])
    few = replace(rows, sampled=sampled)
    counts = few.counts(few.groups)
    assert counts.tolist() == [48, 96, 24, 36]
    weights = SourceWeights(dict(zip(NAMES_OF_ROWS, counts.tolist())), sampled=sampled)
    torch.nn.init.normal_(weights.logits)
    torch.manual_seed(0)
    head, batch = Head(5, 3), few.batch(few.groups)
    torch.nn.init.normal_(head.weight)
    losses = example_losses(head, batch)
    means = torch.stack([losses[batch["source"] == k].mean() for k in range(4)])
    mass = weights.logits.sigmoid() * counts
    expected = (mass / mass.sum() * means).sum()
    torch.testing.assert_close(Mixture(head, weights).loss(batch)["loss"], expected)


def test_trusted_rows_without_a_label_are_left_out() -> None:
    """The others are numbered anew, and each has a loss."""
    x, row = torch.randn(7, 4), torch.tensor([0, 0, 1, 3, 5, 5, 6])
    groups = torch.tensor([0, 1, 1, 2, 2, 2, 2])  # the trusted row 4 has no label
    rows = HeadRows.of(NAMES, Features(x, torch.arange(7) % 3, row), groups, outputs=3)
    assert rows.n == 3 and rows.trusted.row.tolist() == [0, 1, 1, 2]
    assert rows.sources.row.tolist() == [0, 0, 1] and rows.groups.tolist() == [0, 0, 1]


def test_tokens_are_classes_of_the_trusted_rows_tokens() -> None:
    """Of two equally frequent ones that are too many the first has a class."""
    like = torch.tensor([30, 10, 30, 20])
    labels = torch.tensor([10, 20, 30, 5, 40])
    assert of_classes(labels, like, 9)[0].tolist() == [0, 1, 2, 3, 3]
    found, number = of_classes(labels, like, 2)
    assert found.tolist() == [0, 2, 1, 2, 2] and number == 3


def head_rows(data: SourceData) -> HeadRows:
    """Of the data, with the number of a row as its feature."""
    rows = data.everything
    column = "votes" if "votes" in rows.column_names else "source"
    x = torch.arange(float(len(rows)))[:, None]
    features = Features(x, torch.tensor(rows["labels"][:]), torch.arange(len(rows)))
    return HeadRows.of(data.names, features, torch.tensor(rows[column][:]), outputs=3)


def test_the_data_keep_the_rows_of_the_groups() -> None:
    data = SourceData.of(mix_runs.sources(6), mix_runs.rows(4, 3))
    rows = head_rows(data)
    groups = rows.groups.clone()
    groups[[0, 3, 7]] = -1
    left = kept(data, groups, rows)
    assert left.sources["input_ids"][:] == [
        ids for row, ids in enumerate(data.sources["input_ids"][:]) if row not in (0, 3, 7)
    ]
    assert left.counts == {"good": 4, "bad": 5, "trusted": 4} and left.trusted is data.trusted


def test_the_data_keep_the_votes_of_the_groups() -> None:
    data = SourceData.of(mix_runs.votes(10), mix_runs.rows(4, 3))
    rows = head_rows(data)
    groups = rows.groups.clone()
    groups[2], groups[5, 0] = -1, 1
    left = kept(data, groups, rows)
    expected = [[*votes, -1] for row, votes in enumerate(groups.tolist()) if row != 2]
    assert left.sources["votes"][:] == expected
    assert left.sources["labels"][:] == [
        label for row, label in enumerate(data.sources["labels"][:]) if row != 2
    ]
