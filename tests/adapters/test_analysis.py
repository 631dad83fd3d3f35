import pytest
import torch
from torch import nn

from hyperopt_peft.adapters import decompose
from tests.support.adapted_models import (
    KINDS,
    Single,
    adapted_layer,
    dora_bert,
    randomise,
    single,
    wrap,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_has_changed_at_initialisation(
    kind: str, use_dora: bool, dtype: torch.dtype
) -> None:
    """Exactly, so that rounding is not taken for training."""
    (change,) = decompose(single(kind, use_dora=use_dora, dtype=dtype))
    assert (change.delta_magnitude, change.delta_direction) == (0, 0)


def test_changes_come_by_module_in_model_order() -> None:
    model = randomise(dora_bert())
    changes = decompose(model)
    assert [c.module for c in changes] == [
        f"base_model.model.bert.encoder.layer.{i}.attention.self.{target}"
        for i in (0, 1)
        for target in ("query", "value")
    ]
    assert all(c.delta_magnitude > 0 and 0 < c.delta_direction < 2 for c in changes)


def test_a_moved_magnitude_is_a_change_of_magnitude_only() -> None:
    model = single()
    m = adapted_layer(model).lora_magnitude_vector["default"].weight
    with torch.no_grad():
        m += torch.tensor([0.1, -0.2, 0.3, 0.0, -0.4])
    (change,) = decompose(model)
    assert change.delta_magnitude == pytest.approx(0.2, rel=1e-7)
    assert change.delta_direction == 0


@pytest.mark.parametrize("angles", [(0.5, 1.0, 2.0), (1e-6, 2e-6, 0.0)])
def test_turned_rows_change_by_one_minus_the_cosine(angles: tuple[float, ...]) -> None:
    """W0 = diag(1, 2, 3); row j is turned by angle j towards the next axis, length doubled."""
    lengths = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    base = nn.Linear(3, 3, bias=False).double()
    base.weight.data = torch.diag(lengths)
    theta = torch.tensor(angles, dtype=torch.float64)
    turned = torch.diag(theta.cos()) + torch.diag(theta.sin()).roll(1, dims=1)
    expected = (2 * (theta / 2).sin() ** 2).mean().item()

    for use_dora in (True, False):
        model = wrap(Single(base), r=3, lora_alpha=3, use_dora=use_dora)
        layer = adapted_layer(model)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(torch.eye(3))
            v = 2 * lengths[:, None] * turned
            layer.lora_B["default"].weight.copy_(v - base.weight)
        (change,) = decompose(model)
        assert change.delta_direction == pytest.approx(expected, rel=1e-6)
        # DoRA's magnitude has not moved; without one, it is the length of V.
        assert change.delta_magnitude == pytest.approx(0.0 if use_dora else 2.0, abs=1e-12)
        base = model.unload().layer
