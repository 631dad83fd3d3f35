"""The methods to train an adapter on sources and trusted rows, beside that of learned weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from copy import copy
from functools import cached_property, partial
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.common import trainable
from hyperopt_peft.problems.data_sources import SOURCE, SourceWeights
from hyperopt_peft.problems.example_weights import COLUMNS, example_losses, without
from hyperopt_peft.problems.features import Features
from hyperopt_peft.problems.head_mix import Plan
from hyperopt_peft.problems.head_rows import HeadRows, kept
from hyperopt_peft.problems.mix_plans import (
    AGREEMENT,
    COORDINATES,
    FILTERED,
    LEARNED,
    LEARNED_THEN,
    LOG_ODDS,
    SOURCES_ALIKE,
    TRIED,
    WITHOUT_ONE,
    methods_of,
    of_equal_shares,
    trusted_only,
)
from hyperopt_peft.problems.mix_trainer import MixTrainer, phases_of
from hyperopt_peft.problems.source_data import TRUSTED, SourceData
from hyperopt_peft.problems.source_trainer import equal_weights
from hyperopt_peft.problems.votes import VOTES
from hyperopt_peft.trainer.data import label_column
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils.distributed import broadcast
from hyperopt_peft.utils.restore import assign_


class Baselines:
    """Trains the model of a `MixTrainer` by each method; a ``with`` block leaves it as it was.

    It is the `mix_plans.Mix` of the adapter: a model of the trusted rows, and trainings without a
    source, are those of the adapter. Nothing is written or printed, and the user's callbacks are
    not called.

    Attributes:
        data: what the last training read, at first the trainer's.
        steps: the optimizer steps of the trainer's retraining.
        passes_of_a_step: micro-batches in one of these steps.
        passes: the passes over a micro-batch of the trainer's search and retraining.
        row_weights: the weights of a row that the last training of `LEARNED` found, by source; at
            first the trainer's own.
    """

    _rows: HeadRows | None

    def __init__(self, trainer: MixTrainer) -> None:
        self.trainer, self.model = trainer, trainer.model
        self.variables = [parameter for _, parameter in trainable(self.model)]
        args = trainer.args.for_retraining()
        self.passes_of_a_step: int = args.gradient_accumulation_steps
        self.steps = args.steps_of(len(trainer.train_dataset))
        self.passes = trainer.search_passes()
        if trainer.args.retrain != "none":
            self.passes += self.steps * self.passes_of_a_step
        self.row_weights = trainer.row_weights()
        self._options = {**trainer.options, "callbacks": None, "eval_dataset": None}
        self._take(trainer.data)

    @cached_property
    def methods(self) -> list[str]:
        """The names of the methods, in the order in which they are to be trained."""
        return list(methods_of(self))

    @property
    def rows(self) -> HeadRows:
        """The rows of `data`, without features; many uses need none."""
        if self._rows is None:
            self._rows = self._rows_of(self.data)
        return self._rows

    def _take(self, data: SourceData) -> None:
        """Let ``data`` be those of the next trainings."""
        self.data, self._rows = data, None
        self._plans: dict[str, Plan] = {}
        self._of_trusted_model: dict[str, Tensor] = {}

    def __enter__(self) -> Baselines:
        self._end = [variable.detach().clone() for variable in self.variables]
        self._folder = TemporaryDirectory(prefix="mix-")
        return self

    def __exit__(self, *exception: Any) -> None:
        self._folder.cleanup()
        assign_(self.variables, self._end)

    def restart(self) -> None:
        """Give the model its initial values."""
        assign_(self.variables, self.trainer.initial)

    def keep(self) -> None:
        """Let the ``with`` block leave the model as it is now."""
        self._end = [variable.detach().clone() for variable in self.variables]

    @property
    def learned(self) -> Plan:
        """The plan of `row_weights`."""
        weights = torch.tensor([self.row_weights[name] for name in self.data.names])
        return Plan(weights / weights.max())

    def objective(self, plan: Plan) -> float:
        """The mean loss of the trusted rows after `steps` by ``plan``, which trains on them too."""
        self._fit(plan, self.steps)
        return float(self.losses(self.data.trusted).mean())

    def before(self, method: str) -> tuple[str, int]:
        """What ``method`` looks at first, by name, and for how many trainings of `steps`."""
        tried = min(TRIED, len(self.data.names) - 1)
        trainings = {WITHOUT_ONE: tried, COORDINATES: 1 + tried}
        if method in (AGREEMENT, LOG_ODDS, FILTERED):
            return TRUSTED, 1
        return method, trainings.get(method, 0)

    def passes_of(self, method: str, steps: int) -> int:
        """The passes of `train`."""
        if method == LEARNED:
            return self.passes
        _, trainings = self.before(method)
        return (trainings * self.steps + steps) * self.passes_of_a_step

    def train(self, method: str, steps: int, data: SourceData) -> int:
        """Train the model by ``method`` for ``steps`` from its initial values; returns the passes.

        Learned weights have the steps of the trainer; `LEARNED_THEN` takes those of the last
        training of `LEARNED`. Some methods begin with other trainings, of a model of the trusted
        rows or without a source, which ``steps`` does not count and the passes do.
        """
        if data is not self.data:
            self._take(data)
        if method == LEARNED:
            self.restart()
            args, kind = self._silenced(copy(self.trainer.args)), type(self.trainer)
            made = self.trainer.trainer_of(kind, args, sources=data, **self._options)
            _run(made)
            self.row_weights = made.row_weights()
        else:
            if method == LEARNED_THEN or method not in self._plans:
                self._plans[method] = methods_of(self)[method](self)
            weights = alike if method == SOURCES_ALIKE else None
            self._fit(self._plans[method], steps, weights)
        return self.passes_of(method, steps)

    def losses(self, rows: Dataset) -> Tensor:
        """The loss of each of ``rows``, trusted ones, ``(n,)``, without dropout."""
        return self._of_rows({TRUSTED: rows}, partial(example_losses, self.model))

    def predictions(self) -> Tensor:
        """The most likely class of each of the sources' rows by a model of the trusted ones."""

        def predicted(batch: Any) -> Tensor:
            classes: Tensor = self.model(**without(batch, ("labels", *COLUMNS))).logits.argmax(-1)
            return classes

        return self._by_trusted_model("classes", predicted)

    def source_losses(self) -> Tensor:
        """The loss of each of the sources' rows by that model, ``(m,)``."""
        return self._by_trusted_model("losses", partial(example_losses, self.model))

    def _by_trusted_model(self, name: str, function: Callable[[Any], Tensor]) -> Tensor:
        """``function`` of the sources' rows, the same one for a ``name``."""
        if name not in self._of_trusted_model:
            self._fit(trusted_only(self), self.steps)
            sources = {part: rows for part, rows in self.data.parts.items() if part != TRUSTED}
            self._of_trusted_model[name] = self._of_rows(sources, function)
        return self._of_trusted_model[name]

    def _rows_of(self, data: SourceData) -> HeadRows:
        """``data`` with one feature that is 0; labels that are no class of a row are numbers."""
        rows, labels, outputs = data.everything, torch.zeros(len(data.everything)), 1
        groups = torch.tensor(rows[VOTES if VOTES in rows.column_names else SOURCE][:])
        column = label_column(rows)
        if self.trainer.of_classes and column is not None:
            labels = torch.tensor(rows[column][:])
            votes = groups.shape[2] if groups.dim() == 3 else 1 + int(groups.max())
            outputs = max(1 + int(labels.max()), votes if groups.dim() > 1 else 1)
        features = Features(torch.zeros(len(rows), 1), labels, torch.arange(len(rows)))
        options = {"outputs": outputs, "trusted_votes": data.trusted_votes}
        return HeadRows.of(data.names, features, groups, **options)

    def _fit(
        self,
        plan: Plan,
        steps: int,
        weights: Callable[[Mapping[str, int]], SourceWeights] | None = None,
    ) -> None:
        """Train by ``plan`` for ``steps`` from the initial values; ``weights`` replace its own."""
        self.restart()
        data = self.data if plan.groups is None else kept(self.data, plan.groups, self.rows)
        for parts, count in phases_of(plan, data, steps):
            args = self._silenced(self.trainer.args.for_retraining())
            args.max_steps = max(1, count)
            of_plan = partial(_fixed, plan) if len(parts) > 1 else equal_weights
            _run(self.trainer.of_parts(parts, args, weights or of_plan, **self._options))

    def _silenced(self, args: Any) -> Any:
        """``args`` that write nothing."""
        args.output_dir, args.report_to, args.save_strategy = self._folder.name, [], "no"
        args.eval_strategy = args.logging_strategy = "no"
        args.disable_tqdm, args.load_best_model_at_end = True, False
        return args

    @torch.no_grad()
    def _of_rows(self, parts: Mapping[str, Dataset], function: Callable[[Any], Tensor]) -> Tensor:
        """``function`` of batches of all rows in ``parts``, as the parent prepares single rows."""
        args, made = self.trainer.args, self.trainer.of_single_rows(parts)
        count = sum(map(len, parts.values()))
        if len(made.train_dataset) != count:
            raise ProblemError(
                f"compare_baselines: the trainer leaves out {count - len(made.train_dataset)} of "
                f"{count} rows, without a label to score; remove these rows"
            )
        self.model.eval()
        loader: Any = DataLoader(
            made.train_dataset, args.per_device_eval_batch_size, collate_fn=made.data_collator
        )
        batches = (send_to_device(dict(batch), args.device) for batch in loader)
        with made.compute_loss_context_manager():
            found = torch.cat([function(batch) for batch in batches]).cpu()
        broadcast([found], args.device)  # a plan must not hang on the rounding of a process
        return found


def alike(counts: Mapping[str, int]) -> SourceWeights:
    """Fixed weights, with which each source has the same share of the loss."""
    return _fixed(of_equal_shares(torch.tensor([*counts.values()])), counts)


def _fixed(plan: Plan, counts: Mapping[str, int]) -> SourceWeights:
    """The weights of ``plan``, fixed."""
    weights = equal_weights(counts)
    weights.logits.data = plan.logits
    return weights


def _run(trainer: BilevelTrainer) -> None:
    """Train without the summary that a Trainer prints where it draws no bar."""
    with redirect_stdout(StringIO()):
        trainer.train()
