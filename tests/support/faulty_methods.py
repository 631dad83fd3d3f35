"""Methods that a comparison refuses."""

from typing import Any

import torch
from datasets import concatenate_datasets
from torch import nn
from torch.nn.utils import parametrize

from hyperopt_peft import Method, ProblemError
from tests.support.trainers import data

TEST = data(rows=20, seed=5)


class Idle(Method):
    """Its loss has another tensor than the model's."""

    def lower_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
        return 0.0 * task_loss(batch)


class Left(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


class Parametrised(Method):
    """Leaves a parametrisation of the first A."""

    def prepare(self, model: Any) -> None:
        layer = next(m for n, m in model.named_modules() if n.endswith("lora_A.default"))
        parametrize.register_parametrization(layer, "weight", Left())


class Refuses(Method):
    """Its loss is refused when it is first computed."""

    def lower_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
        raise ProblemError("label_smoothing_factor: the levels have their own losses")


class Peeks(Method):
    """Trains on rows that it has of its own."""

    def all_rows(self, train: Any, upper: Any) -> Any:
        return concatenate_datasets([train, TEST.select(range(3))])
