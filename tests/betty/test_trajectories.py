"""Programs for Betty take the same steps here, where Betty's formulas are right."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hyperopt_peft.betty
from tests.support.betty_programs import chain, ridge

pytest.importorskip(
    "betty", reason="pip install --no-deps --ignore-requires-python betty-ml==0.2.1"
)
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem

THEIRS = SimpleNamespace(
    Config=Config, EngineConfig=EngineConfig, Engine=Engine, ImplicitProblem=ImplicitProblem
)
BOTH = (THEIRS, hyperopt_peft.betty)


def clip_values(problem: Any) -> None:
    for x in problem.trainable_parameters():
        x.data.clamp_(-0.4, 0.4)


def halve_gradients(problem: Any) -> None:
    for x in problem.trainable_parameters():
        x.grad.mul_(0.5)


def shrink(problem: Any) -> None:
    problem.module.values.data.mul_(0.9)


CASES: dict[str, dict[str, Any]] = {
    "darts": {},
    "darts_alpha": {"lower": {"darts_alpha": 1.0}},
    "unrolled": {"lower": {"unroll_steps": 4}},
    "neumann": {"lower": {"type": "neumann", "neumann_iterations": 5, "neumann_alpha": 0.2}},
    "cg": {"lower": {"type": "cg", "cg_iterations": 1, "cg_alpha": 0.1}},
    "sama": {"lower": {"type": "sama", "sama_adam_alpha": 0.5}},
    "adam": {"hooks": {"optimizer": "adam"}},
    "clipping": {"lower": {"gradient_clipping": 0.3}, "upper": {"gradient_clipping": 0.01}},
    "accumulation": {
        "lower": {"gradient_accumulation": 2, "unroll_steps": 2},
        "upper": {"gradient_accumulation": 3},
    },
    "warmup": {"lower": {"warmup_steps": 7, "unroll_steps": 3}},
    "roll_back": {"lower": {"unroll_steps": 2}, "engine": {"roll_back": True}},
    "rolled back Adam": {"engine": {"roll_back": True}, "hooks": {"optimizer": "adam"}},
    "callbacks": {"hooks": {"param_callback": clip_values, "grad_callback": halve_gradients}},
    "inner loop": {"lower": {"unroll_steps": 3}, "hooks": {"on_inner_loop_start": shrink}},
    "no path": {"hooks": {"u2l": False}},
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_two_problems(case: str) -> None:
    options = CASES[case]
    parts = [options.get(x, {}) for x in ("engine", "lower", "upper")]
    runs = [
        ridge(b, {"train_iters": 23, **parts[0]}, *parts[1:], **options.get("hooks", {}))
        for b in BOTH
    ]
    start = runs[0].u.values.clone()
    for run in runs:
        run.engine.run()
    theirs, ours = runs
    assert case == "no path" or (theirs.u.values - start).norm() > 1e-3
    torch.testing.assert_close(ours.u.values, theirs.u.values, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours.w.values, theirs.w.values, rtol=1e-6, atol=1e-8)
    assert (ours.outer.count, ours.inner.count) == (theirs.outer.count, theirs.inner.count)


@pytest.mark.parametrize(
    ("lower", "middle", "engine"),
    [({}, {}, {}), ({"unroll_steps": 2}, {"unroll_steps": 3}, {}), ({}, {}, {"roll_back": True})],
    ids=["single", "unrolled", "roll_back"],
)
def test_three_problems(lower: Any, middle: Any, engine: Any) -> None:
    runs = [chain(betty, lower, middle, train_iters=24, **engine) for betty in BOTH]
    start = [x.clone() for x in runs[0].values]
    for run in runs:
        run.engine.run()
    assert min((x - y).norm() for x, y in zip(runs[0].values, start, strict=True)) > 1e-3
    torch.testing.assert_close(runs[1].values, runs[0].values, rtol=1e-6, atol=1e-8)
