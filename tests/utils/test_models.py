"""Layers of 4 and 8 bits: which are differentiable, and which round their input."""

from pathlib import Path

import pytest
import torch
from torch import nn

from hyperopt_peft.utils.models import keep_differentiable, rounds_activations
from tests.support.language import quantised

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("before", [True, False], ids=["before the pass", "after the pass"])
def test_gradients_are_those_before_a_pass_in_evaluation_mode(tmp_path: Path, before: bool) -> None:
    model = quantised(tmp_path, hidden_size=64)  # bitsandbytes packs blocks of 64 weights
    inputs = nn.Parameter(torch.ones(1, 3, 64))

    def gradient() -> torch.Tensor:
        logits = model.train()(inputs_embeds=inputs * 1.0).logits
        return torch.autograd.grad(logits.square().sum(), inputs)[0]

    expected = gradient()
    if before:
        keep_differentiable(model)
    with torch.no_grad():
        model.eval()(input_ids=torch.ones(1, 3, dtype=torch.int64))
    keep_differentiable(model)
    # Packing rounds the blocks' scales to bfloat16.
    tolerance = 0.0 if before else 2e-2
    assert (gradient() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("kwargs", [None, object()])
def test_layers_of_torchao_round_where_their_weights_say_how(kwargs: object) -> None:
    layer = nn.Linear(2, 1)
    layer.weight.act_quant_kwargs = kwargs  # type: ignore[attr-defined]
    assert rounds_activations(layer) == (kwargs is not None)
