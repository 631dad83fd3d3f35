"""Is a learnt mix worth it? Its cross-validated trusted loss beside those of simple baselines."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.common import Adapter, trainable
from hyperopt_peft.problems.data_sources import NO_VOTE, SOURCE, VOTES, Mixture, SourceWeights
from hyperopt_peft.problems.example_weights import COLUMNS, example_losses, without
from hyperopt_peft.problems.mix_trainer import MixTrainer
from hyperopt_peft.problems.source_data import SourceData
from hyperopt_peft.trainer.data import classes_of, label_column
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils.restore import assign_

LEARNT = "learnt weights"
#: The agreement with the trusted model from which a row is kept.
AGREES = 0.5


@dataclass(frozen=True)
class Entry:
    """One way to train, by the losses of trusted rows that it did not see.

    Attributes:
        method: what was trained.
        losses: the loss of each trusted row, by the model of the folds without it, ``(n,)``.
        passes: forward+backward passes over a micro-batch, of one fold.
    """

    method: str
    losses: Tensor
    passes: int

    @property
    def loss(self) -> float:
        """The cross-validated trusted loss."""
        return float(self.losses.mean())

    def behind(self, other: Entry) -> tuple[float, float]:
        """The mean difference of the rows' losses to ``other``, and its standard error."""
        gap = self.losses - other.losses
        return float(gap.mean()), float(gap.std() / math.sqrt(len(gap)))


@dataclass(frozen=True)
class Verdict:
    """The table, and which way to use: that of the lowest cross-validated trusted loss.

    Example:
        >>> one = Entry("trusted rows only", torch.tensor([0.5, 0.7, 0.6]), passes=10)
        >>> two = Entry("learnt weights", torch.tensor([0.1, 0.3, 0.1]), passes=90)
        >>> Verdict([one, two]).use.method
        'learnt weights'
    """

    entries: Sequence[Entry]

    @property
    def best(self) -> Entry:
        """The entry of the lowest trusted loss."""
        return min(self.entries, key=lambda entry: entry.loss)

    @property
    def use(self) -> Entry:
        """The best. The cheapest within its standard error was further from it on test rows."""
        return self.best

    @property
    def cheapest(self) -> Entry:
        """The cheapest entry whose mean difference to the best is within its standard error."""
        near = [each for each in self.entries if each is self.best or _within(each, self.best)]
        return min(near, key=lambda entry: entry.passes)

    @property
    def sentence(self) -> str:
        """What to use, and what costs less at nearly the same loss."""
        cheap = self.cheapest
        words = f"use {self.use.method}: the lowest trusted loss, {self.use.loss:.4f}"
        if cheap.passes >= self.best.passes:
            return words
        gap, error = cheap.behind(self.best)
        return (
            f"{words}; {cheap.method} is {gap:.4f} ± {error:.4f} above it, at "
            f"{cheap.passes / self.best.passes:.0%} of the passes"
        )

    def __str__(self) -> str:
        lines = [f"{'training':44}{'trusted loss':>14}{'to the best':>22}{'passes':>9}"]
        for entry in sorted(self.entries, key=lambda each: each.loss):
            gap, error = entry.behind(self.best)
            behind = "" if entry is self.best else f"{gap:+.4f} ± {error:.4f}"
            lines.append(f"{entry.method:44}{entry.loss:14.4f}{behind:>22}{entry.passes:9}")
        return "\n".join([*lines, self.sentence])


def _within(entry: Entry, best: Entry) -> bool:
    gap, error = entry.behind(best)
    return gap <= error


def verdict(trainer: MixTrainer, *, folds: int = 3, equal_passes: bool = True) -> Verdict:
    """Train in all ways on all but a fold of the trusted rows, and judge on the fold.

    The ways are: the trusted rows only; everything with equal weights; the sources, then the
    trusted rows; everything with each source weighed by its agreement with the model of the trusted
    rows; everything but the rows that disagree with it; and the learnt weights. A way without a
    search takes the steps of the retraining, and with ``equal_passes`` also as many passes as
    search and retraining together; the better counts. ``trainer``'s model is left as it was.

    The learnt way costs ``folds`` times what ``trainer`` does, and with ``equal_passes`` each of
    the others as much; without, a few trainings each.

    Raises:
        ProblemError: ``trainer`` has not trained; fewer than 2 folds, or more than trusted rows.
    """
    # A run that was resumed in the retraining has no step of the search.
    if not trainer.state.global_step and trainer.retrainer is None:
        raise ProblemError("verdict: the trainer has not trained; call train first")
    contest, data = _Contest(trainer), trainer.data
    classes = classes_of(data.trusted, label_column(data.trusted))
    of_row = split_folds(classes, folds, seed=trainer.args.seed)
    lengths = {contest.steps}
    if equal_passes:
        lengths.add(math.ceil(contest.passes / contest.a_step))
    losses: dict[tuple[str, int], Tensor] = {}
    with contest:
        for fold in range(folds):
            below = data.with_trusted(np.flatnonzero(of_row != fold).tolist())
            rows = np.flatnonzero(of_row == fold)
            held_out = data.trusted.select(rows)
            for method, passes in contest.trained(below, sorted(lengths)):
                found = losses.setdefault((method, passes), torch.zeros(len(of_row)))
                found[rows] = contest.losses(held_out)
    entries = [Entry(method, values, passes) for (method, passes), values in losses.items()]
    names = dict.fromkeys(entry.method for entry in entries)
    return Verdict(
        [min((e for e in entries if e.method == name), key=lambda e: e.loss) for name in names]
    )


def split_folds(classes: Sequence[Any], folds: int, *, seed: int = 0) -> np.ndarray[Any, Any]:
    """The fold of each row, from 0 and below ``folds``, shuffled by ``seed``.

    Args:
        classes: the class of each row, by which the folds are stratified, unless every class has
            fewer rows than there are folds.
        folds: the number of folds.
        seed: the seed of the permutation.

    Raises:
        ProblemError: ``folds`` is not from 2 to the number of rows.

    Example:
        >>> folds = split_folds(["a", "b"] * 3, 3)
        >>> sorted(folds[::2].tolist()), sorted(folds[1::2].tolist())
        ([0, 1, 2], [0, 1, 2])
    """
    if not 2 <= folds <= len(classes):
        raise ProblemError(
            f"folds: {folds} folds of {len(classes)} rows are not possible; choose from 2 to "
            f"{len(classes)}"
        )
    from sklearn.model_selection import KFold, StratifiedKFold  # a second to import

    kind = StratifiedKFold if max(Counter(classes).values()) >= folds else KFold
    of_row, names = np.zeros(len(classes), dtype=int), list(map(repr, classes))  # of any type
    with warnings.catch_warnings(action="ignore"):  # some class has fewer rows than folds
        for k, (_, rows) in enumerate(
            kind(folds, shuffle=True, random_state=seed).split(of_row, names)
        ):
            of_row[rows] = k
    return of_row


class _Contest:
    """Trains the model of a `MixTrainer` in all ways; afterwards the model is as before."""

    def __init__(self, trainer: MixTrainer) -> None:
        self.trainer, self.model = trainer, trainer.model
        self.variables = [parameter for _, parameter in trainable(self.model)]
        args = trainer.args.for_retraining()
        #: The passes of a step and the steps of the retraining; the passes with the search.
        self.a_step: int = args.gradient_accumulation_steps
        self.steps = args.steps_of(len(trainer.data.everything))
        again = 0 if trainer.args.retrain == "none" else self.steps * self.a_step
        self.passes = again + trainer.search_passes()
        #: Callbacks belong to the user's run.
        self.options = {**trainer.options, "callbacks": None}

    def __enter__(self) -> None:
        self._end = [variable.detach().clone() for variable in self.variables]
        self._folder = TemporaryDirectory(prefix="mix-")

    def __exit__(self, *exception: Any) -> None:
        self._folder.cleanup()
        assign_(self.variables, self._end)

    def trained(self, data: SourceData, lengths: Sequence[int]) -> Iterator[tuple[str, int]]:
        """The model after each way of ``lengths`` steps, with its name and passes."""
        equal = self._weights(data)
        for steps in lengths:
            passes = steps * self.a_step
            self._train(data.trusted, steps)
            yield "trusted rows only", passes
            if steps == lengths[0]:
                agreement = self._agreement(data.below)
            self._train(data.everything, steps, equal)
            yield "everything, equal weights", passes
            half = steps // 2
            self._train(data.below, steps - half, equal)
            self._train(data.trusted, half, again=False)
            yield "the sources, then the trusted rows", passes
            self._train(data.everything, steps, self._weights(data, agreement))
            yield "weights by agreement with the trusted rows", passes
            kept = _filtered(data, agreement)
            self._train(kept.everything, steps, self._weights(data))
            yield "everything but rows that disagree", passes
        self._restart()
        args = self._arguments(copy(self.trainer.args))
        if self.trainer.default_prior:  # of as many trusted rows as the fold leaves
            args.upper_prior = None
        _silent(_SilentMixTrainer(self.model, args, sources=data, **self.options)).train()
        yield LEARNT, self.passes

    @torch.no_grad()
    def losses(self, rows: Dataset) -> Tensor:
        """The loss of each of ``rows``, ``(n,)``, without dropout."""
        found = [example_losses(self.model, batch) for batch in self._batches(rows)]
        return torch.cat(found).cpu()

    @torch.no_grad()
    def _agreement(self, rows: Dataset) -> Tensor:
        """How far the model agrees with each row, or vote, ``(n,)`` or ``(n, K)``, from 0 to 1.

        Of a class the agreement is 0 or 1, and NaN without a vote; of other labels exp(−loss).
        """
        found = []
        for batch in self._batches(rows):
            logits = self.model(**without(batch, ("labels", *COLUMNS))).logits
            labels = batch.get("labels")
            if VOTES in batch:
                votes = batch[VOTES]
                right = (logits.argmax(-1)[:, None] == votes).float()
                found.append(right.masked_fill(votes == NO_VOTE, torch.nan))
            elif logits.dim() == 2 and not labels.is_floating_point():
                found.append((logits.argmax(-1) == labels).float())
            else:
                found.append((-example_losses(self.model, batch)).exp())
        return torch.cat(found).cpu()

    def _weights(self, data: SourceData, agreement: Tensor | None = None) -> SourceWeights:
        """Equal weights, or a = the mean agreement of each source, and of the trusted rows 1."""
        args = self.trainer.args
        counts = {name: max(1, count) for name, count in data.counts.items()}
        weights = SourceWeights(counts, kind="sigmoid", average=args.source_average)
        if agreement is not None:
            sums, votes = _by_source(data.below, agreement, len(data.names))
            share = ((sums + 1) / (votes + 2)).clamp(1e-3, 1 - 1e-3)
            share[-1] = 1 - 1e-3
            weights.logits.data = share.logit()
        return weights.requires_grad_(False).to(args.device)

    def _train(
        self,
        rows: Dataset,
        steps: int,
        weights: SourceWeights | None = None,
        *,
        again: bool = True,
    ) -> None:
        """Train on ``rows`` for ``steps``; from the initial values if ``again``."""
        if again:
            self._restart()
        args = self._arguments(self.trainer.args.for_retraining())
        args.max_steps = max(1, steps)
        if weights is None:
            rows = rows.remove_columns([n for n in (SOURCE, VOTES) if n in rows.column_names])

        def level(trainer: BilevelTrainer) -> Adapter:
            if weights is None:
                return Adapter(trainer.model, task_loss=trainer.task_loss)
            return Mixture(trainer.model, weights)

        options = {**self.options, "args": args, "train_dataset": rows}
        _silent(BilevelTrainer(self.model, lower=level, upper=None, **options)).train()

    def _restart(self) -> None:
        assign_(self.variables, self.trainer.initial)

    def _arguments(self, args: Any) -> Any:
        """``args`` that write nothing."""
        args.output_dir, args.report_to, args.save_strategy = self._folder.name, [], "no"
        args.eval_strategy = args.logging_strategy = "no"
        args.disable_tqdm, args.load_best_model_at_end = True, False
        return args

    def _batches(self, rows: Dataset) -> Iterator[Any]:
        self.model.eval()
        size = self.trainer.args.per_device_eval_batch_size
        loader: Any = DataLoader(
            rows,
            batch_size=size,
            collate_fn=self.trainer.data_collator,
        )
        for batch in loader:
            yield send_to_device(dict(batch), self.trainer.args.device)


class _SilentMixTrainer(MixTrainer):
    def retraining(self, args: Any) -> BilevelTrainer:
        return _silent(super().retraining(args))


def _silent(trainer: BilevelTrainer) -> BilevelTrainer:
    """The trainer without the summary that it prints where it draws no bar."""
    trainer.remove_callback(PrinterCallback)
    return trainer


def _by_source(rows: Dataset, agreement: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each source, the sum of the agreement of its rows or votes, and their number."""
    if agreement.dim() == 2:
        return agreement.nansum(0), (~agreement.isnan()).sum(0)
    source = torch.tensor(rows[SOURCE][:])
    sums = torch.zeros(count).index_add_(0, source, agreement)
    return sums, source.bincount(minlength=count)


def _filtered(data: SourceData, agreement: Tensor) -> SourceData:
    """``data`` without rows, or votes, that disagree; of other labels without the worse half."""
    if agreement.dim() == 2:
        votes = np.array(data.below[VOTES][:])
        votes[~(agreement >= AGREES).numpy()] = NO_VOTE
        below = data.below.remove_columns(VOTES).add_column(VOTES, votes.tolist())
        return SourceData(data.names, below, data.trusted).with_below(
            np.flatnonzero((votes != NO_VOTE).any(1)).tolist()
        )
    whole = bool(((agreement == 0) | (agreement == 1)).all())
    limit = AGREES if whole else float(agreement.median())
    kept = (agreement >= limit).nonzero().flatten().tolist()
    if not kept:
        raise ProblemError("verdict: no row of a source agrees with the model of the trusted rows")
    return data.with_below(kept)
