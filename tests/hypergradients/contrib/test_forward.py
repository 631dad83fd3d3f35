"""`forward`: tangents over a whole run, and few upper unknowns; test_unrolled has the rest."""

from pathlib import Path

import pytest
import torch
from torch.optim import SGD

from hyperopt_peft import BilevelTrainingArguments, Engine, ProblemError, hypergradient
from tests.support.learned_options import make
from tests.support.optimizers import OPTIMIZERS
from tests.support.quadratic import taken


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_carried_tangents_look_back_on_the_whole_run(optimizer: str) -> None:
    """At a u that rests, six upper steps of one lower step are reverse mode through six."""

    def engine(method: str, **options: int) -> Engine:
        levels = make(*OPTIMIZERS[optimizer], max_grad_norm=0.3)
        return Engine(*levels, method, warmup_steps=1, progress=False, **options)

    forward, again = (engine("forward:carry=true") for _ in range(2))
    carried = taken(forward, 2)
    again.load_state_dict(forward.state_dict())
    for k, actual in enumerate([*carried, *taken(again, 4)], 1):
        (expected,) = taken(engine(f"unrolled:steps={k}", lower_steps=k))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert len(again._step._records) == 1  # one step is kept, whatever it looks back on


def test_without_carry_the_steps_before_the_last_upper_step_are_left_out() -> None:
    forward, reverse = (
        taken(Engine(*make(*OPTIMIZERS["adamw"]), method, lower_steps=2, progress=False), 3)
        for method in ("forward:steps=2", "unrolled:steps=2")
    )
    torch.testing.assert_close(forward, reverse, rtol=1e-12, atol=1e-13)


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
    with pytest.raises(ProblemError, match="every lower step"):
        BilevelTrainingArguments(
            str(tmp_path), hypergradient="forward:carry=true", lower_steps=2, use_cpu=True
        ).estimator()
