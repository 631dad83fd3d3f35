"""Norms are kept as long as they are right, and no longer."""

import copy

import pytest
import torch

from hyperopt_peft import Engine, Problem
from hyperopt_peft.adapters import set_norm_grad, split_parameters, use_fast_dora
from hyperopt_peft.adapters.dora.row_norms import RowNormCache, measure
from hyperopt_peft.utils import versions
from tests.support.adapted_models import (
    adapted_layer,
    assert_same,
    output_and_gradients,
    randomise,
    single,
    tokens,
)


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
    found = measure(w0, a, torch.eye(3), 1.0)
    torch.testing.assert_close(found.norm.double(), v.norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        found.v_a.double(), v @ a.double().T, rtol=1e-5, atol=1e-5 * 4**power
    )


def test_norms_are_in_single_precision_under_autocast() -> None:
    w0, a, b = torch.randn(5, 8), torch.randn(3, 8), torch.randn(5, 3)
    expected = measure(w0, a, b, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = RowNormCache().norms(w0, a, b, 0.5, torch.float32)
    assert torch.equal(found.norm, expected.norm) and torch.equal(found.v_a, expected.v_a)


def test_nothing_is_kept_from_an_optimizer_that_leaves_no_trace() -> None:
    """8-bit optimizers write behind autograd's back: the version does not move."""
    model, x = use_fast_dora(randomise(single())), tokens(3)
    model(x)
    adapted_layer(model).lora_B["default"].weight.data.mul_(2)
    actual = model(x)
    torch.testing.assert_close(actual, set_norm_grad(model)(x), rtol=1e-12, atol=1e-12)


def test_norms_are_kept_while_writes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperopt_peft.adapters import row_norms

    measured = []
    measure = row_norms.measure
    monkeypatch.setattr(row_norms, "measure", lambda *a: measured.append(1) or measure(*a))
    model, x = use_fast_dora(randomise(single())), tokens(3)
    b = adapted_layer(model).lora_B["default"].weight
    m = adapted_layer(model).lora_magnitude_vector["default"].weight
    with versions.tracked():
        model(x)
        with torch.no_grad():
            m.mul_(2)
        model(x)
        assert len(measured) == 1
        with torch.no_grad():
            b.mul_(2)
        model(x)
        assert len(measured) == 2
        b.data.mul_(2)
        versions.bump([b])
        kept = model(x)
        assert len(measured) == 3
    torch.testing.assert_close(model(x), kept)
    model(x)
    assert len(measured) == 5
    torch.testing.assert_close(set_norm_grad(model)(x), kept, rtol=1e-12, atol=1e-12)


def test_norms_are_not_kept_from_one_span_to_the_next() -> None:
    model, x = use_fast_dora(randomise(single())), tokens(3)
    with versions.tracked():
        model(x)
    adapted_layer(model).lora_B["default"].weight.data.mul_(2)
    with versions.tracked():
        actual = model(x)
    torch.testing.assert_close(actual, set_norm_grad(model)(x), rtol=1e-12, atol=1e-12)


def test_a_copied_model_has_norms_of_its_own() -> None:
    with versions.tracked():
        model, x = use_fast_dora(randomise(single())), tokens(3)
        model(x)
        other = randomise(copy.deepcopy(model), seed=8)
        torch.testing.assert_close(other(x), set_norm_grad(copy.deepcopy(other))(x))


def test_gradients_flow_through_kept_norms() -> None:
    cache, model = RowNormCache(), use_fast_dora(randomise(single()))
    assert cache is not adapted_layer(model).lora_variant["default"].cache
    x = tokens(3)
    expected = output_and_gradients(model, x)
    with versions.tracked():
        for _ in range(2):
            assert_same(output_and_gradients(model, x), expected, 0)


def test_the_base_weight_is_watched_too() -> None:
    model, x = use_fast_dora(randomise(single())), tokens(3)
    with versions.tracked():
        model(x)
        with torch.no_grad():
            adapted_layer(model).get_base_layer().weight.mul_(2)
        actual = model(x)
    torch.testing.assert_close(actual, set_norm_grad(model)(x), rtol=1e-12, atol=1e-12)


def test_a_model_whose_precision_changes() -> None:
    model, x = use_fast_dora(randomise(single(dtype=torch.float32))), tokens(3)
    with versions.tracked():
        model(x.float())
        actual = model.double()(x)
    torch.testing.assert_close(actual, set_norm_grad(model)(x), rtol=1e-12, atol=1e-12)


def test_norms_of_inference_mode_enter_no_graph() -> None:
    model, x = use_fast_dora(randomise(single())), tokens(3)
    expected = output_and_gradients(model, x)
    with versions.tracked():
        with torch.inference_mode():
            model(x)
        assert_same(output_and_gradients(model, x), expected, 0)
        with torch.inference_mode():
            inside = model(x).clone()
    torch.testing.assert_close(inside, expected["output"])


class Fit(Problem):
    """Mean square output of the adapted layer."""

    def __init__(self, model: torch.nn.Module, variables: dict[str, torch.Tensor]) -> None:
        self.model = model
        optimizer = torch.optim.SGD(variables.values(), lr=0.01)
        super().__init__(variables.items(), data=[tokens(6)], optimizer=optimizer)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():  # as a metric would be computed
            self.model(batch)
        return self.model(batch).square().mean()


def test_a_callback_may_write_behind_the_back_of_autograd() -> None:
    histories = []
    for prepare in (set_norm_grad, use_fast_dora):
        model = prepare(randomise(single()))
        b = adapted_layer(model).lora_B["default"].weight
        split = split_parameters(model)
        engine = Engine(
            Fit(model, dict(split.magnitudes)),
            Fit(model, dict(split.directions)),
            "darts",
            callbacks=[lambda engine, record, b=b: b.data.mul_(1.5)],
            progress=False,
        )
        histories.append([record["upper_loss"] for record in engine.run(4)])
    assert histories[1] == pytest.approx(histories[0], rel=1e-9)
