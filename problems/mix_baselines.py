"""The simple methods to train on sources and trusted rows, beside that of learned weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import redirect_stdout
from copy import copy
from dataclasses import replace
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
from hyperopt_peft.problems.data_sources import NO_VOTE, SOURCE, VOTES, Mixture, SourceWeights
from hyperopt_peft.problems.example_weights import COLUMNS, example_losses, without
from hyperopt_peft.problems.mix_trainer import MixTrainer
from hyperopt_peft.problems.source_data import SourceData
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils.restore import assign_

TRUSTED_ONLY = "trusted rows only"
EQUAL = "everything, equal weights"
SOURCES_FIRST = "the sources, then the trusted rows"
AGREEMENT = "weights by agreement with the trusted rows"
FILTERED = "everything but rows that disagree"
LEARNED = "learned weights"
#: The methods without a search.
SIMPLE = (TRUSTED_ONLY, EQUAL, SOURCES_FIRST, AGREEMENT, FILTERED)
#: The agreement with the trusted model from which a row is kept.
AGREES = 0.5


class Baselines:
    """Trains the model of a `MixTrainer` by each method; a ``with`` block leaves it as it was.

    Nothing is written or printed, and the user's callbacks are not called.

    Attributes:
        steps: the optimizer steps of the trainer's retraining.
        passes_of_a_step: micro-batches in one of these steps.
        passes: the passes over a micro-batch of the trainer's search and retraining.
    """

    def __init__(self, trainer: MixTrainer) -> None:
        self.trainer, self.model = trainer, trainer.model
        self.variables = [parameter for _, parameter in trainable(self.model)]
        args = trainer.args.for_retraining()
        self.passes_of_a_step: int = args.gradient_accumulation_steps
        self.steps = args.steps_of(len(trainer.data.everything))
        self.passes = trainer.search_passes()
        if trainer.args.retrain != "none":
            self.passes += self.steps * self.passes_of_a_step
        self._options = {**trainer.options, "callbacks": None}
        self._last: tuple[SourceData, Tensor] | None = None  # data, and their agreement

    def __enter__(self) -> Baselines:
        self._end = [variable.detach().clone() for variable in self.variables]
        self._folder = TemporaryDirectory(prefix="mix-")
        return self

    def __exit__(self, *exception: Any) -> None:
        self._folder.cleanup()
        assign_(self.variables, self._end)

    def train(self, method: str, steps: int, data: SourceData) -> int:
        """Train the model by ``method`` for ``steps`` from its initial values; returns the passes.

        Learned weights have the steps of the trainer. Those of `AGREEMENT` and `FILTERED` begin
        with a model of the trusted rows, which ``steps`` does not count and the passes do.
        """
        if method == LEARNED:
            assign_(self.variables, self.trainer.initial)
            args = self._silenced(copy(self.trainer.args))
            _run(MixTrainer(self.model, args, sources=data, **self._options))
            return self.passes
        passes, equal = steps * self.passes_of_a_step, self._weights(data)
        if method == TRUSTED_ONLY:
            self._fit(data.trusted, steps, equal)
        elif method == EQUAL:
            self._fit(data.everything, steps, equal)
        elif method == SOURCES_FIRST:
            self._fit(data.sources, steps - steps // 2, equal)
            self._fit(data.trusted, steps // 2, equal, restart=False)
        else:
            agreement = self._agreement(data)
            passes += self.steps * self.passes_of_a_step
            rows = _agreeing(data, agreement) if method == FILTERED else data
            weights = self._weights(rows, agreement if method == AGREEMENT else None)
            self._fit(rows.everything, steps, weights)
        return passes

    @torch.no_grad()
    def losses(self, rows: Dataset) -> Tensor:
        """The loss of each of ``rows``, ``(n,)``, without dropout."""
        losses = [example_losses(self.model, batch) for batch in self._batches(rows)]
        return torch.cat(losses).cpu()

    def _agreement(self, data: SourceData) -> Tensor:
        """How far a model of the trusted rows agrees with each row of the sources, from 0 to 1.

        The shape is ``(n,)``, or ``(n, K)`` of votes. Of a class the agreement is 0 or 1, and NaN
        without a vote; of other labels exp(−loss).
        """
        if self._last is None or self._last[0] is not data:
            self._fit(data.trusted, self.steps, self._weights(data))
            with torch.no_grad():
                each = [self._agreement_of(batch) for batch in self._batches(data.sources)]
            self._last = data, torch.cat(each).cpu()
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

    def _weights(self, data: SourceData, agreement: Tensor | None = None) -> SourceWeights:
        """Equal weights, or a = the mean agreement of each source, and of the trusted rows 1."""
        counts = {name: max(1, count) for name, count in data.counts.items()}
        weights = SourceWeights(counts)
        if agreement is not None:
            if agreement.dim() == 2:  # of votes
                sums, votes = agreement.nansum(0), (~agreement.isnan()).sum(0)
            else:
                source, size = torch.tensor(data.sources[SOURCE][:]), len(data.names)
                sums, votes = source.bincount(agreement, size), source.bincount(minlength=size)
            share = ((sums + 1) / (votes + 2)).clamp(1e-3, 1 - 1e-3)
            share[-1] = 1 - 1e-3
            weights.logits.data = share.logit()
        return weights.requires_grad_(False).to(self.trainer.args.device)

    def _fit(
        self, rows: Dataset, steps: int, weights: SourceWeights, *, restart: bool = True
    ) -> None:
        """Train on ``rows`` for ``steps``; from the initial values if ``restart``."""
        if restart:
            assign_(self.variables, self.trainer.initial)
        args = self._silenced(self.trainer.args.for_retraining())
        args.max_steps = max(1, steps)
        options = {**self._options, "args": args, "train_dataset": rows, "upper": None}
        options["lower"] = lambda made: Mixture(made.model, weights)
        _run(BilevelTrainer(self.model, **options))

    def _silenced(self, args: Any) -> Any:
        """``args`` that write nothing."""
        args.output_dir, args.report_to, args.save_strategy = self._folder.name, [], "no"
        args.eval_strategy = args.logging_strategy = "no"
        args.disable_tqdm, args.load_best_model_at_end = True, False
        return args

    def _batches(self, rows: Dataset) -> Iterator[Any]:
        self.model.eval()
        args, collate = self.trainer.args, self.trainer.data_collator
        loader: Any = DataLoader(
            rows, batch_size=args.per_device_eval_batch_size, collate_fn=collate
        )
        for batch in loader:
            yield send_to_device(dict(batch), args.device)


def _run(trainer: BilevelTrainer) -> None:
    """Train without the summary that a Trainer prints where it draws no bar."""
    with redirect_stdout(StringIO()):
        trainer.train()


def _agreeing(data: SourceData, agreement: Tensor) -> SourceData:
    """``data`` without rows, or votes, that disagree; of other labels without the worse half."""
    rows = data.sources
    if agreement.dim() == 2:
        votes = np.array(rows[VOTES][:])
        votes[~(agreement >= AGREES).numpy()] = NO_VOTE
        rows = rows.remove_columns(VOTES).add_column(VOTES, votes.tolist())
        keep = torch.from_numpy((votes != NO_VOTE).any(1))
    elif bool(((agreement == 0) | (agreement == 1)).all()):
        keep = agreement >= AGREES
    else:
        keep = agreement >= agreement.median()
    if not keep.any():
        raise ProblemError(
            "compare_baselines: no row of a source agrees with the model of the trusted rows"
        )
    return replace(data, sources=rows.select(keep.nonzero().flatten().tolist()))
