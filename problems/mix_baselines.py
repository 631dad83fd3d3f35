"""The simple methods to train on sources and trusted rows, beside that of learned weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from copy import copy
from functools import partial
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.common import trainable
from hyperopt_peft.problems.data_sources import NO_VOTE, SOURCE, VOTES, SourceWeights
from hyperopt_peft.problems.example_weights import COLUMNS, example_losses, without
from hyperopt_peft.problems.head_mix import Plan
from hyperopt_peft.problems.mix_plans import (
    AGREEMENT,
    AGREES,
    EQUAL,
    FILTERED,
    LEARNED,
    LEARNED_THEN,
    SOURCES_ALIKE,
    THEN_TRUSTED,
    TRUSTED_ONLY,
    of_equal_shares,
)
from hyperopt_peft.problems.mix_trainer import MixTrainer
from hyperopt_peft.problems.source_data import TRUSTED, SourceData
from hyperopt_peft.problems.source_trainer import equal_weights
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils.restore import assign_

#: The methods without a search.
SIMPLE = (TRUSTED_ONLY, EQUAL, SOURCES_ALIKE, THEN_TRUSTED, AGREEMENT, FILTERED)


class Baselines:
    """Trains the model of a `MixTrainer` by each method; a ``with`` block leaves it as it was.

    Nothing is written or printed, and the user's callbacks are not called.

    Attributes:
        steps: the optimizer steps of the trainer's retraining.
        passes_of_a_step: micro-batches in one of these steps.
        passes: the passes over a micro-batch of the trainer's search and retraining.
        row_weights: the weights of a row that the last training of `LEARNED` found, by source; at
            first the trainer's own.
    """

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
        self._last: tuple[SourceData, Tensor] | None = None  # data, and their agreement

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

    def passes_of(self, method: str, steps: int) -> int:
        """The passes of `train`."""
        if method == LEARNED:
            return self.passes
        # A model of the trusted rows comes first.
        first = self.steps if method in (AGREEMENT, FILTERED) else 0
        return (first + steps) * self.passes_of_a_step

    def train(self, method: str, steps: int, data: SourceData) -> int:
        """Train the model by ``method`` for ``steps`` from its initial values; returns the passes.

        Learned weights have the steps of the trainer; `LEARNED_THEN` takes those of the last
        training of `LEARNED`. `AGREEMENT` and `FILTERED` begin with a model of the trusted rows,
        which ``steps`` does not count and the passes do.
        """
        trusted = {TRUSTED: data.parts[TRUSTED]}
        if method == LEARNED:
            self.restart()
            args, kind = self._silenced(copy(self.trainer.args)), type(self.trainer)
            made = self.trainer.trainer_of(kind, args, sources=data, **self._options)
            _run(made)
            self.row_weights = made.row_weights()
        elif method == TRUSTED_ONLY:
            self._fit(trusted, steps)
        elif method == EQUAL:
            self._fit(data.parts, steps)
        elif method == SOURCES_ALIKE:
            self._fit(data.parts, steps, alike)
        elif method in (THEN_TRUSTED, LEARNED_THEN):
            first = equal_weights if method == THEN_TRUSTED else self._learned
            self._fit(data.parts, steps - steps // 2, first)
            self._fit(trusted, steps // 2, restart=False)
        else:
            agreement = self._agreement(data)
            if method == FILTERED:
                self._fit(_agreeing(data, agreement).parts, steps)
            else:
                self._fit(data.parts, steps, partial(_fixed, Plan(_shares(data, agreement))))
        return self.passes_of(method, steps)

    def losses(self, rows: Dataset) -> Tensor:
        """The loss of each of ``rows``, trusted ones, ``(n,)``, without dropout."""
        return self._of_rows({TRUSTED: rows}, partial(example_losses, self.model))

    def _learned(self, counts: Mapping[str, int]) -> SourceWeights:
        """The weights of `row_weights`."""
        weights = torch.tensor([self.row_weights[name] for name in counts])
        return _fixed(Plan(weights / weights.max()), counts)

    def _agreement(self, data: SourceData) -> Tensor:
        """How far a model of the trusted rows agrees with each row of the sources, from 0 to 1.

        The shape is ``(n,)``, or ``(n, K)`` of votes. Of a class the agreement is 0 or 1, and NaN
        without a vote; of other labels exp(−loss).
        """
        if self._last is None or self._last[0] is not data:
            self._fit({TRUSTED: data.parts[TRUSTED]}, self.steps)
            sources = {name: rows for name, rows in data.parts.items() if name != TRUSTED}
            self._last = data, self._of_rows(sources, self._agreement_of)
        return self._last[1]

    def _agreement_of(self, batch: Any) -> Tensor:
        labels: Tensor = batch.get("labels")
        if VOTES not in batch and (labels.dim() > 1 or labels.is_floating_point()):
            return (-example_losses(self.model, batch)).exp()
        predicted: Tensor = self.model(**without(batch, ("labels", *COLUMNS))).logits.argmax(-1)
        if VOTES not in batch:
            return (predicted == labels).float()
        votes: Tensor = batch[VOTES]
        return (predicted[:, None] == votes).float().masked_fill(votes == NO_VOTE, torch.nan)

    def _fit(
        self,
        parts: Mapping[str, Dataset],
        steps: int,
        weights: Callable[[Mapping[str, int]], SourceWeights] = equal_weights,
        *,
        restart: bool = True,
    ) -> None:
        """Train on ``parts`` for ``steps``, by fixed weights; from the initial values if wanted."""
        if restart:
            self.restart()
        args = self._silenced(self.trainer.args.for_retraining())
        args.max_steps = max(1, steps)
        _run(self.trainer.of_parts(parts, args, weights, **self._options))

    def _silenced(self, args: Any) -> Any:
        """``args`` that write nothing."""
        args.output_dir, args.report_to, args.save_strategy = self._folder.name, [], "no"
        args.eval_strategy = args.logging_strategy = "no"
        args.disable_tqdm, args.load_best_model_at_end = True, False
        return args

    @torch.no_grad()
    def _of_rows(self, parts: Mapping[str, Dataset], function: Callable[[Any], Tensor]) -> Tensor:
        """``function`` of batches of all rows in ``parts``, as the parent prepares single rows."""
        args = self._silenced(copy(self.trainer.args))
        for packs in ("packing", "padding_free", "eval_packing", "shuffle_dataset"):
            if getattr(args, packs, None):
                setattr(args, packs, False)
        made = self.trainer.of_parts(parts, args, **self._options)
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
            return torch.cat([function(batch) for batch in batches]).cpu()


def alike(counts: Mapping[str, int]) -> SourceWeights:
    """Fixed weights, with which each source has the same share of the loss."""
    return _fixed(of_equal_shares(torch.tensor([*counts.values()])), counts)


def _fixed(plan: Plan, counts: Mapping[str, int]) -> SourceWeights:
    """The weights of ``plan``, fixed."""
    weights = equal_weights(counts)
    weights.logits.data = plan.logits
    return weights


def _shares(data: SourceData, agreement: Tensor) -> Tensor:
    """The mean agreement of each source, ``(K + 1,)``; that of the trusted rows is 1."""
    if agreement.dim() == 2:  # of votes
        sums, votes = agreement.nansum(0), (~agreement.isnan()).sum(0)
    else:
        source, size = torch.tensor(data.sources[SOURCE][:]), len(data.names)
        sums, votes = source.bincount(agreement, size), source.bincount(minlength=size)
    share = (sums + 1) / (votes + 2)
    share[-1] = 1
    return share


def _run(trainer: BilevelTrainer) -> None:
    """Train without the summary that a Trainer prints where it draws no bar."""
    with redirect_stdout(StringIO()):
        trainer.train()


def _agreeing(data: SourceData, agreement: Tensor) -> SourceData:
    """``data`` without rows, or votes, that disagree; of other labels without the worse half."""
    if agreement.dim() == 2:
        keep = agreement >= AGREES
    else:
        classes = bool(((agreement == 0) | (agreement == 1)).all())
        keep = agreement >= (AGREES if classes else agreement.median())
    if not keep.any():
        raise ProblemError(
            "compare_baselines: no row of a source agrees with the model of the trusted rows"
        )
    if keep.dim() == 1:
        return data.with_sources(keep.nonzero().flatten().tolist())
    return data.with_votes(np.where(keep.numpy(), np.array(data.sources[VOTES][:]), NO_VOTE))
