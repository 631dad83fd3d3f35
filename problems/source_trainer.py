"""`SourceTrainer`: an adapter on sources of data, each with a weight, over any Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
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
from hyperopt_peft.problems.data_sources import SOURCE, Mixture, SourceWeights, default_prior
from hyperopt_peft.problems.example_weights import COLUMNS, HeldOut, without
from hyperopt_peft.problems.source_collator import SourceCollator
from hyperopt_peft.problems.source_data import TRUSTED, require_sources
from hyperopt_peft.trainer import checks
from hyperopt_peft.trainer.data import collating, joined, with_more, without_more
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.trainer.upper_batches import loader_of
from hyperopt_peft.utils.random_state import RandomState, replay

#: Before the name of a source, among the evaluation data that the parent prepares.
PREFIX = "source "


class SourceTrainer(BilevelTrainer):
    """Trains an adapter on sources, each with a weight that trusted rows may teach.

    The lower level trains the adapter on the sources (`Mixture`), the upper level the weights on
    the trusted rows (`HeldOut`). The trusted rows are one more source of the lower level,
    ``trusted``, whose weight is learned as well. Without trusted rows the weights are those that
    ``weights`` makes, and stay.

    Each label has a source, and f is the mean over all labels: the loss of the parent where all
    weights are 1. The parent prepares each source alone, as it does its evaluation data, so that a
    packed row has tokens of one source.

    The default prior makes n·(F + prior), with F the mean loss of n trusted rows, a negative log
    posterior whose logits have the prior variance 8. A step needs about ten rows of each source:
    see ``gradient_accumulation_steps``.

    Args:
        model: as for `BilevelTrainer`.
        args: the settings.
        sources: data sets by name.
        trusted: the trusted rows, with the columns of the sources; None for one level alone.
        weights: makes the weights of the number of labels, or of rows, of each source.
        trainer: further arguments of the parent.

    Raises:
        ProblemError: the loss of the parent is no mean over labels; as `require_sources` and
            `BilevelTrainer`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hyperopt_peft import BilevelTrainingArguments
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = get_peft_model(BertForSequenceClassification(tiny), LoraConfig())
        >>> def rows(first):
        ...     ids = [[first + k] * 4 for k in range(6)]
        ...     return Dataset.from_dict({"input_ids": ids, "labels": [0, 1] * 3})
        >>> dots = {"hypergradient": "darts:product=dots"}
        >>> args = BilevelTrainingArguments("outputs", report_to="none", use_cpu=True, **dots)
        >>> data = {"sources": {"web": rows(1), "books": rows(10)}, "trusted": rows(20)}
        >>> SourceTrainer(model, args, **data).shares()
        {'web': 0.33..., 'books': 0.33..., 'trusted': 0.33...}
    """

    train_dataset: Any
    data_collator: Any
    #: The weights of the sources.
    weights: SourceWeights
    may_share_rows = True

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        sources: Mapping[str, Dataset],
        trusted: Dataset | None = None,
        weights: Callable[[Mapping[str, int]], SourceWeights] = SourceWeights,
        eval_dataset: Any = None,
        **trainer: Any,
    ) -> None:
        checks.check_class(args, self.Arguments)
        require_sources(sources, trusted)
        for name, value in (
            ("label_smoothing_factor", args.label_smoothing_factor),
            ("compute_loss_func", trainer.get("compute_loss_func")),
        ):
            if value:
                raise ProblemError(
                    f"{name}: not possible in SourceTrainer, whose levels have a loss of each row; "
                    "leave it out"
                )
        if getattr(args, "eval_packing", None) not in (None, getattr(args, "packing", None)):
            raise ProblemError(
                "eval_packing: the sources are prepared as evaluation data are; leave it out"
            )
        (self._first, rows), *others = sources.items()
        self._more = {f"{PREFIX}{name}": each for name, each in others}
        self._make_weights, self._evaluation = weights, eval_dataset
        args = copy(args)  # the caller's may be those of a trainer that removes unused columns
        super().__init__(
            model=model,
            lower=SourceTrainer._mixture,
            upper=None if trusted is None else SourceTrainer._held_out,
            args=args,
            train_dataset=rows,
            upper_dataset=trusted,
            eval_dataset=with_more(eval_dataset, self._more, args),
            **trainer,
        )

    def task_loss(self, batch: Any) -> Tensor:
        """As `BilevelTrainer.task_loss`, which does not read the sources."""
        return super().task_loss(without(batch, (SOURCE,)))

    def shares(self) -> dict[str, float]:
        """The share of each source, and of the trusted rows, in the training loss; sum 1."""
        return dict(zip(self.weights.names, self.weights.shares().tolist(), strict=True))

    def _held_out(self) -> Problem:
        prior = default_prior(len(self.weights.names), len(self.upper_dataset))
        # The argument, where there is one, becomes the level's prior afterwards.
        default = prior if self.args.upper_prior is None else None
        return HeldOut(self.model, self.weights, task_loss=self.task_loss, prior=default)

    def _mixture(self) -> Problem:
        """The lower level, of the data as the parent has prepared them."""
        names = self._take_parts()
        size = min(self.args.per_device_train_batch_size, len(self.train_dataset))
        with collating("sources"), replay(RandomState.capture()):
            batch = self.data_collator([self.train_dataset[row] for row in range(size)])
        batch = send_to_device(batch, self.args.device)
        if not isinstance(batch.get("labels"), Tensor):
            raise ProblemError(
                f"{type(self).__name__}: the batches have {sorted(batch)} and no labels, so that a "
                "source has no loss of its own; use a trainer whose loss is a mean over labels"
            )
        counts = dict(zip(names, self._counts(batch, len(names)).tolist(), strict=True))
        self.weights = self._make_weights(counts).to(self.args.device)
        self.weights.requires_grad_(self.upper_dataset is not None)
        lower = Mixture(self.model, self.weights)
        self._require_mean_over_labels(lower, batch)
        return lower

    def _take_parts(self) -> list[str]:
        """Make ``train_dataset`` of all sources, prepared, with their numbers; their names."""
        self.eval_dataset, more = without_more(self.eval_dataset, self._evaluation, self._more)
        more = {name.removeprefix(PREFIX): rows for name, rows in more.items()}
        parts = {self._first: self.train_dataset, **more}
        if self.upper_dataset is not None:
            parts[TRUSTED] = self.upper_dataset
        columns = self._columns_read()
        for number, (name, rows) in enumerate(parts.items()):
            rows = rows.select_columns([each for each in rows.column_names if each in columns])
            parts[name] = rows.add_column(SOURCE, [number] * len(rows), feature=Value("int64"))
        self.train_dataset = joined(**parts)
        if self.upper_dataset is not None:
            self.upper_dataset = parts[TRUSTED]
        checks.check_labels(self.model, self.train_dataset, {"data_collator": self.data_collator})
        self.data_collator = SourceCollator(self.data_collator)
        return list(parts)

    def _columns_read(self) -> list[str]:
        """The columns that the parent's loaders do not remove."""
        self.args.remove_unused_columns = True
        try:
            names: list[str] = loader_of(self, self.train_dataset, self._first).dataset.column_names
        finally:
            self.args.remove_unused_columns = False  # the lower level reads one that no model does
        return names

    def _counts(self, batch: Any, sources: int) -> Tensor:
        """The number of labels or rows of each source, ``(K,)``; ``batch`` is the first one."""
        rows = self.train_dataset
        if batch[SOURCE].dim() == 1:
            return torch.tensor(rows[SOURCE][:]).bincount(minlength=sources)
        shifted = self.is_fsdp_enabled  # whose parameters may not be here yet
        if not shifted:
            with self.compute_loss_context_manager():
                shifted = labels_are_shifted(self.model, without(batch, COLUMNS))
        loader: DataLoader[Any] = DataLoader(rows, 256, collate_fn=self.data_collator)
        counts = torch.zeros(sources, dtype=torch.int64)
        with collating("sources"), replay(RandomState.capture()):
            for each in loader:
                source, scored = each[SOURCE], each["labels"] != IGNORED
                scored[:, 0] &= not shifted
                counts += source[scored].bincount(minlength=sources)
        return counts

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
