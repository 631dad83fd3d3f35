"""`SourceTrainer`: an adapter on sources of data, each with a weight, over any Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset, Value
from torch import Tensor
from torch.utils.data import DataLoader

from hyperopt_peft.core.labels import TOLERANCE, labels_are_shifted
from hyperopt_peft.core.logits import IGNORED
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.data_sources import SOURCE, Mixture, SourceWeights
from hyperopt_peft.problems.example_weights import COLUMNS, without
from hyperopt_peft.problems.source_collator import SourceCollator
from hyperopt_peft.problems.source_data import TRUSTED
from hyperopt_peft.problems.votes import VOTES, voted
from hyperopt_peft.trainer import checks
from hyperopt_peft.trainer.data import collating, joined, with_more, without_more
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.trainer.upper_batches import loader_of
from hyperopt_peft.utils.random_state import RandomState, replay

#: Before the name of a source, among the evaluation data that the parent prepares.
PREFIX = "source "


class SourceTrainer(BilevelTrainer):
    """Trains an adapter on sources, each with a weight; with an upper level, a phase of a search.

    The parent prepares each source alone, as it does its evaluation data, so that a packed row has
    tokens of one source. The batches then have the source of each label: see `SourceCollator`.

    Args:
        model: as for `BilevelTrainer`.
        args: the settings.
        parts: the rows of sources by name, as the user has them; with an upper level the last ones
            are those of ``trusted``, its data.
        names: all sources, of which ``parts`` may lack some.
        weights: makes the weights of the sources' counts: of labels, or rows, or votes.
        upper: as for `BilevelTrainer`.
        trainer: further arguments of the parent.

    Raises:
        ProblemError: the loss of the parent is no mean over labels; as `BilevelTrainer`.
    """

    train_dataset: Any
    data_collator: Any
    #: The weights of the sources.
    weights: SourceWeights
    #: Whether each token that the model reads has a label, and so a source of its own.
    of_tokens = False
    #: Whether each row has one class.
    of_classes = False
    #: Whether a label is the next token.
    shifted = False

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        parts: Mapping[str, Dataset],
        names: tuple[str, ...],
        weights: Callable[[Mapping[str, int]], SourceWeights] = SourceWeights,
        upper: Any = None,
        eval_dataset: Any = None,
        **trainer: Any,
    ) -> None:
        if getattr(args, "eval_packing", None) not in (None, getattr(args, "packing", None)):
            raise ProblemError(
                "eval_packing: the sources are prepared as evaluation data are; leave it out"
            )
        (self._first, rows), *others = parts.items()
        more = dict(others)
        trusted = None if upper is None else more.pop(TRUSTED)
        self._more = {f"{PREFIX}{name}": each for name, each in more.items()}
        self._names, self._make_weights, self._evaluation = names, weights, eval_dataset
        super().__init__(
            model=model,
            lower=SourceTrainer._mixture,
            upper=upper,
            args=args,
            train_dataset=rows,
            upper_dataset=trusted,
            eval_dataset=with_more(eval_dataset, self._more, args),
            **trainer,
        )

    def task_loss(self, batch: Any) -> Tensor:
        """As `BilevelTrainer.task_loss`, which does not read the sources."""
        return super().task_loss(without(batch, (SOURCE, VOTES)))

    def _mixture(self) -> Problem:
        """The lower level, of the data as the parent has prepared them."""
        self._take_parts()
        size = min(self.args.per_device_train_batch_size, len(self.train_dataset))
        with collating("sources"), replay(RandomState.capture()):
            batch = self.data_collator([self.train_dataset[row] for row in range(size)])
        batch = send_to_device(batch, self.args.device)
        if not isinstance(batch.get("labels"), Tensor):
            raise ProblemError(
                f"{type(self).__name__}: the batches have {sorted(batch)} and no labels, so that a "
                "source has no loss of its own; use a trainer whose loss is a mean over labels"
            )
        config = getattr(self.model, "config", None)
        translates = getattr(config, "is_encoder_decoder", False)
        self.of_tokens = SOURCE in batch and batch[SOURCE].dim() > 1 and not translates
        labels = batch["labels"]
        self.of_classes = labels.dim() == 1 and not labels.is_floating_point()
        self.weights = self._make_weights(self._counts(batch)).to(self.args.device)
        lower = Mixture(self.model, self.weights)
        self._require_mean_over_labels(lower, batch)
        return lower

    def _take_parts(self) -> None:
        """Make ``train_dataset`` of the parts, prepared, with the numbers of their sources."""
        self.eval_dataset, more = without_more(self.eval_dataset, self._evaluation, self._more)
        more = {name.removeprefix(PREFIX): rows for name, rows in more.items()}
        parts = {self._first: self.train_dataset, **more}
        if self.upper_dataset is not None:
            parts[TRUSTED] = self.upper_dataset
        columns = self._columns_read()
        for name, rows in parts.items():
            rows = rows.select_columns([each for each in rows.column_names if each in columns])
            if VOTES not in columns:
                number = [self._names.index(name)] * len(rows)
                rows = rows.add_column(SOURCE, number, feature=Value("int64"))
            parts[name] = rows
        self.train_dataset = joined(**parts)
        if self.upper_dataset is not None:
            self.upper_dataset = parts[TRUSTED]
        checks.check_labels(self.model, self.train_dataset, {"data_collator": self.data_collator})
        self.data_collator = SourceCollator(self.data_collator)

    def _columns_read(self) -> list[str]:
        """The columns that the parent's loaders do not remove, and the votes."""
        self.args.remove_unused_columns = True
        try:
            names: list[str] = loader_of(self, self.train_dataset, self._first).dataset.column_names
        finally:
            self.args.remove_unused_columns = False
        return [*names, VOTES] if VOTES in self.train_dataset.column_names else names

    def _counts(self, batch: Any) -> dict[str, int]:
        """The number of labels, rows or votes of each source; ``batch`` is the first one."""
        rows, size = self.train_dataset, len(self._names)
        if VOTES in batch:
            counts = voted(torch.tensor(rows[VOTES][:])).sum(0)
        elif batch[SOURCE].dim() == 1:
            counts = torch.tensor(rows[SOURCE][:]).bincount(minlength=size)
        else:
            self.shifted = self.is_fsdp_enabled  # whose parameters may not be here yet
            if not self.shifted:
                with self.compute_loss_context_manager():
                    self.shifted = labels_are_shifted(self.model, without(batch, COLUMNS))
            loader: DataLoader[Any] = DataLoader(rows, 256, collate_fn=self.data_collator)
            counts = torch.zeros(size, dtype=torch.int64)
            with collating("sources"), replay(RandomState.capture()):
                for each in loader:
                    source, scored = each[SOURCE], each["labels"] != IGNORED
                    scored[:, 0] &= not self.shifted
                    counts += source[scored].bincount(minlength=size)
        return dict(zip(self._names, counts.tolist(), strict=True))

    @torch.no_grad()
    def _require_mean_over_labels(self, lower: Mixture, batch: Any) -> None:
        """Raise ProblemError where the trainer has a loss of its own that is no such mean."""
        # Under FSDP2 the parameters may not be here yet.
        if not self.has_own_loss() or self.is_fsdp_enabled:
            return
        training = self.model.training
        self.model.eval()
        with replay(RandomState.capture()), self._measuring():
            mean = float(lower.weighted(lower.losses(batch), batch)["task_loss"])
            loss = float(self.task_loss(batch))
        self.model.train(training)
        if abs(loss - mean) > TOLERANCE * abs(mean):
            raise ProblemError(
                f"{type(self).__name__}: the loss of the first batch is {loss:.4g}, and the mean "
                f"over its labels {mean:.4g}, so that a source has no loss of its own; use a "
                "trainer, or settings, whose loss is that mean"
            )


def equal_weights(counts: Mapping[str, int]) -> SourceWeights:
    """Fixed weights of 1, also of sources that are left out."""
    weights = SourceWeights({name: max(1, count) for name, count in counts.items()})
    return weights.requires_grad_(False)
