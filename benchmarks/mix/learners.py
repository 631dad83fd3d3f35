"""The models of `cells`, and how each is trained: a head to its minimum, LoRA for some steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import torch
from peft import LoraConfig, get_peft_model
from text_data import load_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import LBFGS, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.last_layers import LastLayers
from benchmarks.mix.tasks import LAYERS, Task
from hyperopt_peft import Problem
from hyperopt_peft.problems.common import Adapter
from hyperopt_peft.problems.data_sources import NO_VOTE, Mixture, SourceWeights


@cache
def _encoder() -> Any:
    return load_model("minilm", ["no", "yes"])


@dataclass
class Passes:
    """Forward+backward passes: over all rows for a head, over a batch for LoRA."""

    count: float = 0.0


@dataclass(frozen=True)
class Learner(ABC):
    """A model, and how a level over it is trained.

    Attributes:
        repeat: how often a trusted row stands among the rows of the sources.
        hypergradient: the estimator.
        products: how many Hessian-vector products it takes.
    """

    #: Whether a training may begin where another one ended, and ends at the same minimum.
    warm: ClassVar[bool] = False

    repeat: int = 1
    hypergradient: str = "cg:steps=8"
    products: int = 8
    passes: Passes = field(default_factory=Passes, compare=False, repr=False)

    @abstractmethod
    def model(self, task: Task) -> Any:
        """The model before training."""

    @abstractmethod
    def level(
        self,
        task: Task,
        model: Any,
        rows: Tensor,
        votes: Tensor,
        weights: SourceWeights | None,
        *,
        after: bool = False,
        search: bool = False,
    ) -> Adapter:
        """The loss of ``votes`` on ``rows``, weighted, or without ``weights`` of a class a row.

        ``after`` another training the level stays near where that one ended; in a ``search`` it
        goes on and on.
        """

    @abstractmethod
    def train(self, level: Adapter, *, after: bool = False) -> None:
        """A whole training, or one ``after`` another."""

    @abstractmethod
    def advance(self, lower: Problem) -> None:
        """Lower steps of a search."""

    @abstractmethod
    def count_products(self, above: int) -> None:
        """Count a hypergradient with ``above`` rows above: second derivatives as two passes."""

    def batch(self, task: Task, rows: Tensor) -> dict[str, Tensor]:
        """Rows with their true labels."""
        return {**task.inputs(rows), "labels": task.labels[rows]}

    @torch.no_grad()
    def logits(self, task: Task, model: Any, rows: Tensor) -> Tensor:
        """The logits of ``rows``, ``(n, C)``."""
        return torch.cat([model(**task.inputs(part)).logits for part in rows.split(200)])

    def outcome(self, task: Task, model: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each row, and whether it is right, ``(n,)`` both."""
        logits, labels = self.logits(task, model, rows), task.labels[rows]
        return cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels

    def agrees(self, task: Task, model: Any) -> Tensor:
        """Which votes of the training rows ``model`` gives too, ``(n, K)``."""
        return task.votes[task.train] == self.logits(task, model, task.train).argmax(1)[:, None]

    def agreement(self, task: Task, model: Any) -> Tensor:
        """The share of each source's votes that ``model`` gives too, ``(K,)``.

        One further right and ``classes − 1`` further wrong votes keep it off 0 and 1.
        """
        counts = (task.votes[task.train] != NO_VOTE).sum(0)
        return (self.agrees(task, model).sum(0) + 1) / (counts + task.classes)


class LogisticHead(nn.Module):
    """A linear map of ``features``, initially 0."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, classes))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Cross entropy and logits."""
        logits = features @ self.weight + self.bias
        loss = None if labels is None else cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits)


class HeadLevel(Adapter):
    """`Mixture`'s loss over all rows, with an L2 penalty: ½·l2·‖W − center‖².

    The weights of the votes of a row are first added up by class.
    """

    def __init__(
        self,
        model: LogisticHead,
        features: Tensor,
        votes: Tensor,
        weights: SourceWeights | None,
        l2: float,
        center: Tensor | None,
    ) -> None:
        self.features, self.weights, self.l2, self.center = features, weights, l2, center
        self.row, self.source = (votes != NO_VOTE).nonzero(as_tuple=True)
        self.entry = self.row * len(model.bias) + votes[self.row, self.source]
        super().__init__(model)

    def loss(self, batch: None) -> Tensor:
        """The weighted mean over the votes, and the penalty."""
        logits = self.model(self.features).logits
        each = torch.ones(len(self.row)) if self.weights is None else self.weights()[self.source]
        mass = torch.zeros(logits.numel()).index_add(0, self.entry, each).view_as(logits)
        fit = (mass.sum(1) * logits.logsumexp(1)).sum() - (mass * logits).sum()
        away = self.model.weight if self.center is None else self.model.weight - self.center
        return fit / len(each) + self.l2 / 2 * away.square().sum()


@dataclass(frozen=True)
class Head(Learner):
    """A logistic head on the frozen encoder's features, trained to its minimum by L-BFGS.

    Training goes on from where the level is.

    Attributes:
        l2: the weight of the penalty.
        near: the weight of the penalty after another training.
    """

    warm = True
    repeat: int = 10
    l2: float = 0.1
    near: float = 0.1
    tolerance: float = 1e-3

    def model(self, task: Task) -> LogisticHead:
        """A head of zeros."""
        features = task.inputs(task.trusted[:1])["features"]
        return LogisticHead(features.shape[1], task.classes)

    def level(
        self,
        task: Task,
        model: Any,
        rows: Tensor,
        votes: Tensor,
        weights: SourceWeights | None,
        *,
        after: bool = False,
        search: bool = False,
    ) -> HeadLevel:
        """The whole loss."""
        center = model.weight.detach().clone() if after else None
        l2 = self.near if after else self.l2
        return HeadLevel(model, task.inputs(rows)["features"], votes, weights, l2, center)

    def train(self, level: Any, *, after: bool = False) -> None:
        """L-BFGS."""
        optimizer = LBFGS(
            level.variables,
            max_iter=200,
            tolerance_grad=self.tolerance,
            tolerance_change=1e-9,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> float:
            self.passes.count += 1
            evaluation = level.gradient(None, level.variables)
            for variable, slope in zip(level.variables, evaluation.gradient, strict=True):
                variable.grad = slope
            return float(evaluation.loss)

        optimizer.step(closure)
        optimizer.zero_grad()

    def advance(self, lower: Problem) -> None:
        """To the minimum."""
        self.train(lower)

    def count_products(self, above: int) -> None:
        """The rows above are few."""
        self.passes.count += 1 + 2 * (self.products + 1)


@dataclass(frozen=True)
class Lora(Learner):
    """LoRA in the last layers on cached states, AdamW without dropout.

    The rate of a training falls to 0, that of a search is constant.

    Attributes:
        rate: the peak rate.
        steps: of a training.
        after: of a training after another.
        inner: steps of a search for one upper step.
        search_batch: rows of a batch in a search. The hypergradient of the weights is of one
            batch, which needs several rows of each source.
    """

    repeat: int = 2
    hypergradient: str = "minres:steps=3,damping=0.1"
    products: int = 3
    rate: float = 3e-3
    steps: int = 100
    after: int = 40
    inner: int = 3
    batch_size: int = 16
    search_batch: int = 128
    seed: int = 0

    def model(self, task: Task) -> Any:
        """The last layers with a new adapter and a new head."""
        torch.manual_seed(self.seed)
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["query", "value"],
            modules_to_save=["classifier"],
        )
        return get_peft_model(LastLayers(deepcopy(_encoder()), task.classes, 6 - LAYERS), config)

    def level(
        self,
        task: Task,
        model: Any,
        rows: Tensor,
        votes: Tensor,
        weights: SourceWeights | None,
        *,
        after: bool = False,
        search: bool = False,
    ) -> Adapter:
        """With batches of ``rows``."""
        named = [p for p in model.parameters() if p.requires_grad]
        optimizer, steps = AdamW(named, lr=self.rate), self.after if after else self.steps

        def batch(numbers: list[int]) -> dict[str, Tensor]:
            index = torch.tensor(numbers)
            mixed = weights is not None
            return {
                **task.inputs(rows[index]),
                **self.given(task, rows[index], votes[index], mixed),
            }

        data = DataLoader(
            range(len(rows)),  # type: ignore[arg-type]
            batch_size=min(self.search_batch if search else self.batch_size, len(rows)),
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(self.seed),
            collate_fn=batch,
        )
        falling = LambdaLR(optimizer, lambda step: max(0.0, min(1.0, 1.1 * (1 - step / steps))))
        options = {"data": data, "optimizer": optimizer, "scheduler": None if search else falling}
        if weights is None:
            return Adapter(model, **options)
        return Mixture(model, weights, **options)

    def given(self, task: Task, rows: Tensor, votes: Tensor, mixed: bool) -> dict[str, Tensor]:
        """What a level reads beside the inputs: the votes of sources, or one class a row."""
        return {"votes": votes} if mixed else {"labels": votes[:, 0]}

    def train(self, level: Any, *, after: bool = False) -> None:
        """As many steps as the schedule has."""
        self._steps(level, self.after if after else self.steps)

    def advance(self, lower: Problem) -> None:
        """Some steps."""
        self._steps(lower, self.inner, self.search_batch / self.batch_size)

    def _steps(self, level: Problem, steps: int, passes: float = 1) -> None:
        for _ in range(steps):
            evaluation = level.gradient(level.next_batch(), level.variables)
            level.step(evaluation.gradient)
        self.passes.count += steps * passes

    def count_products(self, above: int) -> None:
        """The rows above, and second derivatives of a batch below, in small batches."""
        below = self.search_batch * (1 + 2 * (self.products + 1))
        self.passes.count += (above + below) / self.batch_size
