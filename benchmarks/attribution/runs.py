"""The runs of `scores`: texts, the model, recipes of training, and retraining without rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import pandas
import torch
from peft import LoraConfig, get_peft_model
from text_data import load_model, tweets
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from benchmarks.last_layers import LastLayers, States, encode, movies
from benchmarks.ratings import one_rater
from hyperopt_peft import Problem
from hyperopt_peft.attribution.level import train_level
from hyperopt_peft.attribution.scores import Evaluation, Trained
from hyperopt_peft.core.problem import devices_of
from hyperopt_peft.trainer.step import Accumulated, MicroBatch
from hyperopt_peft.utils.random_state import RandomState

TRAIN, ABOVE, CHUNK, LENGTH = 300, 100, 60, 12


@dataclass(frozen=True)
class Recipe:
    """The settings of a run: AdamW without dropout, at a constant rate if ``warm_up`` is 0.

    Otherwise the rate rises from 0 in the share ``warm_up`` of the steps, and then falls to 0.
    """

    batch: int = 16
    rate: float = 2e-3
    epsilon: float = 1e-8
    warm_up: float = 0.0
    epochs: float = 4.0
    dropout: float = 0.0

    @property
    def steps(self) -> int:
        """The steps of the run."""
        return round(self.epochs * math.ceil(TRAIN / self.batch))

    def factor(self, step: int) -> float:
        """The factor of the peak rate at ``step``, counted from 0."""
        if not self.warm_up:
            return 1.0
        rising = max(1, round(self.warm_up * self.steps))
        return min((step + 1) / rising, (self.steps - step) / max(1, self.steps - rising))


def _tweets() -> pandas.DataFrame:
    table = tweets().to_pandas()
    assert isinstance(table, pandas.DataFrame)
    return table


def _raters(domain: str) -> pandas.DataFrame:
    table = one_rater(domain, seed=0)
    return table.assign(label=table.noisy)


#: Texts by task, with columns ``text`` and ``label``; rated ones also have ``clean``.
TASKS = {
    "tweets": _tweets,
    "movies": movies,
    "raters of tweets": partial(_raters, "tweets"),
    "raters of movies": partial(_raters, "movies"),
}


@cache
def encoded(task: str) -> tuple[States, Tensor | None]:
    """A task's rows, of which the first half chose the settings, and clean labels if known."""
    table = TASKS[task]()
    table = table.sample(min(1200, len(table)), random_state=0)
    clean = torch.tensor(table.clean.to_numpy()) if "clean" in table else None
    return encode(list(table.text), torch.tensor(table.label.to_numpy()), LENGTH), clean


@dataclass(frozen=True)
class Rows:
    """The rows of a task that a seed draws.

    Attributes:
        train: the numbers of the training rows in ``states``, ``(n,)``.
        above: the numbers of the evaluation rows.
        labels: the labels of the training rows in training, ``(n,)``.
        wrong: whether a label is known to be wrong, ``(n,)``.
    """

    states: States
    train: Tensor
    above: Tensor
    labels: Tensor
    wrong: Tensor

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.states.labels.max()) + 1


def draw(task: str, seed: int, noise: str = "none", share: float = 0.0) -> Rows:
    """The rows of ``seed``, with a ``share`` of the training labels replaced by `planted` noise."""
    states, clean = encoded(task)
    half, source = len(states.labels) // 2, torch.Generator().manual_seed(seed)
    order = half + torch.randperm(half, generator=source)
    chosen, above = order[:TRAIN], order[TRAIN : TRAIN + ABOVE]
    noisy = states.labels[chosen]
    if clean is not None:
        judged = replace(states, labels=clean)  # Φ always has rows with right labels
        return Rows(judged, chosen, above, noisy, noisy != clean[chosen])
    labels = planted(noisy, int(states.labels.max()) + 1, noise, share, source)
    return Rows(states, chosen, above, labels, labels != noisy)


def planted(
    labels: Tensor, classes: int, noise: str, share: float, source: torch.Generator
) -> Tensor:
    """``labels`` with a ``share`` of wrong ones: ``uniform``, or ``class-dependent``.

    Class-dependent noise changes a class into the next one, and the last into the first, twice as
    often for even classes as for odd ones.
    """
    if noise == "none" or not share:
        return labels
    even = labels % 2 == 0
    odds = torch.where(even, 2.0, 1.0) if noise == "class-dependent" else torch.ones(len(labels))
    count = round(share * len(labels))
    rows = torch.multinomial(odds, count, generator=source)
    step = torch.ones(count, dtype=torch.int64)
    if noise == "uniform":
        step = torch.randint(1, classes, (count,), generator=source)
    changed = labels.clone()
    changed[rows] = (labels[rows] + step) % classes
    return changed


class RowWeighted(Problem):
    """1/B Σ v_i ℓ_i over a batch, which has the numbers of B training rows."""

    def __init__(self, model: nn.Module, rows: Rows, recipe: Recipe, seed: int) -> None:
        self.model, self.rows = model, rows
        self.weights = torch.ones(len(rows.train), requires_grad=True)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        optimizer = AdamW([p for _, p in named], lr=recipe.rate, eps=recipe.epsilon)
        source = torch.Generator().manual_seed(seed)
        data = DataLoader(
            range(len(rows.train)),  # type: ignore[arg-type]
            batch_size=recipe.batch,
            shuffle=True,
            generator=source,
        )
        schedule = LambdaLR(optimizer, recipe.factor)
        super().__init__(named, data=data, optimizer=optimizer, scheduler=schedule)

    def logits(self, index: Tensor) -> Tensor:
        """The logits of the rows ``index``, in batches without all-padding columns."""
        inputs = self.rows.states.inputs(index)
        length = int(inputs["mask"].sum(1).max())
        logits: Tensor = self.model(inputs["states"][:, :length], inputs["mask"][:, :length]).logits
        return logits

    def loss(self, batch: Tensor) -> Tensor:
        """The weighted mean over the batch."""
        each = cross_entropy(
            self.logits(self.rows.train[batch]), self.rows.labels[batch], reduction="none"
        )
        return (self.weights[batch] * each).mean()


def level(rows: Rows, recipe: Recipe, seed: int) -> RowWeighted:
    """The level of a new adapter on MiniLM's last two layers and a head, before training."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=recipe.dropout,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
    )
    body = LastLayers(load_model("minilm", ["no", "yes"]), rows.classes)
    model = get_peft_model(body, config)
    return RowWeighted(model.train(recipe.dropout > 0), rows, recipe, seed)


def trained(lower: RowWeighted, recipe: Recipe, memory_limit: float = 1.0) -> Trained:
    """Train ``lower``, with Φ the mean loss of the evaluation rows, and the loss over all rows."""
    run = train_level(lower, lower.weights, recipe.steps, memory_limit=memory_limit)
    rows = lower.rows

    def everything() -> Sequence[MicroBatch]:
        state = RandomState.capture(devices_of(lower))
        return [MicroBatch(part, state) for part in torch.arange(len(rows.train)).split(CHUNK)]

    @torch.no_grad()
    def probabilities(chosen: Sequence[int]) -> Tensor:
        return lower.logits(rows.train[torch.tensor(chosen)]).double().softmax(1)

    return Trained(
        run,
        Evaluation(lower.weights, [partial(evaluation_loss, lower)]),
        Accumulated(lower),
        everything,
        probabilities=probabilities,
        labels=rows.labels,
    )


def evaluation_loss(lower: RowWeighted) -> Tensor:
    """Φ: the mean loss of the evaluation rows, without dropout."""
    above, mode = lower.rows.above, lower.model.training
    lower.model.eval()
    labels = lower.rows.states.labels[above]
    loss = cross_entropy(lower.logits(above), labels, reduction="sum") / len(above)
    lower.model.train(mode)
    return loss


def actual(setting: Trained, masks: Sequence[Tensor]) -> Tensor:
    """The change of Φ when retrained without the rows of each mask, ``(R,)``."""
    before, changes = setting.evaluation.value(), []
    for out in masks:
        with setting.run.without(out):
            changes.append(setting.evaluation.value() - before)
    return torch.tensor(changes, dtype=torch.float64)


def random_rows(count: int, share: float, retrainings: int, seed: int) -> list[Tensor]:
    """The rows to leave out in each retraining."""
    source, size = torch.Generator().manual_seed(seed), round(share * count)
    return [torch.randperm(count, generator=source)[:size] for _ in range(retrainings)]
