"""Votes: probabilities of one class alone are that class, and others are weighted classes."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hyperopt_peft.problems.votes import (
    agreement,
    decided,
    one_source_more,
    one_vote,
    only,
    summed,
    voted,
)
from tests.support.head_rows import as_probabilities

CLASSES = 4


@st.composite
def classes_of_sources(draw: st.DrawFn) -> tuple[Tensor, torch.Generator]:
    rows, sources = draw(st.integers(1, 5)), draw(st.integers(2, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return torch.randint(-1, CLASSES, (rows, sources), generator=generator), generator


@given(classes_of_sources())
def test_the_probabilities_of_one_class_are_that_class(
    made: tuple[Tensor, torch.Generator],
) -> None:
    votes, generator = made
    soft = as_probabilities(votes, CLASSES)
    weights = torch.rand(votes.shape, generator=generator)
    classes = torch.randint(0, CLASSES, (len(votes),), generator=generator)
    posterior = torch.rand(len(votes), CLASSES, generator=generator)
    assert torch.equal(voted(soft), voted(votes)) and torch.equal(decided(soft), votes)
    torch.testing.assert_close(summed(soft, weights, CLASSES), summed(votes, weights, CLASSES))
    for each in (classes, posterior):
        torch.testing.assert_close(agreement(soft, each), agreement(votes, each))
    for change in (
        lambda v: only(v, weights > 0.5),
        one_source_more,
        lambda v: one_vote(v, classes, 1),
    ):
        assert torch.equal(change(soft), as_probabilities(change(votes), CLASSES))


def test_a_vote_of_several_classes_is_a_part_of_each() -> None:
    votes = torch.tensor([[[0.2, 0.8], [0.0, 0.0]], [[0.5, 0.5], [1.0, 0.0]]])
    assert voted(votes).tolist() == [[True, False], [True, True]]
    found = agreement(votes, torch.tensor([1, 0]))
    torch.testing.assert_close(found, torch.tensor([[0.8, 0.0], [0.5, 1.0]]))
    weighted = summed(votes, torch.tensor([[2.0, 9.0], [1.0, 3.0]]), 2)
    torch.testing.assert_close(weighted, torch.tensor([[0.4, 1.6], [3.5, 0.5]]))
