"""check_problem names what is wrong with a pair, passes what is right, and changes nothing."""

import random

import numpy as np
import pytest
import torch

from hyperopt_peft import check_problem, hypergradient
from hyperopt_peft.engine import minimize
from hyperopt_peft.problems.textbook.hypercleaning import digits
from hyperopt_peft.problems.textbook.logistic import breast_cancer
from hyperopt_peft.problems.textbook.ridge import diabetes
from hyperopt_peft.utils.random_state import RandomState
from tests.support.chains import chain, nested
from tests.support.networks import differences
from tests.support.quadratic import FunctionLevel, Once, flat, program, symmetric


def examine(upper, lower, **options):
    """The check, after which variables, gradients and random states are what they were."""
    variables = (*upper.variables, *lower.variables)
    for k, variable in enumerate(variables):
        variable.grad = torch.full_like(variable, k)

    def state():
        values = [[x.detach().clone(), x.grad.clone()] for x in variables]
        return [values, RandomState.capture().states]

    before = state()
    check = check_problem(upper, lower, progress=False, **options)
    assert differences(before, state()) == []
    return check


def kinds(check, *severities):
    return [finding.kind for finding in check.findings if finding.severity in severities]


def finding_of(check, kind):
    (finding,) = (finding for finding in check.findings if finding.kind == kind)
    assert str(finding) in str(check)
    return finding


class Pair:
    """f = ½|w − u|² + f_more, F = ½|w|² + ½|u − 1|² + F_more, at the lower minimum."""

    def __init__(self, f_more=lambda w, u: 0, upper_more=lambda w, u: 0, spare=()):
        self.u = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
        self.w = self.u.detach().clone().requires_grad_()
        self.f_more, self.upper_more, self.spare = f_more, upper_more, list(spare)
        self.upper = self.level(self.upper_loss, [("u", self.u)], "above")
        self.lower = self.level(self.f, [("w", self.w), *self.spare], "below")

    def level(self, function, owned, name):
        return FunctionLevel(lambda _: function(), owned, lr=0.1, name=name)

    def f(self):
        return (self.w - self.u).square().sum() / 2 + self.f_more(self.w, self.u)

    def upper_loss(self):
        own = (self.u - 1).square().sum() / 2
        return self.w.square().sum() / 2 + own + self.upper_more(self.w, self.u)

    def check(self, **options):
        return examine(self.upper, self.lower, **options)


@pytest.mark.parametrize("make", [diabetes, breast_cancer, digits])
def test_the_reference_problems_are_sound_at_their_minimum_and_not_before(make):
    upper, lower = make()
    start = examine(upper, lower)
    assert kinds(start, "error", "warning") == ["far from stationary"]
    minimize(lower)
    check = examine(upper, lower)
    assert check.findings == () and check.curvature.change < 1e-6


def test_a_lower_variable_that_its_loss_does_not_read():
    spare = torch.ones(2, dtype=torch.float64, requires_grad=True)
    check = Pair(upper_more=lambda w, u: spare.sum(), spare=[("spare", spare)]).check()
    finding = finding_of(check, "unread variable")
    assert (finding.severity, finding.level) == ("error", "below") and "'spare'" in finding.words


def test_an_upper_variable_that_no_loss_reads():
    pair = Pair()
    spare = torch.ones(2, dtype=torch.float64, requires_grad=True)
    upper = pair.level(pair.upper_loss, [("u", pair.u), ("spare", spare)], "above")
    finding = finding_of(examine(upper, pair.lower), "unread variable")
    assert finding.level == "above" and "no loss reads the variable 'spare'" in finding.words
    pair.f_more = lambda w, u: spare.sum()  # the lower loss is enough
    assert examine(upper, pair.lower).ok


@pytest.mark.parametrize("reads", [False, True])
def test_a_loss_that_does_not_depend_on_the_other_level_s_variables(reads):
    """F not on w, and the minimum of f not on u."""
    pair, other = Pair(), Pair()
    pair.upper.function = lambda _: pair.u.sum() + (0 * pair.w.sum() if reads else 0)
    other.lower.function = lambda _: (other.w - 1).square().sum() + (other.u.sum() if reads else 0)
    minimize(other.lower)
    for one, kind, level in (
        (pair, "implicit term", "above"),
        (other, "mixed derivative", "below"),
    ):
        check = one.check()
        assert kinds(check, "error", "warning") == [f"no {kind}"]
        assert finding_of(check, f"no {kind}").level == level


def clamp(w, u):
    with torch.no_grad():
        w.clamp_(-9, 9)  # no value changes, the version does
    return 0


def write_through_data(w, u):
    w.data.mul_(1.5)
    return 0


def write_to_the_other_level(w, u):
    u.data[0] = 7
    return 0


def unlike(draw):
    """A term that is another one at each evaluation."""
    return lambda w, u: draw() * w.sum()


FAULTS = [
    (clamp, "in-place edit", "writes to below's w"),
    (write_through_data, "in-place edit", "writes to below's w"),
    (write_to_the_other_level, "in-place edit", "writes to above's u"),
    (lambda w, u: w.mul_(2).sum(), "in-place edit", "leaf Variable"),
    (unlike(iter(range(1000)).__next__), "not reproducible", "has a state"),
    (lambda w, u: (w - 2).log().sum(), "not finite", "the loss is nan"),
    (lambda w, u: (w - 1).sqrt().sum(), "not finite", "the gradient is not finite"),
    (lambda w, u: w.square(), "bad loss", "loss"),
]


@pytest.mark.parametrize(("term", "kind", "words"), FAULTS)
@pytest.mark.parametrize("level", ["above", "below"])
def test_a_faulty_loss_is_named(term, kind, words, level):
    check = (Pair(upper_more=term) if level == "above" else Pair(term)).check()
    findings = [finding for finding in check.findings if finding.kind == kind]
    assert words in findings[-1].words
    assert {(finding.level, finding.severity) for finding in findings} == {(level, "error")}
    assert check.curvature is None  # whose differences of such a loss are noise


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_a_loss_may_draw_from_any_global_generator(draw):
    check = Pair(lambda w, u: draw() * w.square().sum(), unlike(draw)).check()
    assert not kinds(check, "error")


def test_a_second_derivative_that_is_not_finite_and_a_tensor_of_both_levels():
    check = Pair(lambda w, u: (w - 1).abs().pow(1.5).sum()).check()
    assert "Hessian-vector product is not finite" in finding_of(check, "not finite").words
    pair = Pair()
    both = pair.level(pair.f, [("w", pair.w), ("mine", pair.u)], "below")
    finding = finding_of(examine(pair.upper, both), "shared tensor")
    assert "below's mine" in finding.words and "above's u" in finding.words


def test_an_operation_without_second_derivative_is_named_and_done_without():
    pair = Pair()
    pair.lower.function = lambda _: Once.apply(pair.w - pair.u).sum() / 2
    check = pair.check()
    assert kinds(check, "error", "warning") == ["no double backward"]
    finding = finding_of(check, "no double backward")
    assert "Once is differentiable once" in finding.words
    assert 'product="difference"' in finding.advice
    assert check.curvature.largest == pytest.approx(1, rel=1e-6)  # by differences


def test_negative_curvature():
    eigenvalues = torch.tensor([-0.3, 0.5, 1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    quadratic = program(0, w_shapes=[(6,)], u_shapes=[(6,)])
    quadratic.h = symmetric(eigenvalues, torch.Generator().manual_seed(0))
    quadratic.w[0].data = torch.linalg.solve(
        quadratic.h, -quadratic.c_mixed @ quadratic.u[0].detach() - quadratic.c
    )
    check = examine(*quadratic.levels())
    assert kinds(check, "error", "warning") == ["negative curvature"]
    assert check.curvature.smallest == pytest.approx(-0.3, rel=1e-6)
    assert check.curvature.largest == pytest.approx(5.0, rel=1e-6)
    assert "-0.3" in finding_of(check, "negative curvature").words
    damping = (5.0 + 10 * 0.3) / 9  # (5 + δ)/(δ − 0.3) = 10
    assert check.curvature.damping() == pytest.approx(damping, rel=1e-6)
    assert f"damping={damping:.2g}" in finding_of(check, "negative curvature").advice


def test_an_ill_conditioned_lower_level():
    scale = torch.logspace(-4, 0, 300, dtype=torch.float64)
    u = torch.ones(300, dtype=torch.float64, requires_grad=True)
    w = u.detach().clone().requires_grad_()
    lower = FunctionLevel(lambda _: (scale * (w - u).square()).sum() / 2, [w])
    upper = FunctionLevel(lambda _: (w - 3).square().sum(), [u])
    check = examine(upper, lower)
    assert kinds(check, "error", "warning") == ["ill-conditioned"]
    finding = finding_of(check, "ill-conditioned")
    assert finding.words.startswith("10 steps of minres leave a residual of 0.")
    assert "ill-conditioned" not in kinds(examine(upper, lower, solver_steps=400), "warning")


def moved(quadratic, length):
    for leaf in quadratic.w:
        leaf.data += length * torch.randn(leaf.shape, dtype=leaf.dtype)
    return quadratic


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("several", [True, False])
def test_variables_that_the_lower_level_absorbs(absorbed, several):
    """Both losses read u·w alone; or w = u, and u is at the minimum of F on the first batch."""
    pair = Pair()
    batches = torch.tensor([[2.0, 1.0, -1.0], [1.0, 3.0, 5.0]], dtype=torch.float64)
    product = lambda: pair.u * pair.w if absorbed else pair.w  # noqa: E731
    pair.upper.function = lambda batch: (
        (product() - batch).square().sum() + (0 if absorbed else pair.u.square().sum())
    )
    if absorbed:
        pair.lower.function = lambda _: (pair.u * pair.w - 1).square().sum() / 2
        pair.w.data = 1 / pair.u.detach()
    else:
        pair.u.data, pair.w.data = batches[0] / 2, batches[0] / 2
    check = pair.check(upper_batch=batches[0], upper_batches=batches[: 1 + several])
    found = absorbed or not several  # one batch cannot tell
    assert check.curvature.remainder < 1e-6
    assert kinds(check, "error", "warning") == (["absorbed"] if found else ["noisy hypergradient"])


def test_a_small_penalty_leaves_little_of_the_hypergradient():
    """f has λ/2·‖w‖² too: F depends on u in proportion to λ."""
    pair = Pair()
    pair.upper.function = lambda batch: (pair.u * pair.w - batch).square().sum()
    pair.lower.function = lambda _: (
        (pair.u * pair.w - 1).square().sum() / 2 + penalty / 2 * pair.w.square().sum()
    )
    batches = torch.tensor([[2.0, 1.5, -1.0], [3.0, 3.0, 5.0]], dtype=torch.float64)
    for penalty, found in ((3e-3, True), (0.3, False)):
        u = pair.u.detach()
        pair.w.data = u / (u.square() + penalty)
        check = pair.check(upper_batch=batches[0], upper_batches=batches)
        assert check.curvature.remainder > 1e-4
        assert ("absorbed" in kinds(check, "warning")) == found
        if found:
            finding = finding_of(check, "absorbed")
            assert "hardly depends" in finding.words and "larger penalty" in finding.advice


def test_far_from_stationary_is_the_change_of_the_hypergradient():
    quadratic = moved(program(0), 1.0)
    upper, lower = quadratic.levels()
    check = examine(upper, lower, solver_steps=len(quadratic.h))
    here = flat(hypergradient(upper, lower, "exact"))
    ratio = float((here - quadratic.direct).norm() / quadratic.direct.norm())
    sizes = [float(quadratic.direct.norm() + quadratic.exact_implicit.norm())]
    f = lower.loss(None).item()
    minimize(lower)
    there = flat(hypergradient(upper, lower, "exact"))
    sizes.append(float(quadratic.direct.norm() + quadratic.exact_implicit.norm()))
    change = float((there - here).norm()) / max(sizes)
    assert change > 0.1
    assert check.curvature.change == pytest.approx(change, rel=1e-6)
    assert check.curvature.implicit_ratio == pytest.approx(ratio, rel=1e-6)
    assert check.curvature.losses == pytest.approx((f, lower.loss(None).item()))
    finding = finding_of(check, "far from stationary")
    assert finding.severity == "warning" and f"hypergradient by {change:.0%}" in finding.words
    assert "more lower steps" in finding.advice


def test_the_measure_of_stationarity_has_no_scale():
    def change(f_scale=1.0, upper_scale=1.0, constant=0.0):
        torch.manual_seed(1)
        quadratic = moved(program(0), 0.3)
        upper, lower = quadratic.levels(scale=f_scale)
        f, upper_f = lower.objective, upper.objective
        lower.objective = lambda w, u: f(w, u) + constant
        upper.objective = lambda w, u: upper_scale * upper_f(w, u) - constant
        return examine(upper, lower).curvature.change

    plain = change()
    assert plain > 0.01
    for options in ({"f_scale": 1e4}, {"upper_scale": 1e-3}, {"constant": 50.0}):
        assert change(**options) == pytest.approx(plain, rel=1e-5)


def test_inside_autocast_the_step_is_seen_and_half_precision_is_no_finding():
    torch.manual_seed(0)
    x, u = torch.randn(16, 4), torch.ones(4, requires_grad=True)
    net = torch.nn.Linear(4, 1)

    def f(_):
        return (net(x) - 1).square().mean() + (u * net.weight.square()).sum()

    lower = FunctionLevel(f, net.named_parameters())
    upper = FunctionLevel(lambda _: net(x).square().mean(), [u])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check = examine(upper, lower)
        assert f(None).item() == pytest.approx(check.curvature.losses[0], rel=1e-6)
    assert kinds(check, "error", "warning") == ["far from stationary"]
    assert check.curvature.losses[1] < 0.5 * check.curvature.losses[0]


def test_another_exception_of_a_loss_passes_and_leaves_everything():
    def loss(w, u):
        w.data.zero_()
        raise KeyError("no such column")

    pair = Pair(loss)
    before = pair.w.detach().clone()
    with pytest.raises(KeyError, match="no such column"):
        check_problem(pair.upper, pair.lower)
    assert torch.equal(pair.w, before) and pair.w.grad is None


def test_a_chain_is_examined_through_its_levels():
    """The Newton step's loss and the hypergradient's change are those of the reduced problem."""
    quadratics = chain(3)
    top, below = nested(quadratics.levels())
    with torch.no_grad():  # the lowest level at its minimum, the middle one not
        *_, a = quadratics.matrices
        above = torch.cat(quadratics.blocks[:2])
        n, w = len(above), quadratics.blocks[2]
        w.copy_(-torch.linalg.solve(a[n:, n:], a[n:, :n] @ above + quadratics.vectors[2][n:]))
    check = examine(top, below)
    far, start = quadratics.hypergradient(), quadratics.objective(1, quadratics.blocks).item()
    direct = below.gradient_above(top, None, top.variables).gradient[0]
    quadratics.settle()
    settled, end = quadratics.hypergradient(), quadratics.objective(1, quadratics.blocks).item()
    at_end = below.gradient_above(top, None, top.variables).gradient[0]
    sizes = [d.norm() + (h - d).norm() for d, h in ((direct, far), (at_end, settled))]
    assert kinds(check, "error", "warning") == ["far from stationary"]
    assert check.curvature.losses == pytest.approx((start, end), rel=1e-8)
    change = float((settled - far).norm() / max(sizes))
    assert check.curvature.change == pytest.approx(change, rel=1e-6)


def noisy(above, below):
    """F = Σ (u + batch)·w and f = ½|w − u − batch|², at w = u; Σ|…| of the noise is known."""
    u = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    w = u.detach().clone().requires_grad_()
    upper = FunctionLevel(lambda x: (u + x) @ w, [u], data=above)
    return upper, FunctionLevel(lambda x: (w - u - x).square().sum() / 2, [w], data=below)


def signal_to_noise(slopes):
    """Of four hypergradients, by the definition."""
    noise = float(slopes.var(0).sum())
    return (max(0.0, float(slopes.mean(0).square().sum()) - noise / 4) / noise) ** 0.5


ROWS = [torch.tensor(x, dtype=torch.float64) for x in ([3, -1], [-1, 2], [0, -4], [5, 1], [9, 9])]


@pytest.mark.parametrize("scale", [0.1, 10.0])
@pytest.mark.parametrize("given", [False, True])
def test_the_signal_to_noise_ratio_is_that_of_the_next_batches(scale, given):
    """dF/du = w + (u + batch): the batch is the noise."""
    rows = [scale * row for row in ROWS]
    upper, lower = noisy(None if given else rows, [torch.zeros(2).double()])
    options = {"upper_batch": rows[0], "upper_batches": rows[:4]} if given else {}
    check = examine(upper, lower, **options)
    slopes = torch.stack([upper.variables[0] * 2 + row for row in rows[:4]]).detach()
    expected = signal_to_noise(slopes)
    assert check.signal_to_noise == pytest.approx(expected, rel=1e-6)
    assert (expected < 1) == (scale == 10.0)
    warned = [f for f in check.findings if f.kind == "noisy hypergradient"]
    assert [f.severity for f in warned] == ["warning"] * (expected < 1)
    if not given:
        assert all(torch.equal(upper.next_batch(), row) for row in rows)


def test_the_lower_batch_is_noise_too_and_one_batch_has_none():
    """f = ½|w − c∘u|² with the batch c: dF/du has the term c∘w."""
    pair = Pair()
    rows = [torch.full((3,), x, dtype=torch.float64) for x in (0.5, 1.5, 1.0)]
    f = lambda c: (pair.w - c * pair.u).square().sum() / 2  # noqa: E731
    check = examine(pair.upper, FunctionLevel(f, [pair.w], data=rows))
    u = pair.u.detach()
    slopes = torch.stack([u - 1 + c * u for c in (*rows, rows[0])])
    assert check.signal_to_noise == pytest.approx(signal_to_noise(slopes), rel=1e-6)
    assert Pair().check().signal_to_noise is None


def on_rows(above, below, mean=True):
    """f and F are squared errors over rows of numbers and targets, from the lower minimum."""
    w, u = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def loss(batch):
        each = (batch["x"] @ w - batch["y"]).square()
        return each.mean() if mean else each.sum()

    lower = FunctionLevel(lambda b: loss(b) + 1e-3 * (w * u).square().sum(), [w], data=[below])
    return FunctionLevel(loss, [u], data=[above]), lower


def rows(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = torch.stack([torch.randn(3, generator=g, dtype=torch.float64) for g in generators])
    return {"x": x, "y": x.sum(1).round()}


def test_rows_in_both_batches_are_found():
    apart = examine(*on_rows(rows(1, 2, 3, 4), rows(5, 6, 7, 8)))
    assert "shared rows" not in kinds(apart, "warning")
    check = examine(*on_rows(rows(1, 2, 3, 4), rows(5, 4, 7, 1, 9)))
    assert "2 of the 4 rows" in finding_of(check, "shared rows").words


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("count", [4, 5])
def test_a_sum_over_rows_is_found_in_both_levels(mean, count):
    check = examine(*on_rows(rows(1, 2, 3), rows(*range(10, 10 + count)), mean))
    found = [f.level for f in check.findings if f.kind == "sum over rows"]
    assert len(found) == (0 if mean else 2)
