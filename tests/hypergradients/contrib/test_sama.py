"""`sama`: one step of the optimizer."""

import pytest
import torch
from torch.optim import SGD, AdamW

from hyperopt_peft import hypergradient
from tests.support.optimizers import OPTIMIZERS, make_levels, new_levels, start, trained
from tests.support.quadratic import FunctionLevel, flat


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("limit", [None, 0.05])
@pytest.mark.parametrize("training", [True, False])
def test_sama_is_unrolling_by_one_step(optimizer: str, limit: float | None, training: bool) -> None:
    """Clipping included, which makes D a full matrix; outside training the step is the next one."""
    kind, options = OPTIMIZERS[optimizer]
    estimates = []
    for method in ("sama:product=exact", "unrolled:steps=1"):
        levels = new_levels(kind, options, max_grad_norm=limit)
        if training:
            estimates.append(trained(levels, 1, 2, method))
        else:
            estimates.append(flat(hypergradient(*levels, method)))
    torch.testing.assert_close(*estimates, rtol=1e-12, atol=1e-12)


def test_a_step_is_recorded_with_its_own_gradient() -> None:
    """torch's Nesterov step over many tensors writes to it, and 0.43 would become 1.25."""
    actual = []
    for limit in (None, 0.9):
        w, u = start()
        made = SGD(w, lr=0.2, momentum=0.95, nesterov=True, foreach=True)
        levels = make_levels(made, w, u, max_grad_norm=limit)
        actual.append(trained(levels, 2, 1, "sama:product=exact"))
    assert torch.equal(*actual)


def test_half_precision_variables_have_their_step_in_single_precision() -> None:
    actual = []
    for dtype in (torch.bfloat16, torch.float64):
        w = torch.tensor([0.5, -1.0, 2.0], dtype=dtype, requires_grad=True)
        u = torch.tensor([0.25, 0.75, -0.5], dtype=dtype, requires_grad=True)
        adam = AdamW([w], lr=0.125, eps=0.5)
        lower = FunctionLevel(lambda _, w=w, u=u: (w - u).square().sum(), [w], optimizer=adam)
        upper = FunctionLevel(lambda _, w=w: w.square().sum(), [u])
        (h,) = hypergradient(upper, lower, "sama")
        assert h.dtype == dtype
        actual.append(h.double())
    torch.testing.assert_close(actual[0], actual[1], rtol=2e-2, atol=0)
