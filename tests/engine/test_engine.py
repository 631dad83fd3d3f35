"""The loop over two levels: order of steps, records, callbacks, errors."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR

from hyperopt_peft import Engine, ProblemError, Solver, hypergradient
from hyperopt_peft.engine import step
from hyperopt_peft.errors import HypergradientWarning
from hyperopt_peft.hypergradients import ConjugateGradient, Solution
from tests.support.networks import differences, network_levels
from tests.support.quadratic import FunctionLevel, leaf

Log = list[tuple[str, Any]]


def logged_levels(log: Log, **options: Any) -> tuple[FunctionLevel, FunctionLevel]:
    """(w − u)² below and w² above; each evaluation is logged with its batch."""
    w, u = leaf(3.0), leaf(1.0)

    def below(batch: int) -> dict[str, Any]:
        log.append(("lower", batch))
        return {"loss": (w - u).square().sum(), "batch": batch}

    def above(batch: int) -> dict[str, Any]:
        log.append(("upper", batch))
        return {"loss": w.square().sum() + u.square().sum(), "batch": batch}

    upper = FunctionLevel(above, [u], data=[10, 11], lr=0.1, name="above")
    lower = FunctionLevel(below, [w], data=[0, 1, 2], lr=0.1, name="below")
    return upper, lower


def run(log: Log, steps: int, method: str = "direct", **options: Any) -> Engine:
    engine = Engine(*logged_levels(log), method, progress=False, **options)
    engine.run(steps)
    return engine


def test_lower_steps_come_before_each_upper_step_and_warmup_before_the_first() -> None:
    log: Log = []
    engine = run(log, 2, lower_steps=2, warmup_steps=3)
    lower = [("lower", k % 3) for k in range(7)]
    assert log == [*lower[:5], ("upper", 10), *lower[5:], ("upper", 11)]
    assert (engine.step, engine.lower_step) == (2, 7)


def test_runs_continue_and_warm_up_once() -> None:
    log, whole = [], []
    engine = run(log, 1, warmup_steps=2)
    assert len(engine.run(3)) == 3 and len(engine.history) == 4
    run(whole, 4, warmup_steps=2)
    assert log == whole


@pytest.mark.parametrize("method", ["darts:scheme=forward", "cg", "unrolled:steps=2"])
def test_a_hypergradient_sees_the_batch_of_the_last_lower_step(method: str) -> None:
    log: Log = []
    run(log, 1, method, lower_steps=2)
    asked_by_the_estimator = {batch for name, batch in log[3:] if name == "lower"}
    assert log[:3] == [("lower", 0), ("lower", 1), ("upper", 10)]
    assert asked_by_the_estimator == ({0, 1} if method.startswith("unrolled") else {1})


def test_a_record_tells_the_step() -> None:
    log: Log = []
    (record,) = run(log, 1, "cg").history
    w = 3.0 - 0.1 * 2 * (3.0 - 1.0)  # after the lower step
    direct, implicit = 2 * 1.0, 2 * w  # dw*/du = 1
    assert record == {
        "step": 1,
        "upper_loss": pytest.approx(w**2 + 1),
        "lower_loss": pytest.approx(4),
        "lower_grad_norm": pytest.approx(4),
        "upper_grad_norm": pytest.approx(direct + implicit),
        "implicit_ratio": pytest.approx(implicit / direct),
        "residual": pytest.approx(0, abs=1e-6),
        "solver_steps": 1,
        "gradients": 2,  # of F, and of f with its graph
        "products": 2,  # a Hessian-vector and a mixed one
        "note": "",
        "upper_batch": 10.0,
        "lower_batch": 0.0,
    }


def test_callbacks_see_each_record_and_can_stop() -> None:
    seen = []

    def callback(engine: Engine, record: dict[str, Any]) -> None:
        seen.append(record)
        if record["step"] == 3:
            engine.stop()

    log: Log = []
    engine = Engine(*logged_levels(log), "direct", callbacks=[callback], progress=False)
    assert engine.run(10) == seen and len(seen) == 3
    assert len(engine.run(2)) == 2 and len(engine.history) == 5


def test_each_level_is_clipped_and_scheduled_by_its_own_steps() -> None:
    w, u = leaf(3.0), leaf(1.0)
    upper = FunctionLevel(lambda _: 50 * (w + u).sum(), [u], lr=1.0, max_grad_norm=0.25)
    lower = FunctionLevel(lambda _: 7 * (w * u).sum(), [w], lr=1.0, max_grad_norm=0.5)
    for level, factor in ((upper, 0.5), (lower, 0.1)):
        level.scheduler = ExponentialLR(level.optimizer, factor)
    history = Engine(upper, lower, "direct", lower_steps=2, progress=False).run(2)
    assert u.item() == pytest.approx(1 - 0.25 * (1 + 0.5))
    assert w.item() == pytest.approx(3 - 0.5 * (1 + 0.1 + 0.01 + 0.001))
    assert history[0]["upper_grad_norm"] == pytest.approx(50)
    assert history[0]["lower_grad_norm"] == pytest.approx(7)


W, U = leaf(1.0), leaf(1.0)


def level(variables: Any, optimizer: bool = True, **options: Any) -> FunctionLevel:
    made = SGD(variables, lr=0.1) if optimizer else None
    return FunctionLevel(lambda _: (W * U).sum(), variables, optimizer=made, **options)


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: Engine(level([U], False, name="up"), level([W])), "up: .*optimizer"),
        (lambda: Engine(level([U]), level([W], False, name="low")), "low: .*optimizer"),
        (lambda: Engine(level([U], name="up"), level([U], name="low")), "up's .*low's"),
        (lambda: hypergradient(level([U]), level([U])), "variable 0"),
        (lambda: FunctionLevel(None, [W], optimizer=torch.optim.LBFGS([W])), "LBFGS.*minimum"),
        (lambda: Engine(level([U]), level([W]), lower_steps=0), "lower_steps.* 0"),
        (lambda: Engine(level([U]), level([W]), warmup_steps=-1), "warmup_steps.*-1"),
        (lambda: Engine(level([U]), level([W]), non_finite="ignore"), "non_finite.*ignore"),
        (lambda: Engine(level([U]), level([W]), "dart"), "'dart'.*'darts'"),
        (lambda: Engine(level([U]), level([W]), "unrolled:steps=3"), "unrolled.*lower_steps"),
        (lambda: Engine(level([U]), level([W, leaf(1.0)]), "direct").run(1), "'variable 1'"),
        (lambda: Engine(level([U, leaf(1.0)]), level([W]), "direct").run(1), "'variable 1'"),
    ],
)
def test_mistakes_are_named(construct: Callable[[], object], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        construct()


def test_a_variable_that_one_loss_reads_is_enough() -> None:
    """The penalty of a ridge regression is read by f alone, a bias of F's by F alone."""
    w, of_f, of_upper = leaf(1.0), leaf(1.0), leaf(1.0)
    upper = FunctionLevel(lambda _: (w + of_upper).square().sum(), [of_f, of_upper], lr=0.1)
    lower = FunctionLevel(lambda _: (w - of_f).square().sum(), [w], lr=0.1)
    Engine(upper, lower, "cg", progress=False).run(2)
    assert of_f.item() != 1 and of_upper.item() != 1
    before = of_f.item()
    with pytest.warns(HypergradientWarning, match=r"variable 0.*direct"):
        Engine(upper, lower, "direct", progress=False).run(1)
    assert of_f.item() == before


def test_a_hypergradient_without_an_implicit_term_is_noticed() -> None:
    """Of a loss that is concave at the lower variables, and of another copy of these."""
    w, u = leaf(1.0), leaf(1.0)
    upper = FunctionLevel(lambda _: w.square().sum(), [u], lr=0.1)
    lower = FunctionLevel(lambda _: -u * w.square().sum(), [w], lr=0.1)
    with pytest.warns(HypergradientWarning, match="cg: .*exactly 0 .*curvature"):
        Engine(upper, lower, "cg", progress=False).run(1)
    copy = leaf(1.0)
    upper.function = lambda _: copy.square().sum()
    lower.function = lambda _: (w - u).square().sum()
    with pytest.warns(HypergradientWarning, match="no implicit term"):
        Engine(upper, lower, "cg", progress=False).run(2)


def test_a_variable_that_the_first_losses_read_may_be_left_out_later() -> None:
    """By a batch of another kind, say; the step then leaves it alone."""
    (w, v), (u, c) = (leaf(1.0), leaf(1.0)), (leaf(1.0), leaf(1.0))
    options = {"data": [True, False], "lr": 0.1}
    upper = FunctionLevel(
        lambda whole: (w - u).sum() + (c.sum() if whole else 0), [u, c], **options
    )
    lower = FunctionLevel(
        lambda whole: (w - u).square().sum() + (v.sum() if whole else 0), [w, v], **options
    )
    Engine(upper, lower, "cg:damping=1", progress=False).run(2)
    assert v.item() == c.item() == pytest.approx(0.9)


class Reported(Solver):
    """Its v, 47 times too long, has the residual 46."""

    def solve(self, matvec: Any, b: Any) -> Solution:
        return Solution(47 * ConjugateGradient(steps=50).solve(matvec, b).v, 46.0, 1)


def test_a_solver_that_diverges_is_one_warning_a_run() -> None:
    engine = Engine(*levels_at_rest(), Reported(), progress=False)
    with pytest.warns(HypergradientWarning, match=r"residual is 46") as caught:
        engine.run(3)
    assert len(caught) == 1 and [record["residual"] for record in engine.history] == [46.0] * 3


def levels_at_rest(term: Callable[[Tensor, Tensor], Any] = lambda w, u: 0.0) -> Any:
    """f = |w − u|² + ``term`` and F = |w|²; the upper level does not move."""
    w, u = leaf(1.0, 2.0), leaf(1.0, 3.0)
    upper = FunctionLevel(lambda _: w.square().sum(), [u], lr=0.0)
    return upper, FunctionLevel(lambda _: (w - u).square().sum() + term(w, u), [w], lr=0.1)


WRONG = pytest.mark.parametrize(
    "term",
    [lambda w, u: (w.detach() * w).sum(), lambda w, u: (w.detach() * u).sum()],
    ids=["of w", "of u"],
)


@WRONG
def test_a_wrong_second_derivative_is_one_warning_a_run(term: Any) -> None:
    """Of a loss that detaches; differences of its gradients see the missing part."""
    with pytest.warns(HypergradientWarning, match="minres: .*exact product differs") as caught:
        Engine(*levels_at_rest(term), progress=False).run(3)
    assert len(caught) == 1
    with pytest.warns(HypergradientWarning, match="minres: .*exact product differs") as caught:
        hypergradient(*levels_at_rest(term))
    assert len(caught) == 1 and caught[0].filename == __file__
    Engine(*levels_at_rest(term), "minres:product=difference", progress=False).run(1)


@pytest.mark.parametrize("half", [False, True])
def test_the_comparison_of_products_leaves_no_trace(half: bool, monkeypatch: Any) -> None:

    def trained() -> Any:
        torch.manual_seed(0)
        engine = Engine(*network_levels(), "minres:steps=2", progress=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            engine.run(2)
        return engine.history, engine.state_dict(), engine.upper.net.state_dict()

    compared = trained()
    monkeypatch.setattr(step, "check_products", lambda *_: "")
    assert differences(compared, trained()) == []


@pytest.mark.parametrize("kind", ["mapping", "tuple", "tensor"])
@pytest.mark.parametrize("method", ["minres", "minres:product=difference", "darts"])
def test_a_loss_may_write_to_its_batch(method: str, kind: str) -> None:

    def trained(noise: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(0)
        w, u, x = leaf(1.0, 2.0), leaf(1.0, 3.0), torch.ones(4, 2)
        batch = {"mapping": {"x": x}, "tuple": (x, 1), "tensor": x}[kind]

        def f(batch: Any) -> Tensor:
            entries = batch if kind == "tensor" else batch["x"] if kind == "mapping" else batch[0]
            return ((noise(entries) @ w).square() + (w - u).square().sum()).mean()

        upper = FunctionLevel(lambda _: w.square().sum(), [u], lr=0.1)
        Engine(upper, FunctionLevel(f, [w], lr=0.1, data=[batch]), method, progress=False).run(3)
        return u.detach()

    written = trained(lambda x: x.add_(torch.randn_like(x)))
    torch.testing.assert_close(written, trained(lambda x: x + torch.randn_like(x)), rtol=0, atol=0)


@pytest.mark.parametrize("lr", [1e-3, 0.1])
def test_steps_below_the_rounding_are_one_warning(lr: float) -> None:
    w, u = leaf(1.0), torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    upper = FunctionLevel(lambda _: u.sum(), [u], lr=lr)
    lower = FunctionLevel(lambda _: w.square(), [w], lr=0.1)
    engine = Engine(upper, lower, "direct", progress=False)
    engine.run(10)
    rest = bool((u == 1).all())
    with pytest.warns(HypergradientWarning, match="unchanged") if rest else nullcontext():
        engine.run(1)
    engine.run(20)
    assert rest == (lr == 1e-3)
