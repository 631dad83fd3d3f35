"""Votes: what each labelling function says of a row, a class or the probabilities of the classes.

The votes of K functions on n rows are a tensor of classes ``(n, K)``, -1 for none, or one of
probabilities ``(n, K, C)``, all 0 for none. The probabilities of one class alone are that class.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

#: The column of the votes, and a vote that is none.
VOTES = "votes"
NO_VOTE = -1


def voted(votes: Tensor) -> Tensor:
    """Whether there is a vote, ``(n, K)``.

    Example:
        >>> voted(torch.tensor([[2, -1]])), voted(torch.tensor([[[0.4, 0.6], [0.0, 0.0]]]))
        (tensor([[ True, False]]), tensor([[ True, False]]))
    """
    return votes.any(-1) if votes.dim() == 3 else votes != NO_VOTE


def decided(votes: Tensor) -> Tensor:
    """The most likely class of each vote, ``(n, K)``; -1 for none.

    Example:
        >>> decided(torch.tensor([[[0.4, 0.3, 0.3], [0.0, 0.0, 0.0]]]))
        tensor([[ 0, -1]])
    """
    return votes.argmax(-1).masked_fill(~voted(votes), NO_VOTE) if votes.dim() == 3 else votes


def only(votes: Tensor, keep: Tensor) -> Tensor:
    """``votes`` where ``keep``, ``(n, K)``, and none elsewhere."""
    if votes.dim() == 3:
        return votes * keep[..., None]
    return votes.masked_fill(~keep, NO_VOTE)


def one_vote(votes: Tensor, classes: Tensor, source: int) -> Tensor:
    """Votes of the kind and the number of ``votes``, of which ``source`` alone gives ``classes``.

    Example:
        >>> one_vote(torch.zeros(5, 3, dtype=torch.int64), torch.tensor([1, 0]), source=2)
        tensor([[-1, -1,  1],
                [-1, -1,  0]])
    """
    shape = (len(classes), *votes.shape[1:])
    if votes.dim() == 3:
        made = votes.new_zeros(shape)
        made[:, source] = one_hot(classes, votes.shape[2]).to(votes)
    else:
        made = votes.new_full(shape, NO_VOTE)
        made[:, source] = classes
    return made


def one_source_more(votes: Tensor) -> Tensor:
    """``votes`` and a last source, which has none."""
    return pad(votes, (0, 0, 0, 1)) if votes.dim() == 3 else pad(votes, (0, 1), value=NO_VOTE)


def agreement(votes: Tensor, classes: Tensor) -> Tensor:
    """The probability that each vote gives to a class, ``(n, K)``; 0 without a vote.

    Args:
        votes: the votes.
        classes: a class of each row, ``(n,)``, or its probabilities of them, ``(n, C)``.

    Example:
        >>> agreement(torch.tensor([[[0.4, 0.6], [0.0, 0.0]]]), torch.tensor([1]))
        tensor([[0.6000, 0.0000]])
    """
    if votes.dim() == 3:
        if classes.dim() == 1:
            classes = one_hot(classes, votes.shape[2])
        return (votes * classes[:, None].to(votes)).sum(-1)
    if classes.dim() == 1:
        return (votes == classes[:, None]).float()
    return classes.gather(1, votes.clamp(min=0)) * voted(votes)


def summed(votes: Tensor, weights: Tensor, classes: int) -> Tensor:
    """The sum of the votes for each class, of ``weights`` ``(n, K)``, ``(n, C)``."""
    if votes.dim() == 3:
        return torch.einsum("nkc,nk->nc", votes.to(weights), weights)
    made = weights.new_zeros(len(votes), classes)
    return made.scatter_add(1, votes.clamp(min=0), weights * voted(votes))
