"""Options of the lower optimizer as functions of upper variables, against differences."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import ExponentialLR

from hyperopt_peft import Engine, ProblemError, hypergradient
from hyperopt_peft.hypergradients import registered
from tests.support.learned_options import Learned, logs, make
from tests.support.optimizers import BATCHES, OPTIMIZERS, f, slopes, start, trained, upper_f
from tests.support.quadratic import FunctionLevel, flat


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
