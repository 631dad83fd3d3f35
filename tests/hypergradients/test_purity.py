"""A hypergradient leaves no trace: not in the model, the data, nor the random stream."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from hyperopt_peft import Engine, Problem, hypergradient
from hyperopt_peft.engine import fit
from hyperopt_peft.hypergradients import ConjugateGradient, Matvec, Solution, Vector
from tests.support.cases import Case, cases
from tests.support.networks import Classify, Network, differences, loader, network_levels, owned

Levels = tuple[Classify, Classify]
# The lower loss of a network in training is not convex, and most solvers end far from a solution.
pytestmark = pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")


def trained_levels(**options: Any) -> Levels:
    """Levels in the middle of training: optimizers, buffers and data are in use."""
    levels = network_levels(**options)
    for level in levels:
        for _ in range(3):
            level.step(level.gradient(level.next_batch(), level.variables).gradient)
    return levels


def snapshot(*levels: Classify) -> dict[str, Any]:
    """Copies of all that a hypergradient must not change, except the data's position."""
    net = levels[0].net
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    optimizers = [level.optimizer_snapshot(with_state=True) for level in levels]
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "objects": {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors.items()},
        "gradients": {
            name: (p.requires_grad, id(p.grad), None if p.grad is None else p.grad.clone())
            for name, p in net.named_parameters()
        },
        "optimizers": optimizers,
        "random": torch.get_rng_state(),
        "modes": [module.training for module in net.modules()],
        "hooks": len(nn.modules.module._global_forward_pre_hooks),
    }


def next_batches(level: Classify, count: int = 9) -> list[Any]:
    """The coming batches, over the end of an epoch."""
    return [level.next_batch() for _ in range(count)]


def give_gradients(net: nn.Module) -> None:
    """Gradients that the user holds while asking for a hypergradient."""
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None


@cases()
@pytest.mark.parametrize("generators", [False, True])
def test_everything_is_bit_identical_afterwards(case: Case, generators: bool) -> None:
    coming = [next_batches(level) for level in trained_levels(generators=generators)]
    upper, lower = trained_levels(generators=generators)
    give_gradients(upper.net)
    before = snapshot(upper, lower)
    h = hypergradient(upper, lower, case.estimator)
    assert any(part.abs().sum() > 0 for part in h)
    assert not differences(before, snapshot(upper, lower))
    assert not differences(coming, [next_batches(level) for level in (upper, lower)])


class Interruption(Exception):
    pass


def interrupt(levels: Levels, at: int, *, in_backward: bool) -> Callable[[], int]:
    """Make the ``at``-th evaluation of a loss fail, forward or backward; returns the count."""
    count = 0

    def fail(_: Tensor) -> None:
        raise Interruption

    def wrap(loss: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def wrapped(batch: Any) -> Any:
            nonlocal count
            count += 1
            result = loss(batch)
            if count == at:
                if not in_backward:
                    raise Interruption
                result["loss"].register_hook(fail)
            return result

        return wrapped

    for level in levels:
        level.loss = wrap(level.loss)
    return lambda: count


@cases()
@pytest.mark.parametrize("in_backward", [False, True])
def test_everything_is_bit_identical_after_an_exception_in_any_evaluation(
    case: Case, in_backward: bool
) -> None:
    levels = trained_levels()
    evaluations = interrupt(levels, at=0, in_backward=False)
    hypergradient(*levels, case.estimator)
    total = evaluations()
    assert total >= 1
    # Solvers repeat themselves: their first evaluations, some between, and the last.
    for k in sorted({1, 2, 3, 4, total // 2, total - 1, total} & set(range(1, total + 1))):
        levels = trained_levels()
        give_gradients(levels[0].net)
        before = snapshot(*levels)
        interrupt(levels, at=k, in_backward=in_backward)
        with pytest.raises(Interruption):
            hypergradient(*levels, case.estimator)
        assert not differences(before, snapshot(*levels)), f"evaluation {k} of {total}"


class Counting(nn.Module):
    """Its output depends on a buffer that each pass changes, as under spectral normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("count", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.count * torch.sin(self.weight * x)


@pytest.mark.parametrize(
    ("method", "double_backward"),
    [
        ("darts", "darts:product=exact"),
        ("darts:scheme=forward", "darts:product=exact"),
        ("cg:product=difference", "cg"),
        ("unrolled:steps=3,product=difference", "unrolled:steps=3"),
        ("forward:steps=3", "unrolled:steps=3"),
        ("forward:steps=3,product=difference", "unrolled:steps=3"),
    ],
)
def test_all_evaluations_see_the_same_buffers(method: str, double_backward: str) -> None:
    """They are those that a double backward through one evaluation sees, at each step."""
    module, u = Counting(), torch.ones(2, dtype=torch.float64, requires_grad=True)

    class Lower(Problem):
        def loss(self, batch: None) -> Tensor:
            return module(u).sum() + module.weight.square().sum() * 9

    class Upper(Problem):
        def loss(self, batch: None) -> Tensor:
            return module(torch.ones(2, dtype=torch.float64)).square().sum()

    levels = Upper([u]), Lower([module.weight], optimizer=SGD([module.weight], lr=0.01))
    (actual,) = hypergradient(*levels, method)
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


@cases()
@pytest.mark.parametrize("generators", [False, True])
def test_the_upper_level_leaks_nothing_into_the_lower_one(case: Case, generators: bool) -> None:
    """With an upper learning rate of 0, training is that of the lower level alone, bit for bit.

    Neither the upper level's passes nor its dropout and shuffling may be seen. This is the
    control that exposes an upper level that trains the lower variables.
    """
    if case.estimator.requirements.upper_weight:
        pytest.skip("it owns the lower steps too")
    upper, lower = network_levels(upper_lr=0.0, generators=generators)
    torch.manual_seed(4)
    Engine(upper, lower, case.estimator, lower_steps=2, warmup_steps=3, progress=False).run(6)
    _, alone = network_levels(generators=generators)
    torch.manual_seed(4)
    fit(alone, 15, progress=False)
    assert not differences(lower.variables, alone.variables)
    assert not differences(*(dict(level.net.named_buffers()) for level in (lower, alone)))


def test_the_upper_masks_are_a_function_of_the_seed() -> None:
    def trained(seed: int, random: int) -> list[Tensor]:
        """Only the upper level has dropout, and none of the data is shuffled."""
        torch.manual_seed(0)
        net, still = Network(dropout=0.5), Network(dropout=0.0)
        still.load_state_dict(net.state_dict())
        for name, parameter in net.named_parameters():
            parent, _, key = name.rpartition(".")
            setattr(still.get_submodule(parent), key, parameter)
        above, below = owned(net)
        data = list(loader(8))
        upper = Classify(net, above, data=data, optimizer=Adam([v for _, v in above], lr=0.1))
        lower = Classify(still, below, data=data, optimizer=SGD([v for _, v in below], lr=0.1))
        torch.manual_seed(random)
        Engine(upper, lower, "direct", seed=seed, progress=False).run(3)
        return list(upper.variables)

    assert not differences(trained(0, 1), trained(0, 2))
    assert differences(trained(0, 1), trained(1, 1))


class Counters(nn.Module):
    """Buffers as modules in use keep them: assigned anew, and changed through ``.data``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("assigned", torch.zeros(()))
        self.register_buffer("through_data", torch.zeros(()))
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("made", None)

    def forward(self, x: Tensor) -> Tensor:
        self.assigned = self.assigned + 1
        self.through_data.data.add_(1)
        self.in_place.add_(1)
        self.made = torch.ones(()) if self.made is None else self.made + 1
        return (self.weight * x).sum()


@pytest.mark.parametrize("buffer", ["assigned", "through_data", "in_place", "made"])
def test_buffers_are_restored_however_they_are_changed(buffer: str) -> None:
    module, u = Counters(), nn.Parameter(torch.ones(2))

    class Lower(Problem):
        def loss(self, batch: None) -> Tensor:
            return (module(u) - 1).square() + module.weight.square().sum()

    class Upper(Problem):
        def loss(self, batch: None) -> Tensor:
            return (module(torch.ones(2)) - 1).square()

    before = getattr(module, buffer)
    hypergradient(Upper([u]), Lower([module.weight]), "darts")
    assert getattr(module, buffer) is before
    assert before is None or float(before) == 0


def test_frozen_tensors_and_those_of_nobody_are_bit_identical_after_training() -> None:
    upper, lower = network_levels()
    frozen = upper.net.first.bias.clone()
    given = lower.variables[-1]
    lower = Classify(
        lower.net, lower.variables[:-1], data=loader(18), optimizer=SGD(lower.variables[:-1], lr=1)
    )
    nobodys = given.detach().clone()
    Engine(upper, lower, "cg", progress=False).run(5)
    assert torch.equal(upper.net.first.bias, frozen) and torch.equal(given, nobodys)
    assert upper.net.first.bias.grad is None and given.grad is None
