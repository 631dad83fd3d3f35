"""Variables that share memory are refused: moving one would move the other."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperopt_peft import Problem, ProblemError, hypergradient

FLAT = torch.arange(12.0)


def views(*tensors: Tensor) -> list[Tensor]:
    """Leaves in the memory of ``tensors``."""
    return [tensor.detach().requires_grad_() for tensor in tensors]


OVERLAPPING = {
    "one start": (FLAT, FLAT[:3]),
    "a later start": (FLAT[:6], FLAT[5:]),
    "one within the other": (FLAT, FLAT[4:6]),
    "not neighbours": (FLAT, FLAT[:2], FLAT[7:9]),
    "a transpose": (FLAT[:6].view(2, 3), FLAT[:6].view(2, 3).T),
    "a column": (FLAT[4:5], FLAT.view(3, 4)[:, 0]),
    "another dtype": (FLAT[:6], FLAT.view(torch.bfloat16)[11:]),
    "NumPy's": (FLAT[:6], torch.from_numpy(FLAT.numpy())[3:]),
    "interleaved": (FLAT[::2], FLAT[1::2]),
}


@pytest.mark.parametrize("tensors", OVERLAPPING.values(), ids=OVERLAPPING)
def test_variables_of_one_level_or_of_two_that_overlap(tensors: tuple[Tensor, ...]) -> None:
    for order in (views(*tensors), views(*reversed(tensors))):
        with pytest.raises(ProblemError, match=r"fit: variable \d and variable \d share memory"):
            Problem(order, name="fit")
        upper, lower = Problem(order[:1], name="upper"), Problem(order[-1:], name="lower")
        with pytest.raises(ProblemError, match=r"upper's.*lower's|lower's.*upper's"):
            hypergradient(upper, lower, "direct")


DISJOINT: dict[str, tuple[Tensor, ...]] = {
    "slices": (FLAT[7:], FLAT[:5], FLAT[5:7]),
    "rows": tuple(FLAT.view(3, 4).unbind()),
    "a transpose": (FLAT[:6].view(2, 3).T, FLAT[6:].view(3, 2)),
    "empty": (FLAT, FLAT[4:4], torch.empty(0), torch.empty(0)),
    "a broadcast axis of one": (FLAT[:6].as_strided((1, 6), (0, 1)), FLAT[6:]),
    "without memory": (torch.empty(3, device="meta"), torch.empty(3, device="meta")),
    "many": tuple(torch.zeros(4000, 2).unbind()),
}


@pytest.mark.parametrize("tensors", DISJOINT.values(), ids=DISJOINT)
def test_variables_beside_one_another_are_taken(tensors: tuple[Tensor, ...]) -> None:
    assert len(Problem(views(*tensors)).variables) == len(tensors)


def test_tied_parameters_are_given_once() -> None:
    tied = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    tied[1].weight = tied[0].weight
    Problem(tied.named_parameters())
    with pytest.raises(ProblemError, match=r"0\.weight and 1\.weight share memory"):
        Problem(tied.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize(
    "w",
    [torch.ones(1).expand(3), torch.ones(3, 1).expand(3, 4), FLAT.as_strided((2, 3), (1, 1))],
    ids=["expanded", "one axis expanded", "windows"],
)
def test_entries_in_one_place(w: Any) -> None:
    with pytest.raises(ProblemError, match="fit: several entries of w share memory"):
        Problem(zip("w", views(w)), name="fit")
