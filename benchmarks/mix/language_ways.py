"""The ways to mix sources of text, all trained by the product's trainers.

`MixTrainer` and the simple ways of `compare_baselines` are the product's. Two ways are other
authors' rules that see the loss of each source while they train: ODM (Albalak et al. 2023,
arXiv:2312.02406) and DoReMi (Xie et al. 2023, arXiv:2305.10429).
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from benchmarks.mix.instructions import PADDING, Language, Mix, collated, judged
from benchmarks.mix.language_tables import BY_DOTS, ON_FEATURES
from benchmarks.store import Row
from hyperopt_peft import BilevelTrainer, MixTrainer, MixTrainingArguments, compare_baselines
from hyperopt_peft.problems.data_sources import SOURCE, Mixture, SourceWeights
from hyperopt_peft.problems.example_weights import COLUMNS, without
from hyperopt_peft.problems.head_mix import RATE, Plan
from hyperopt_peft.problems.mix_baselines import Baselines
from hyperopt_peft.problems.mix_plans import (
    AGREEMENT,
    EQUAL,
    LEARNED,
    SOURCES_ALIKE,
    THEN_TRUSTED,
    TRUSTED_ONLY,
    with_setting,
)
from hyperopt_peft.problems.source_data import TRUSTED
from hyperopt_peft.utils.restore import assign_


@dataclass(frozen=True)
class Sizes:
    """How long the trainings are: a search and its training have the passes of three trainings.

    Attributes:
        rows: of a micro-batch.
        steps: of a training, of a micro-batch each.
        upper_steps: of a search, each after a lower step and on `trusted` rows.
        micro_batches: of a lower step of the search.
        trusted: rows of an upper step.
    """

    rows: int = 8
    steps: int = 60
    upper_steps: int = 25
    micro_batches: int = 3
    trusted: int = 16


@dataclass(frozen=True)
class Setting:
    """What a way chooses on development rows.

    Attributes:
        rate: of the adapter.
        length: of the last training, by `Sizes.steps`; a way has a length of 3 in all.
        upper_rate: of the learned weights.
    """

    rate: float = 2e-3
    length: float = 1.0
    upper_rate: float = 1.0


FULL = Sizes()


class Alone(BilevelTrainer):
    """Trains a level of its own loss."""

    def task_loss(self, batch: Any) -> Tensor:
        """As `BilevelTrainer.task_loss`, without the columns of `Mixture`."""
        return super().task_loss(without(batch, COLUMNS))


class Trial:
    """One draw of the rows, the model before training, and the ways to train it."""

    def __init__(
        self, language: Language, mix: Mix, seed: int, setting: Setting, sizes: Sizes = FULL
    ) -> None:
        self.mix, self.seed, self.setting, self.sizes = mix, seed, setting, sizes
        self.steps = max(1, round(sizes.steps * setting.length))
        self.model = language.model(seed)
        self._folder = TemporaryDirectory()

    def learner(self, hypergradient: str = "direct", search: Any = "adapter") -> MixTrainer:
        """A search of the weights with the options of all ways; with `Baselines` a host of them."""
        args = MixTrainingArguments(
            self._folder.name,
            hypergradient=hypergradient,
            search=search,
            max_steps=self.sizes.upper_steps,
            lower_steps=1,
            upper_learning_rate=self.setting.upper_rate,
            gradient_accumulation_steps=self.sizes.micro_batches,
            retrain_steps=self.steps,
            learning_rate=self.setting.rate,
            per_device_train_batch_size=self.sizes.rows,
            per_device_upper_batch_size=self.sizes.trusted,
            per_device_eval_batch_size=32,
            seed=self.seed,
            bf16=True,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        data = {"sources": self.mix.sources, "trusted": self.mix.trusted}
        return MixTrainer(self.model, args, **data, data_collator=collated)

    @cached_property
    def host(self) -> MixTrainer:
        """A trainer that does not search."""
        return self.learner()

    @property
    def names(self) -> tuple[str, ...]:
        """The sources and, last, the trusted rows."""
        return self.host.data.names

    @property
    def counts(self) -> dict[str, int]:
        """The rows of each."""
        return dict(zip(self.names, map(int, self.host.weights.counts), strict=True))

    @property
    def rows(self) -> Any:
        """The rows of all, with the number of their source."""
        return self.host.train_dataset

    def fit(self, level: Mixture, rows: Any, steps: int) -> None:
        """Train the adapter from its initial values by ``level`` on ``rows``."""
        assign_([p for p in self.model.parameters() if p.requires_grad], self.host.initial)
        args = self.host.args.for_retraining()
        args.max_steps = steps
        data = {"train_dataset": rows, "data_collator": collated}
        silent(Alone(self.model, lower=lambda _: level, upper=None, args=args, **data))

    def result(self) -> Row:
        """Loss of a token of the test answers, and how many of a hundred tokens are right."""
        loss, right = judged(self.model, self.mix.test)
        return {"loss": loss, "accuracy": right}


#: Trains the model of a trial; returns what else is worth a look.
Way = Callable[[Trial], Row]


def silent(trainer: Any) -> None:
    """Train without bars, summaries and warnings."""
    with redirect_stdout(StringIO()), warnings.catch_warnings(action="ignore"):
        trainer.train()


def shares(weights: SourceWeights) -> Row:
    """The shares by name."""
    values = weights.shares().tolist()
    return {"shares": {n: round(p, 3) for n, p in zip(weights.names, values, strict=True)}}


def by_product(method: str) -> Way:
    """A simple way of `compare_baselines`."""

    def way(trial: Trial) -> Row:
        with Baselines(trial.host) as baselines:
            with redirect_stdout(StringIO()):
                baselines.train(method, trial.steps, trial.host.data)
            return trial.result()

    return way


def learned(hypergradient: str) -> Way:
    """`MixTrainer` with an estimator."""

    def way(trial: Trial) -> Row:
        trainer = trial.learner(hypergradient)
        silent(trainer)
        return {**trial.result(), **shares(trainer.weights)}

    return way


def repeated(count: int) -> Way:
    """All rows with the same weight, and the trusted ones with ``count`` times theirs."""

    def way(trial: Trial) -> Row:
        with redirect_stdout(StringIO()):
            trial.host.retrain(with_setting(Plan(torch.ones(len(trial.names))), count))
        return {**trial.result(), **shares(trial.host.weights)}

    return way


def on_features(trial: Trial) -> Row:
    """`MixTrainer` with a search on a head."""
    trainer = trial.learner(search="head")
    begin = time.process_time()
    _ = trainer.head_mix.learned
    seconds = time.process_time() - begin
    silent(trainer)
    return {**trial.result(), **shares(trainer.weights), "search seconds": round(seconds, 1)}


def by_source(trial: Trial, logits: Tensor | None = None) -> SourceWeights:
    """Shares of the sources that do not hang on their sizes; equal ones without logits."""
    weights = SourceWeights(trial.counts, kind="softmax", average="sources")
    if logits is not None:
        weights.logits.data = logits
    return weights.requires_grad_(False)


def of_sources(choose: Callable[[Trial], set[str]]) -> Way:
    """The trusted rows and those of some sources, all with the same weight."""

    def way(trial: Trial) -> Row:
        numbers = {trial.names.index(name) for name in choose(trial) | {TRUSTED}}
        rows = trial.rows.select([k for k, n in enumerate(trial.rows[SOURCE]) if n in numbers])
        weights = SourceWeights(trial.counts).requires_grad_(False)
        trial.fit(Mixture(trial.model, weights), rows, trial.steps)
        return trial.result()

    return way


class Bandit(IterableDataset[Any]):
    """Rows of one source at a time, chosen by Exp3 with the training loss as reward (ODM).

    π_k = (1 − Kε)·softmax(ε'·R)_k + ε, ε = min(1/K, √(ln K/(K·t))), ε' that of the step before, and
    R_k ← .9·R_k + .1·loss/π_k of the chosen source.
    """

    def __init__(self, rows: Any, count: int, size: int, seed: int) -> None:
        self.rewards, self.step, self.random = [0.0] * count, 1, random.Random(seed)
        self.size = size
        self.sources: list[list[Row]] = [[] for _ in range(count)]
        for row in rows.to_list():
            self.sources[row[SOURCE]].append(row)
        self.drawn = [0] * count

    def shares(self) -> list[float]:
        """π."""
        count = len(self.rewards)

        def explored(step: int) -> float:
            return min(1 / count, math.sqrt(math.log(count) / (count * step)))

        now, before = explored(self.step), explored(max(1, self.step - 1))
        high = max(self.rewards)
        mass = [math.exp(before * (reward - high)) for reward in self.rewards]
        return [(1 - count * now) * m / sum(mass) + now for m in mass]

    def reward(self, source: int, loss: float) -> None:
        """Count a loss of the rows of ``source``."""
        self.rewards[source] = 0.9 * self.rewards[source] + 0.1 * loss / self.shares()[source]
        self.step += 1

    def __iter__(self) -> Iterator[Row]:
        while True:
            (k,) = self.random.choices(range(len(self.sources)), self.shares())
            self.drawn[k] += 1
            yield from self.random.sample(self.sources[k], min(self.size, len(self.sources[k])))


def odm(trial: Trial) -> Row:
    """Online data mixing."""
    bandit = Bandit(trial.rows, len(trial.names), trial.sizes.rows, trial.seed)
    level = Mixture(trial.model, SourceWeights(trial.counts).requires_grad_(False))
    level.observer = lambda batch, losses: bandit.reward(
        int(batch[SOURCE][0]), float(losses.sum()) / len(batch[SOURCE])
    )
    trial.fit(level, bandit, trial.steps)
    drawn = {n: round(c / sum(bandit.drawn), 3) for n, c in zip(trial.names, bandit.drawn)}
    return {**trial.result(), "shares": drawn}


def doremi(trial: Trial) -> Row:
    """DoReMi: a reference model, shares by its excess losses, and a training with these shares.

    α_k ∝ α_k·exp(mean excess of source k in the micro-batch, at least 0), mixed with .001 of equal
    shares; the excess is the loss of a row less that of the reference. The shares are the mean α.
    """
    half, count = max(1, trial.sizes.steps // 2), len(trial.names)
    every = trial.rows.add_column("index", range(len(trial.rows)))
    trial.fit(Mixture(trial.model, by_source(trial)), every, half)
    with Baselines(trial.host) as baselines:
        reference = baselines.losses(every.select_columns(list(PADDING)))
    level = Mixture(trial.model, by_source(trial))
    history = []

    def tell(batch: Any, losses: Tensor) -> None:
        source, known = batch[SOURCE], reference[batch["index"]]
        before = known.new_zeros(count).index_add(0, source, known)
        excess = (losses.detach() - before).clamp(min=0) / source.bincount(minlength=count).clamp(1)
        a = (level.weights.logits.data + excess).softmax(0) * (1 - 1e-3) + 1e-3 / count
        level.weights.logits.data = a.log()
        history.append(a)

    level.observer = tell
    trial.fit(level, every, half)
    weights = by_source(trial, torch.stack(history).mean(0).log())
    trial.fit(Mixture(trial.model, weights), every, trial.steps)
    return {**trial.result(), **shares(weights)}


def verdict(trial: Trial) -> Row:
    """What `compare_baselines` on the adapter recommends, by two folds; trained on all rows."""
    trainer = trial.learner(DOTS)
    silent(trainer)
    with redirect_stdout(StringIO()), Baselines(trainer) as baselines:
        comparison = compare_baselines(trainer, folds=2, equal_passes=False)
        best = comparison.recommended
        if best.method != LEARNED:  # by which the model is trained now
            baselines.train(best.method, int(best.setting), trainer.data)
        result = trial.result()
    return {**result, "named": best.method, "cv": {r.method: r.loss for r in comparison.results}}


DOTS = "darts:product=dots"
#: The ways by name, and what differs in the settings that each tries beside the rate.
ONE = ({}, {"length": 3.0})
SHORTER = ({}, {"length": 3.0}, {"length": 0.5})
AFTER = ({}, {"length": 2.0})
RATES = ({}, {"upper_rate": 0.3})
VERDICT = "verdict"
WAYS: dict[str, tuple[Way, Sequence[dict[str, float]]]] = {
    "uniform": (by_product(SOURCES_ALIKE), ONE),
    "proportional": (by_product(EQUAL), ONE),
    "proportional, trusted × 30": (repeated(30), ONE),
    "trusted alone": (by_product(TRUSTED_ONLY), SHORTER),
    "sources, then trusted": (by_product(THEN_TRUSTED), SHORTER),
    "agreement": (by_product(AGREEMENT), AFTER),
    "ODM": (odm, ONE),
    "DoReMi": (doremi, AFTER),
    "fastmix": (learned("fastmix"), RATES),
    BY_DOTS: (learned(DOTS), RATES),
    ON_FEATURES: (on_features, ({"upper_rate": RATE}, {"upper_rate": RATE, "length": 2.0})),
    "the target's sources": (of_sources(lambda t: {t.mix.target, t.mix.damaged}), ONE),
    # What nobody knows beforehand.
    "the target's clean rows": (of_sources(lambda t: {t.mix.target}), ONE),
}
