"""The functional form of an optimizer, and options that are functions of upper variables."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from hyperopt_peft import Engine, ProblemError, hypergradient
from hyperopt_peft.hypergradients import Estimate, Oracle, registered
from hyperopt_peft.hypergradients.unrolled.optimizer_step import DifferentiableStep
from tests.support.learned_options import Learned, logs, make
from tests.support.optimizers import (
    BATCHES,
    OPTIMIZERS,
    f,
    make_levels,
    slopes,
    start,
    trained,
    upper_f,
)
from tests.support.quadratic import FunctionLevel, flat

Points = list[tuple[Tensor, Tensor]]
KINDS = list(dict.fromkeys(kind for kind, _ in OPTIMIZERS.values()))


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> Points:
    """Where each lower step of an Engine's run led, in functional form and in truth."""
    points: Points = []

    plain = Oracle.estimate

    def spy(oracle: Oracle, method: Any) -> Estimate:
        if not oracle.history:  # outside training
            return plain(oracle, method)
        functional = DifferentiableStep(oracle.lower, oracle.history[-1].optimizer)
        truths = [step.variables for step in oracle.history[1:]] + [oracle.lower.variables]
        for step, truth in zip(oracle.history, truths, strict=True):
            points.append((flat(functional.advance(step)[0]), flat(truth).detach().clone()))
        return plain(oracle, method)

    monkeypatch.setattr(Oracle, "estimate", spy)
    return points


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_function_replays_the_real_optimizer(optimizer: str, replayed: Points) -> None:
    kind, options = OPTIMIZERS[optimizer]
    w, u = start()
    made = kind([{"params": [w[1]]}, {"params": [w[0]], "lr": 0.01}], **options)
    levels = make_levels(made, w, u, max_grad_norm=0.3)
    Engine(*levels, "unrolled:steps=3", lower_steps=3, progress=False).run(4)
    assert len(replayed) == 12
    for actual, truth in replayed:
        torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_variables_that_a_batch_does_not_read_rest(optimizer: str, replayed: Points) -> None:
    """The real optimizer passes over them: it neither decays them nor moves them on."""
    kind, options = OPTIMIZERS[optimizer]
    w, u = start()

    def loss(reads_both: bool) -> Tensor:
        first = (w[0] * u[0][:, None]).square().sum()
        return first + (w[1] * u[1]).square() if reads_both else first

    upper = FunctionLevel(lambda _: w[0].sum() * w[1], u, lr=0.0)
    made = kind([{"params": [x]} for x in w], **options)
    lower = FunctionLevel(loss, w, data=[True, False], optimizer=made)
    Engine(upper, lower, "unrolled:steps=2", lower_steps=2, progress=False).run(1)
    for actual, truth in replayed:
        torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "max_grad_norm"),
    [("unrolled:steps=2", 1.0), ("forward:steps=2", None), ("sama:product=exact", 1.0)],
)
def test_a_gradient_that_is_exactly_zero_gives_no_nan(
    kind: type[Optimizer], max_grad_norm: float | None, method: str
) -> None:
    """Square roots and norms have no derivative at 0, where ∂f/∂w is here."""
    w, u = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options = {"optimizer": kind([w], lr=0.1), "max_grad_norm": max_grad_norm}
    lower = FunctionLevel(lambda _: (w - u).square().sum() / 2, [w], **options)
    upper = FunctionLevel(lambda _: (w - 1).square().sum() / 2, [u])
    (h,) = hypergradient(upper, lower, method)
    assert torch.isfinite(h).all() and (h != 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["unrolled:steps=3", "forward:steps=3"])
def test_a_variable_of_no_dimension_keeps_its_precision(
    kind: type[Optimizer], method: str, replayed: Points
) -> None:
    """A float64 number of no dimension, Adam's count, would widen it."""
    actual = []
    for dtype in (torch.float32, torch.float64):
        w = torch.tensor(0.5, dtype=dtype, requires_grad=True)
        u = torch.tensor(0.2, dtype=dtype, requires_grad=True)
        f, made = lambda _, w=w, u=u: (w - u).square(), kind([w], lr=0.1)
        lower = FunctionLevel(f, [w], optimizer=made)
        upper = FunctionLevel(lambda _, w=w: w.square(), [u], lr=1.0)
        assert hypergradient(upper, lower, method)[0].dtype is dtype
        Engine(upper, lower, method, lower_steps=3, progress=False).run(1)
        actual.append(float(u.detach()))
    assert actual[0] == pytest.approx(actual[1], rel=1e-5)
    for after, truth in replayed:
        assert after.dtype is truth.dtype


@pytest.mark.parametrize("limit", [1e-6, 1.0])
def test_a_gradient_just_below_the_limit_is_clipped_alike(limit: float, replayed: Points) -> None:
    """As torch does, by limit/(norm + 1e-6): at a small limit that is a factor of its own."""
    w = torch.tensor([limit - 5e-7], dtype=torch.float64, requires_grad=True)
    u = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    f = lambda _: (w.square() / 2 + u * w).sum()  # noqa: E731
    lower = FunctionLevel(f, [w], lr=0.5, max_grad_norm=limit)
    upper = FunctionLevel(lambda _: w.sum(), [u], lr=0.0)
    x = w.detach().clone().requires_grad_()
    x.grad = x.detach().clone()
    torch.nn.utils.clip_grad_norm_([x], limit)
    assert x.grad is not None and x.grad < x
    Engine(upper, lower, "unrolled", progress=False).run(1)
    ((actual, truth),) = replayed
    torch.testing.assert_close(actual, truth, rtol=1e-14, atol=0)
    torch.testing.assert_close(w.detach(), (x - 0.5 * x.grad).detach(), rtol=1e-14, atol=0)


def hooked(w: Any) -> SGD:
    """An optimizer that projects after each step."""
    optimizer = SGD(w, lr=0.1)
    optimizer.register_step_post_hook(lambda *_: [x.detach().clamp_(min=0.0) for x in w])
    return optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda w: None, "optimizer"), (torch.optim.NAdam, "NAdam"), (hooked, "step hooks")],
)
@pytest.mark.parametrize("method", ["unrolled", "forward", "sama"])
def test_optimizers_that_cannot_be_unrolled_are_named(make: Any, message: str, method: str) -> None:
    w, u = start()
    with pytest.raises(ProblemError, match=f"FunctionLevel: .*{message}"):
        hypergradient(*make_levels(make(w), w, u), method)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("grouped", "method"), [(False, "unrolled"), (True, "forward")])
def test_training_is_differentiated(optimizer: str, grouped: bool, method: str) -> None:
    levels = partial(make, *OPTIMIZERS[optimizer], grouped, max_grad_norm=0.3)
    expected = slopes(levels, 3, before=2)
    assert (expected[-2:].abs() > 1e-4).all()
    actual = trained(levels(), 2, 3, f"{method}:steps=3")
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


def test_a_schedule_and_a_learnt_decay_go_together() -> None:
    """The schedule owns the learning rate: each step is taken, and differentiated, at its own."""

    def levels() -> Any:
        (w, u), (_, decay) = start(), logs()
        upper = FunctionLevel(lambda _: upper_f(w, u), [*u, decay], lr=1.0)
        options = lambda: {"weight_decay": decay.exp()}  # noqa: E731
        lower = Learned(lambda b: f(w, u, b), w, options, data=BATCHES, lr=0.3)
        lower.scheduler = ExponentialLR(lower.optimizer, 0.7)
        return upper, lower

    actual = trained(levels(), 0, 3, "unrolled:steps=3")
    torch.testing.assert_close(actual, slopes(levels, 3), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", sorted(registered().keys() - {"unrolled", "forward"}))
def test_estimators_that_do_not_see_options_are_refused(method: Any) -> None:
    upper, lower = make(SGD, {"lr": 0.1})
    with pytest.raises(ProblemError, match="variable 2, variable 3"):
        Engine(upper, lower, method, progress=False)
    with pytest.raises(ProblemError, match='"unrolled" or "forward"'):
        hypergradient(upper, lower, method)


@pytest.mark.parametrize("method", ["unrolled", "forward"])
@pytest.mark.parametrize("decay", [0.1, torch.tensor(1)])
def test_options_that_are_plain_numbers_are_what_they_are(method: str, decay: Any) -> None:
    """Whole ones too, and without rounding: as if the optimizer had been made with them."""
    actual = []
    for options in ({"weight_decay": decay}, {}):
        upper, lower = make(AdamW, {"weight_decay": float(decay)})
        rate, unread = upper.variables[2], upper.variables[3]
        lower.options = lambda rate=rate, options=options: {"lr": rate.exp(), **options}
        upper.function = lambda _, f=upper.function, unread=unread: f(None) + unread
        Engine(upper, lower, f"{method}:steps=2", lower_steps=2, progress=False).run(1)
        actual.append(flat(upper.variables).detach())
    assert torch.equal(*actual)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("method", ["unrolled", "forward"])
@pytest.mark.parametrize("steps", [1, 2])
def test_outside_training_an_unread_variable_does_not_decay(method: str, steps: int) -> None:
    """A step leaves it alone; of the others, w' = w − lr·(2w + u·w)."""
    read, unread = (torch.full((2,), x, dtype=torch.float64, requires_grad=True) for x in (1, 3))
    decay = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    options = lambda: {"weight_decay": decay}  # noqa: E731
    lower = Learned(lambda _: read.square().sum(), [read, unread], options, lr=0.5)
    upper = FunctionLevel(lambda _: read.sum() + unread.sum(), [decay])
    (h,) = hypergradient(upper, lower, f"{method}:steps={steps}")
    factor = 1 - 0.5 * (2 + 0.1)
    expected = 2 * steps * factor ** (steps - 1) * -0.5
    assert float(h) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 0.99)}, "'betas'"),
        ([{"lr": 0.1}] * 3, "3 .* 1 "),
        ({"lr": -0.1}, "lr .*-0.1"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"lr": torch.ones(2)}, r"lr .*\(2,\)"),
    ],
)
def test_bad_options_are_named_and_nothing_moves(options: Any, message: str) -> None:
    _, lower = make(SGD, {"lr": 0.1})
    lower.options = lambda: options
    before = flat(lower.variables).detach()
    with pytest.raises(ProblemError, match=message):
        lower.step(lower.gradient(BATCHES[0], lower.variables).gradient)
    assert torch.equal(flat(lower.variables), before)


def test_a_learnt_rate_needs_an_optimizer_and_no_schedule() -> None:
    upper, lower = make(SGD, {"lr": 0.1})
    lower.scheduler = ExponentialLR(lower.optimizer, 0.9)
    with pytest.raises(ProblemError, match=r"scheduler .*optimizer_options"):
        lower.step(lower.gradient(BATCHES[0], lower.variables).gradient)
    lower.optimizer = None
    with pytest.raises(ProblemError, match="optimizer_options"):
        hypergradient(upper, lower, "cg")


@pytest.mark.parametrize("method", ["unrolled:steps=2", "forward:steps=2,limit=9"])
def test_a_group_without_variables_has_options_that_nobody_reads(method: str) -> None:
    """Transformers makes one of all biases and norms, which an adapter may lack."""
    actual = []
    for empty in (False, True):
        upper, lower = make(Adam, {"lr": 0.1})
        (rate,) = upper.variables[-2:-1]
        own = {"lr": rate.exp()}
        if empty:
            lower.optimizer = Adam([{"params": []}, {"params": list(lower.variables)}], lr=0.1)
            lower.options = lambda own=own: [{"lr": 0.7}, own]
        else:
            lower.options = lambda own=own: own
        actual.append(flat(hypergradient(upper, lower, method)))
    assert torch.equal(*actual)
