"""Forward mode is reverse mode, step by step and over a whole run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam

from hyperopt_peft import BilevelTrainingArguments, Engine, ProblemError, hypergradient
from hyperopt_peft.hypergradients import Vector
from hyperopt_peft.hypergradients.estimate import estimate, open_oracle
from tests.support.by_hand import OPTIMIZERS, make_levels, start
from tests.support.learned_options import make
from tests.support.quadratic import flat

each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The hypergradients of an Engine's run."""
    actual = []

    def spy(oracle: Any, method: str) -> Any:
        result = estimate(oracle, method)
        actual.append(flat(result.hypergradient))
        return result

    monkeypatch.setattr("hyperopt_peft.engine.step.estimate", spy)
    return actual


@each_optimizer
@pytest.mark.parametrize("training", [False, True])
def test_forward_and_reverse_mode_agree(optimizer: str, training: bool, seen: Any) -> None:
    kind, options = OPTIMIZERS[optimizer]
    actual = []
    for method in ("forward", "unrolled"):
        levels = make(kind, options, grouped=True, max_grad_norm=0.3)
        if training:
            torch.manual_seed(0)
            method = f"{method}:steps=3"
            Engine(*levels, method, lower_steps=4, warmup_steps=1, progress=False).run(1)
            actual.append(seen[-1])
        else:
            actual.append(flat(hypergradient(*levels, f"{method}:steps=3")))
    torch.testing.assert_close(actual[0], actual[1], rtol=1e-12, atol=1e-13)


def test_each_step_sees_its_own_dropout_mask(seen: Any) -> None:
    for method in ("forward", "unrolled"):
        torch.manual_seed(3)
        w, u = start()
        levels = make_levels(Adam(w, lr=0.05), w, u, dropout=0.5)
        Engine(*levels, f"{method}:steps=3", lower_steps=3, progress=False).run(1)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-12, atol=1e-13)


@each_optimizer
def test_carried_tangents_look_back_on_the_whole_run(optimizer: str, seen: Any) -> None:
    """At a u that rests, six upper steps of one lower step are reverse mode through six."""
    kind, options = OPTIMIZERS[optimizer]
    forward = Engine(
        *make(kind, options, upper_rate=0.0, max_grad_norm=0.3),
        "forward:carry=true",
        warmup_steps=1,
        progress=False,
    )
    forward.run(2)
    again = Engine(
        *make(kind, options, upper_rate=0.0, max_grad_norm=0.3),
        "forward:carry=true",
        warmup_steps=1,
        progress=False,
    )
    again.load_state_dict(forward.state_dict())
    again.run(4)
    for k, carried in list(enumerate(seen, 1)):
        reverse = Engine(
            *make(kind, options, upper_rate=0.0, max_grad_norm=0.3),
            f"unrolled:steps={k}",
            lower_steps=k,
            warmup_steps=1,
            progress=False,
        )
        reverse.run(1)
        torch.testing.assert_close(carried, seen[-1], rtol=1e-12, atol=1e-12)
    assert len(again._step._records) == 1  # one step is kept, whatever it looks back on


def test_without_carry_the_steps_before_the_last_upper_step_are_left_out(seen: Any) -> None:
    for method in ("forward:steps=2", "unrolled:steps=2"):
        levels = make(*OPTIMIZERS["adamw"], upper_rate=0.0)
        Engine(*levels, method, lower_steps=2, progress=False).run(3)
    for forward, reverse in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(forward, reverse, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("kind", "tolerance"), [("exact", 1e-12), ("difference", 1e-7)])
def test_the_tangent_of_the_gradient_is_that_of_autograd(kind: str, tolerance: float) -> None:
    w, u = start()
    upper, lower = make_levels(None, w, u)
    v, e = (Vector(torch.randn_like(x) for x in xs) for xs in (w, u))
    batch = lower.peek_batch()
    g = torch.autograd.grad(lower.loss(batch), w, create_graph=True)
    rows = [torch.autograd.grad(s, (*w, *u), retain_graph=True) for s in flat(g)]
    expected = torch.stack([flat(row) for row in rows]) @ torch.cat([flat(v), flat(e)])
    before = flat([*w, *u]).detach()
    with open_oracle(upper, lower).open() as oracle, oracle.product(kind) as product:
        actual = flat(product.tangent(v, e))
        mixed = flat(product.tangent(0.0 * v, e))
        hessian = flat(product.hessian(v))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mixed + hessian, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(flat([*w, *u]), before)


def test_too_many_unknowns_are_sent_to_reverse_mode() -> None:
    levels = make(SGD, {"lr": 0.1})
    with pytest.raises(ProblemError, match="limit=5"):
        hypergradient(*levels, "forward:limit=5")
    with pytest.raises(ProblemError, match="limit=5"):
        Engine(*levels, "forward:limit=5", warmup_steps=1000)
    hypergradient(*levels, "forward:limit=6")
    with pytest.raises(ProblemError, match="limit"):
        hypergradient(*levels, "forward:limit=0")


def test_carried_tangents_need_every_lower_step(tmp_path: Path) -> None:
    levels = make(SGD, {"lr": 0.1})
    with pytest.raises(ProblemError, match="lower_steps=3"):
        Engine(*levels, "forward:carry=true", lower_steps=3)
    with pytest.raises(ProblemError, match="every lower step"):
        BilevelTrainingArguments(
            str(tmp_path), hypergradient="forward:carry=true", lower_steps=2, use_cpu=True
        ).estimator()
