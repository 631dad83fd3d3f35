"""A linear classifier whose lower level has one minimum, and derivatives of its value."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import SequenceClassifierOutput

from hyperopt_peft.core.examples import WeightedRows
from hyperopt_peft.core.labels import row_losses
from hyperopt_peft.core.task_level import TaskLevel
from hyperopt_peft.problems.weight_net import WeightNet
from hyperopt_peft.trainer.tags import without
from tests.support.newton import minimise

TAGS = ("source", "index")


def weighted(
    kind: str, model: Any, count: int, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[TaskLevel, WeightedRows]:
    """Levels over ``model``: drawn logits of ``count`` sources or rows above, or a net of losses.

    ``kind`` is "source", "index" or "net"; ``options`` are of the lower level.
    """
    if kind == "net":
        method = WeightNet(count)
        method.row_losses = row_losses
        method.prepare(model)
        method.net.to(dtype)
        variables: Any = method.upper_variables(model)
        for parameter in variables.values():
            nn.init.normal_(parameter)
        lower: Any = method.lower(model, lambda _: torch.zeros(()))
        lower.tags = TAGS
    else:
        logits = torch.randn(count, dtype=dtype, requires_grad=True)
        variables = {"logits": logits}
        weights = lambda batch: count * logits.softmax(0)[batch[kind]]  # noqa: E731
        lower = WeightedRows(model, weights, tags=TAGS, row_losses=row_losses, **options)
    loss = lambda batch: model(**without(batch, TAGS)).loss  # noqa: E731
    return TaskLevel(model, variables, task_loss=loss, name="Upper"), lower


class Linear(nn.Module):
    """A classifier of three classes with the interface of a Transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = x @ self.w
        loss = None if labels is None else cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def rows(count: int, seed: int, noise: float = 0.0) -> tuple[Any, ...]:
    """Rows with the labels of one fixed rule, a share ``noise`` of them redrawn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    rule = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [1, 1, -2]], dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=x @ rule).sample()
    redrawn = torch.rand(count, generator=generator) < noise
    labels = torch.where(redrawn, torch.randint(3, (count,), generator=generator), labels)
    return {"x": x, "labels": labels}, redrawn


def regularised(level: Any) -> Any:
    """``level`` with ½·0.1‖w‖² in its loss, so that its minimum is one point."""

    class Regularised(type(level)):
        def loss(self, batch: Any) -> Any:
            penalty = sum(w.square().sum() for w in self.variables)
            return super().loss(batch)["loss"] + 0.05 * penalty

    level.__class__ = Regularised
    return level


def value(upper: Any, lower: Any, upper_batch: Any, lower_batch: Any) -> Any:
    """F at the lower level's minimum, found from 0 by Newton's method."""
    nn.init.zeros_(lower.variables[0])
    minimise(lower, batch=lower_batch, tolerance=1e-12)
    return float(upper.loss(upper_batch).detach())


class Layers(nn.Module):
    """A classifier of sequences ``(n, T, 4)``, with the interface of a Transformers model.

    ``checkpointed`` recomputes the hidden layers in the backward pass.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 5, bias=False)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(5, 3)
        self.checkpointed = False
        self.double()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def hidden(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.first(x).tanh_())).relu_()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        hidden = checkpoint(self.hidden, x, use_reentrant=False) if self.checkpointed else None
        logits = self.head((self.hidden(x) if hidden is None else hidden).mean(1))
        loss = None if labels is None else cross_entropy(logits, labels)
        return SequenceClassifierOutput(logits=logits, loss=loss)


def sequences(count: int, seed: int) -> dict[str, Tensor]:
    """Rows for `Layers`, with the columns of sources and of examples."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(count, 3, 4, generator=generator, dtype=torch.float64),
        "labels": torch.randint(3, (count,), generator=generator),
        "source": torch.randint(3, (count,), generator=generator),
        "index": torch.randperm(count, generator=generator),
    }
