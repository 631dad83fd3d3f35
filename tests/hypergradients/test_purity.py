"""A hypergradient leaves no trace: not in the model, the data, nor the random stream."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperopt_peft import Engine, ProblemError, hypergradient
from hyperopt_peft.engine import fit
from hyperopt_peft.hypergradients import ConjugateGradient, Matvec, Solution, Vector
from tests.support.cases import Case, cases
from tests.support.networks import (
    Classify,
    Interruption,
    differences,
    draw_from_all,
    give_gradients,
    interrupt,
    network_levels,
    seed_all,
    snapshot,
)
from tests.support.quadratic import FunctionLevel

# The lower loss of a network in training is not convex, and most solvers end far from a solution.
pytestmark = pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")


def trained_levels(**options: Any) -> list[Classify]:
    """Levels in the middle of training: optimizers, buffers and data are in use."""
    seed_all(0)
    levels = network_levels(**options)
    draw_from_all(*levels)
    for level in levels:
        for _ in range(3):
            level.step(level.gradient(level.next_batch(), level.variables).gradient)
    return levels


def next_batches(level: Classify, count: int = 9) -> list[Any]:
    """The coming batches, over the end of an epoch."""
    return [level.next_batch() for _ in range(count)]


@cases()
@pytest.mark.parametrize("in_backward", [False, True])
def test_everything_is_bit_identical_afterwards(case: Case, in_backward: bool) -> None:
    """In one of the two, the data have random generators of their own."""
    coming = [next_batches(level) for level in trained_levels(generators=in_backward)]
    levels = trained_levels(generators=in_backward)
    give_gradients(levels[0].net)
    before, evaluations = snapshot(*levels), interrupt(levels, at=0)
    h = hypergradient(*levels, case.estimator)
    assert any(part.abs().sum() > 0 for part in h)
    assert not differences(before, snapshot(*levels))
    assert not differences(coming, [next_batches(level) for level in levels])
    total = evaluations()
    assert total >= 1
    # Solvers repeat themselves: their first evaluations, one between, and the last.
    for k in sorted({1, 2, total // 2, total} & set(range(1, total + 1))):
        levels = trained_levels(generators=in_backward)
        give_gradients(levels[0].net)
        before = snapshot(*levels)
        interrupt(levels, at=k, in_backward=in_backward)
        with pytest.raises(Interruption):
            hypergradient(*levels, case.estimator)
        assert not differences(before, snapshot(*levels)), f"evaluation {k} of {total}"


class Counters(nn.Module):
    """Buffers that each pass assigns anew or changes; the output depends on one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("assigned", torch.zeros(()))
        self.register_buffer("through_data", torch.zeros(()))
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("made", None)

    def forward(self, x: Tensor) -> Tensor:
        self.assigned = self.assigned + 1
        self.through_data.data.add_(1)
        self.in_place.add_(1)
        self.made = torch.ones(()) if self.made is None else self.made + 1
        return self.in_place * torch.sin(self.weight * x)


@pytest.mark.parametrize(
    ("method", "double_backward"),
    [
        ("darts:scheme=forward", "darts:product=exact"),
        ("cg:product=difference", "cg"),
        ("unrolled:steps=3,product=difference", "unrolled:steps=3"),
    ],
)
def test_all_evaluations_see_the_same_buffers(method: str, double_backward: str) -> None:
    """They are those that a double backward through one evaluation sees, and come back."""
    module, u = Counters(), torch.ones(2, dtype=torch.float64, requires_grad=True)
    ones, w = torch.ones(2, dtype=torch.float64), module.weight
    levels = (
        FunctionLevel(lambda _: module(ones).square().sum(), [u]),
        FunctionLevel(lambda _: module(u).sum() + 9 * w.square().sum(), [w], lr=0.01),
    )
    before = dict(module._buffers)
    (actual,) = hypergradient(*levels, method)
    assert all(module._buffers[name] is buffer for name, buffer in before.items())
    assert not any(buffer.any() for buffer in before.values() if buffer is not None)
    (exact,) = hypergradient(*levels, double_backward)
    torch.testing.assert_close(actual, exact, rtol=1e-5, atol=0)


def test_random_numbers_of_an_estimator_are_its_own() -> None:
    """A solver may draw probes: training goes on from the state that it found."""

    class Probing(ConjugateGradient):
        def solve(self, matvec: Matvec, b: Vector) -> Solution:
            torch.rand(5)
            return super().solve(matvec, b)

    upper, lower = trained_levels()
    before = torch.get_rng_state()
    hypergradient(upper, lower, Probing())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [None, 7])
def test_a_hypergradient_is_a_function_of_the_random_state(seed: int | None) -> None:
    """Of the current state, or of ``seed`` alone where one is given."""
    levels, actual = trained_levels(), []
    for state in (1, 1, 2):
        seed_all(state)
        actual.append(hypergradient(*levels, "darts", seed=seed))
    assert not differences(actual[0], actual[1])
    assert bool(differences(actual[0], actual[2])) == (seed is None)


@cases()
def test_the_upper_level_leaks_nothing_into_the_lower_one(case: Case) -> None:
    """With an upper learning rate of 0, training is that of the lower level alone, bit for bit."""
    upper, lower = network_levels(rates=(0.0, 0.1))
    torch.manual_seed(4)
    Engine(upper, lower, case.estimator, lower_steps=2, warmup_steps=3, progress=False).run(4)
    _, alone = network_levels(rates=(0.0, 0.1))
    torch.manual_seed(4)
    fit(alone, 11, progress=False)
    assert not differences(lower.variables, alone.variables)
    assert not differences(*(dict(level.net.named_buffers()) for level in (lower, alone)))


def test_the_upper_random_numbers_are_a_function_of_the_seed() -> None:
    def trained(seed: int, random: int) -> Tensor:
        w, u = (torch.ones(4, requires_grad=True) for _ in range(2))
        upper = FunctionLevel(lambda _: (torch.rand(4) * u * w).sum(), [u], lr=1.0)
        lower = FunctionLevel(lambda _: w.square().sum(), [w], lr=0.1)
        torch.manual_seed(random)
        Engine(upper, lower, "direct", seed=seed, progress=False).run(3)
        return u.detach()

    assert torch.equal(trained(0, 1), trained(0, 2))
    assert not torch.equal(trained(0, 1), trained(1, 1))


def clamp(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.clamp_(-0.5, 0.5)


def clamp_data(tensor: Tensor) -> Tensor:  # no version changes
    tensor.data.clamp_(-0.5, 0.5)
    return tensor.clone()


def add_after_use(tensor: Tensor) -> Tensor:  # autograd refuses the backward pass
    used = tensor.square()
    with torch.no_grad():
        tensor.add_(1.0)
    return used


def renorm(tensor: Tensor) -> Tensor:
    return nn.functional.embedding(torch.arange(2), tensor, max_norm=0.5)


@cases()
@pytest.mark.parametrize(
    ("write", "writer", "of"),
    [
        (clamp, "lower", "u"),
        (clamp_data, "lower", "w"),
        (add_after_use, "upper", "w"),
        (renorm, "lower", "w"),
    ],
)
def test_a_loss_that_writes_to_a_variable_is_refused(
    case: Case, write: Callable[[Tensor], Tensor], writer: str, of: str
) -> None:
    variables = {name: torch.ones(2, 2, requires_grad=True) for name in ("u", "w")}
    u, w = variables["u"], variables["w"]

    def objective(level: str) -> Tensor:
        w_now = write(w) if (level, of) == (writer, "w") else w
        u_now = write(u) if (level, of) == (writer, "u") else u
        return (w_now - u_now).square().sum() + w.square().sum()

    upper = FunctionLevel(lambda _: objective("upper"), [("u", u)], name="above")
    lower = FunctionLevel(lambda _: objective("lower"), [("w", w)], lr=0.1, name="below")
    if writer == "lower" and case.estimator.name == "direct":  # which does not evaluate f
        hypergradient(upper, lower, case.estimator)
    elif write is clamp_data:  # not seen where the estimator itself gives w back
        with suppress(ProblemError):
            hypergradient(upper, lower, case.estimator)
    else:
        with pytest.raises(ProblemError, match=rf"a loss writes to \w+'s {of}"):
            hypergradient(upper, lower, case.estimator)
    assert torch.equal(u, torch.ones(2, 2)) and torch.equal(w, u)


@cases()
def test_a_hook_that_takes_a_gradient_away_is_refused(case: Case) -> None:
    """The gradient of the loss would seem to be zero, and with it the implicit term."""
    u, w = (torch.ones(2, requires_grad=True) for _ in range(2))
    upper = FunctionLevel(lambda _: w.square().sum(), [u])
    lower = FunctionLevel(lambda _: (w - u).square().sum(), [("w", w)], lr=0.1)
    w.register_post_accumulate_grad_hook(lambda x: setattr(x, "grad", None))
    with pytest.raises(ProblemError, match=r"w has a post-accumulate hook.*; remove the hook"):
        hypergradient(upper, lower, case.estimator)
