"""``--weight_column`` weighs the loss that the model has, whatever its class."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from hyperopt_peft.cli.text.setup import WEIGHTS, MethodArguments, RowWeights
from hyperopt_peft.problems import AdapterTrainer
from tests.support.trainers import base_model

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10], [4, 6, 8, 3]])


class WeightedAdapter(RowWeights, AdapterTrainer):
    """As the command makes one."""


def trainer_of(folder: Path, **members: object) -> WeightedAdapter:
    """Of a causal model as remote code defines one: its class is in no list of Transformers."""
    base = base_model("causal", dropout=0.0)
    base.__class__ = type("Remote", (type(base),), members)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    args = MethodArguments(str(folder), use_cpu=True, report_to="none", method="lora")
    columns = {"input_ids": IDS.tolist(), "labels": IDS.tolist(), WEIGHTS: [1.0] * 3}
    return WeightedAdapter(model, args, train_dataset=Dataset.from_dict(columns))


def test_weights_are_of_the_shifted_loss_of_remote_code(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    model, batch = trainer.model, {"input_ids": IDS, "labels": IDS}
    scores = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    losses = -scores.gather(2, IDS[:, 1:, None])[..., 0]
    for weights in ([1.0, 1.0, 1.0], [2.0, 0.0, 0.5]):
        weighted = trainer.compute_loss(model, {**batch, WEIGHTS: torch.tensor(weights)})
        expected = (torch.tensor(weights) * losses.sum(1)).sum() / losses.numel()
        assert float(weighted) == pytest.approx(float(expected), rel=1e-5)
    unweighted = trainer.compute_loss(model, dict(batch))
    assert float(unweighted) == pytest.approx(float(losses.mean()), rel=1e-5)
