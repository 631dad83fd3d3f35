"""Tags: columns of rows that a level reads from its batch; collator and model do not see them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import RemoveColumnsCollator

from hyperopt_peft.core.labels import labels_are_shifted, require_labels, scored_labels
from hyperopt_peft.core.logits import IGNORED
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.upper_batches import loader_of
from hyperopt_peft.utils.random_state import RandomState, replay

#: The tag that needs no column: a row's number in the user's data; upper rows come last.
INDEX = "index"


def numbered(*tables: Any) -> tuple[Any, ...]:
    """The ``tables`` (None stays None) with a column `INDEX`, which numbers the rows of all."""
    begin = 0
    tagged: list[Any] = []
    for rows in tables:
        if rows is None:
            tagged.append(None)
            continue
        if not isinstance(rows, Dataset):
            raise ProblemError(
                f"{INDEX}: rows must be a datasets.Dataset, got a {type(rows).__name__}"
            )
        if INDEX in rows.column_names:
            raise ProblemError(f"{INDEX}: this name is reserved for row numbers; rename the column")
        tagged.append(rows.add_column(INDEX, list(range(begin, begin + len(rows)))))
        begin += len(rows)
    return tuple(tagged)


@dataclass
class InOrder:
    """Calls ``collate``; ProblemError if it sorts its rows, such as by length or label.

    The first five batches, and those with another column of different lengths, are collated in two
    orders. Rows that ``collate`` joins are not tested.
    """

    collate: Callable[[Sequence[Any]], Any]
    tested: set[str] = field(default_factory=set)
    batches: int = 5

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """The batch of ``rows``."""
        sizes = [_sizes(row) for row in rows]
        names = {n for n, size in sizes[0].items() if any(x.get(n) != size for x in sizes)}
        if self.batches or not names <= self.tested:
            self.tested.update(names)
            self.batches = max(0, self.batches - 1)
            # Equal rows once: a random mask would look like another order of them.
            some = [*{pickle.dumps(row): row for row in rows}.values()]
            state = RandomState.capture()
            one, other = (self._of_rows(x, state) for x in (some, [*some[1:], some[0]]))
            if other != [*one[1:], one[0]] and sorted(other) == sorted(one):
                raise ProblemError(
                    "data_collator: returns its rows in another order, so that their numbers would "
                    "be beside other rows; let it keep the order"
                )
        return self.collate(rows)

    def _of_rows(self, rows: Sequence[Any], state: RandomState) -> list[bytes]:
        with replay(state):
            batch = self.collate(deepcopy(rows))  # which it may change
        entries = [x.detach().cpu().double() for x in batch.values() if isinstance(x, Tensor)]
        found = [x.numpy() for x in entries if x.shape[:1] == (len(rows),)]
        return [b"".join(x[k].tobytes() for x in found) for k in range(len(rows))]


def _sizes(row: Mapping[str, Any]) -> dict[str, Any]:
    """The shape or length of each entry of ``row``; of a mask, which tokens it shows."""
    sizes = {n: getattr(x, "shape", isinstance(x, list | str) and len(x)) for n, x in row.items()}
    mask: Any = row.get("attention_mask")
    return {**sizes, "attention_mask": str(mask.tolist() if hasattr(mask, "tolist") else mask)}


@dataclass(frozen=True)
class TagCollator:
    """Calls ``collate`` on rows without ``tags``, then adds the tags to the batch.

    A tag has one number for each row, ``(n,)``. If ``collate`` joins the rows, or packed rows have
    a list with a number for each token, it has one for each label, in the shape of ``labels``. Rows
    may lack a tag, such as those of an upper level that does not read it. Whole numbers are exact;
    others have torch's default precision, as the labels of a model.
    """

    collate: Callable[[Sequence[Any]], Any]
    tags: Sequence[str]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """The batch of ``rows``."""
        tags = [tag for tag in self.tags if tag in rows[0]]
        batch = self.collate([without(row, self.tags) for row in rows])
        return {**batch, **{tag: _values(tag, rows, batch) for tag in tags}}


def _values(tag: str, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> Tensor:
    values, labels = [row[tag] for row in rows], batch.get("labels")
    of_tokens = isinstance(values[0], list)
    if not of_tokens and (not isinstance(labels, Tensor) or len(labels) == len(rows)):
        return torch.tensor(values)
    if not of_tokens:
        values = [[row[tag]] * len(row.get("input_ids", ())) for row in rows]
    if isinstance(labels, Tensor) and len(labels) == 1:
        values = [[x for each in values for x in each]]
    shape = tuple(labels.shape) if isinstance(labels, Tensor) else ()
    if len(shape) != 2 or len(values) != shape[0] or any(len(v) > shape[1] for v in values):
        raise ProblemError(
            f"column {tag!r}: the data collator makes labels of shape {shape} from {len(rows)} "
            f"rows with {sum(map(len, values))} tokens, so a label has no {tag}; use a collator "
            "that pads the rows, or writes them one after another"
        )
    read = batch.get("attention_mask", labels != IGNORED)
    if any(row[len(each) :].any() for row, each in zip(read, values, strict=True)):
        raise ProblemError(
            f"column {tag!r}: has a number for each token, and the data collator pads on the left, "
            "so that tokens would have others' numbers; set the tokenizer's padding_side='right'"
        )
    # Padding is not scored, so any value will do.
    return torch.tensor([each + each[-1:] * (shape[1] - len(each)) for each in values])


def without(entries: Mapping[str, Any], tags: Iterable[str]) -> dict[str, Any]:
    """The entries of a row or a batch without ``tags``.

    Example:
        >>> without({"labels": 1, "source": 0}, ["source"])
        {'labels': 1}
    """
    return {key: value for key, value in entries.items() if key not in tags}


def label_counts(
    tag: str, values: int, model: Any, rows: Any, collate: Callable[[Sequence[Any]], Any]
) -> Tensor:
    """The number of scored labels of ``rows`` for each value of ``tag``, ``(values,)`` or more.

    ``tag`` may be ``"labels"``. ``model``, ``rows`` and ``collate`` are the arguments of
    `Method.read_rows`. With ``model`` a causal model's first label of each row, which is not
    scored, does not count.

    Example:
        >>> from torch.utils.data import default_collate
        >>> rows = [{"labels": 1, "source": source} for source in (1, 1, 0)]
        >>> label_counts("source", 3, None, rows, default_collate)
        tensor([1, 2, 0])
    """
    shifted = None
    chosen: list[Tensor] = []
    for batch in DataLoader(rows, 256, collate_fn=collate):
        labels, value = require_labels(batch), batch[tag]
        if shifted is None and model is not None:
            inputs = send_to_device(without(batch, [tag]), next(model.parameters()).device)
            shifted = labels_are_shifted(model, inputs)
        if value.dim() < labels.dim():
            value = value[:, None].expand_as(labels)
        chosen.append(value[scored_labels({"labels": labels}, shifted=bool(shifted))])
    return torch.cat(chosen).bincount(minlength=values)


def marks(batch: Any) -> dict[str, Any]:
    """The identities and versions of the tensors in ``batch``, which a change of it changes."""
    if not isinstance(batch, Mapping):
        return {"": id(batch)}
    return {k: (id(x), x._version) if isinstance(x, Tensor) else None for k, x in batch.items()}


def keep_tags(trainer: Any) -> None:
    """Add the columns ``trainer.tags`` to the batches of ``trainer``."""
    tags, method = trainer.tags, type(trainer.method).__name__
    present = getattr(trainer.train_dataset, "column_names", None) or []
    if missing := [tag for tag in tags if tag not in present]:
        raise ProblemError(
            f"{missing[0]}: {method} reads this column, which the prepared training rows lack; "
            "add it"
        )
    args = trainer.args
    if getattr(args, "packing", False) and getattr(args, "packing_strategy", "") == "wrapped":
        raise ProblemError(
            f"packing_strategy: 'wrapped' rows mix texts, so a text has no {tags[0]} of its own; "
            "set 'bfd'"
        )
    for name in ("train_dataset", "upper_dataset"):
        rows = getattr(trainer, name)
        for tag in tags if isinstance(rows, Dataset) else ():
            column = rows.with_format(None)[tag] if tag in rows.column_names else ()
            for row, value in enumerate(column):
                numbers = value if isinstance(value, list) else [value]
                if not all(isinstance(number, int | float) for number in numbers):
                    raise ProblemError(
                        f"{tag}: is {value!r:.40} in row {row} (from 0) of {name}, and no number; "
                        "give it one, or leave the row out"
                    )
    if args.remove_unused_columns:  # the Trainer would remove the tags too
        trainer.model_columns = _model_columns(trainer)
        args.remove_unused_columns = False
    collate = trainer.data_collator
    if trainer.model_columns is not None:
        collate = RemoveColumnsCollator(collate, trainer.model_columns)
    trainer.data_collator = TagCollator(InOrder(collate), tags)


def _model_columns(trainer: Any) -> set[str]:
    """The columns of all rows of ``trainer`` that its own loaders leave."""
    evaluation = trainer.eval_dataset
    tables = {"train_dataset": trainer.train_dataset, "upper_dataset": trainer.upper_dataset}
    tables |= evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
    loaders = [loader_of(trainer, rows, name) for name, rows in tables.items() if rows is not None]
    return {x for each in loaders for x in getattr(each.dataset, "column_names", None) or ()}
