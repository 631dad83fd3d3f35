"""Dot products in the lower step's own backward pass: exact ones, for the passes of F alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperopt_peft import NonFiniteError
from hyperopt_peft.problems.row_weights import RowWeights
from hyperopt_peft.problems.sources import Sources
from hyperopt_peft.problems.weight_net import WeightNet
from tests.support import dots_in_processes, two_processes
from tests.support.dots_in_processes import learnt, trained
from tests.support.trainers import peft_model

WEIGHTS: dict[str, Any] = {
    "sources": Sources,
    "rows": lambda: RowWeights(keep=None),
    "net": lambda: WeightNet(5),
}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_training_is_that_of_the_exact_product(weights: str, tmp_path: Path) -> None:
    """With dropout, accumulation and checkpointing. Llama takes its norms in float32."""
    options = {"gradient_checkpointing": True, "method": WEIGHTS[weights], "optim": "sgd"}
    options |= {"dtype": torch.float64, "upper_learning_rate": 10.0}
    exact, dots = (
        trained(tmp_path, f"darts:product={product}", **options) for product in ("exact", "dots")
    )
    torch.testing.assert_close(learnt(dots), learnt(exact), rtol=1e-4, atol=1e-6)
    assert (learnt(dots) - dots.start).abs().max() > 1e-3


def test_an_upper_step_costs_passes_of_the_upper_loss_alone(tmp_path: Path) -> None:
    """4 steps of 2 micro-batches, and 2 upper steps on one batch each.

    Three evaluations before the first step tell whether the Trainer's loss reads a count, and two
    whether it is the mean over labels.
    """
    model, calls = peft_model("causal", dropout=0.1, dora=False), []
    model.register_forward_hook(lambda *_: calls.append(model.training))
    trained(tmp_path, "darts:product=dots", model=model, per_device_upper_batch_size=8)
    assert sum(calls) == 3 + 2 + 4 * 2 + 2


class Poisoned(Sources):
    """An upper loss that is not a number in the second upper step, of two pieces each."""

    count = 0

    def upper_loss(self, model: Any, batch: Any, task_loss: Any) -> Tensor:
        self.count += 1
        return task_loss(batch) * (torch.nan if self.count == 3 else 1)


def test_an_upper_loss_that_is_not_finite_skips_the_step(tmp_path: Path) -> None:
    """Though F is differentiated before the step's own passes, whose batches are used up."""
    trainer = trained(tmp_path, "darts:product=dots", method=Poisoned, non_finite="skip")
    assert trainer.skipped == 1 and not any(m._forward_hooks for m in trainer.model.modules())
    with pytest.raises(NonFiniteError, match=r"step 4.*loss is nan"):
        trained(tmp_path, "darts:product=dots", method=Poisoned)


@pytest.mark.slow
def test_shards_train_as_one_process_does(tmp_path: Path) -> None:
    """Under FSDP2 the adapter is sharded, and the weights of the sources are on both processes."""
    shipped = Path(__file__).parents[2] / "examples" / "accelerate" / "fsdp2.yaml"
    configuration = tmp_path / "fsdp2.yaml"
    configuration.write_text(shipped.read_text().replace("BertLayer", "LlamaDecoderLayer"))
    two = two_processes.run(dots_in_processes, tmp_path, configuration=configuration)
    for name, options in dots_in_processes.RUNS.items():
        one = dots_in_processes.train(tmp_path / "one", 4, **options)
        for key, expected in one.items():
            found = [process[name][key] for process in two]
            assert torch.equal(*found)
            tolerance = 0.1 if name == "half" else 1e-5
            assert (found[0] - expected).norm() < tolerance * expected.norm(), (name, key)
