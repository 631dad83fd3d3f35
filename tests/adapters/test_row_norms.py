"""Row norms without forming V: their digits, their dtype, and that each pass measures anew."""

from __future__ import annotations

import pytest
import torch

from hyperopt_peft.adapters.dora.row_norms import measure


@pytest.mark.parametrize("power", [-20, 0, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_keep_their_digits_where_the_rows_all_but_vanish(
    power: int, dtype: torch.dtype
) -> None:
    """Of W0 and A of any size, and of a W0 in half precision."""
    a = 2.0**power * torch.randn(3, 8).to(dtype).float()
    w0 = -(1 - torch.tensor([0.02, 0.5, 0.05]))[:, None] * a
    w0 = w0.to(dtype)
    v = w0.double() + a.double()
    norms = measure(w0, a, torch.eye(3), 1.0)
    torch.testing.assert_close(norms.norm.double(), v.norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        norms.v_a.double(), v @ a.double().T, rtol=1e-5, atol=1e-5 * 4**power
    )


def test_norms_are_in_single_precision_under_autocast() -> None:
    w0, a, b = torch.randn(5, 8), torch.randn(3, 8), torch.randn(5, 3)
    expected = measure(w0, a, b, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = measure(w0, a, b, 0.5)
    assert torch.equal(actual.norm, expected.norm) and torch.equal(actual.v_a, expected.v_a)
