"""Features from a frozen model: one vector per row, or per labelled token.

The features are the hidden states of three layers, concatenated: at a third and two thirds of the
depth, and the last. A head on them makes fewer errors than a head on the last layer, and finds more
wrong labels; further layers bring nothing more (benchmarks/results/attribution.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from hyperopt_peft.core.labels import model_reads, rows_of
from hyperopt_peft.core.logits import IGNORED, as_numbers
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.data import batches_of
from hyperopt_peft.trainer.tags import INDEX, InOrder
from hyperopt_peft.utils.models import base_model, evaluating
from hyperopt_peft.utils.types import Model


@dataclass(frozen=True)
class Features:
    """The rows of a head.

    ``x`` has the features ``(m, d)`` of m rows, or of m tokens with a label; ``labels`` a class
    ``(m,)``, or numbers ``(m,)`` or ``(m, C)``; ``row`` the number of each one's row in the data.

    Example:
        >>> made = Features(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 1]), torch.arange(2))
        >>> made.standardized().x.flatten()
        tensor([-1.,  1.], dtype=torch.float64)
    """

    x: Tensor
    labels: Tensor
    row: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Features]) -> Features:
        """The rows of ``parts``, one after another."""
        columns = zip(*((part.x, part.labels, part.row) for part in parts), strict=True)
        return cls(*map(torch.cat, columns))

    def batch(self) -> dict[str, Tensor]:
        """All rows as a batch of `Head`, with the numbers of the data's rows as `INDEX`."""
        return {"features": self.x, "labels": self.labels, INDEX: self.row}

    def select(self, rows: Tensor) -> Features:
        """The features of the data's rows ``rows``, in the present order."""
        chosen = torch.isin(self.row, rows.to(self.row.device))
        return Features(self.x[chosen], self.labels[chosen], self.row[chosen])

    def standardized(self, like: Features | None = None) -> Features:
        """x with mean 0 and deviation 1 in each feature, in float64, so that one λ suits all.

        Mean and deviation are computed from ``like``, by default from these rows.
        """
        deviation, mean = torch.std_mean((like or self).x.double(), 0, correction=0)
        x = (self.x - mean).div_(deviation.clamp(min=1e-6))
        return Features(x, self.labels, self.row).to(dtype=torch.float64)

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Features:
        """The features, and labels that are numbers, of ``dtype``; all on ``device``.

        They are on the CPU where ``device`` has no float64 (Apple's).
        """
        if device is not None and device.type == "mps":
            device = torch.device("cpu")
        x = self.x.to(device, dtype)
        numbers = self.labels.is_floating_point()
        return Features(x, self.labels.to(device, dtype if numbers else None), self.row.to(device))


def features_of(
    model: Model,
    rows: Dataset | Sequence[Mapping[str, Any]],
    collate: Callable[[Sequence[Any]], Any],
    *,
    batch_size: int = 32,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: bool = False,
) -> Features:
    """The hidden states of three layers of ``model`` for ``rows``, the last layer last.

    A row has the mean of the states over the tokens of ``attention_mask``; an encoder-decoder model
    gives the states of its encoder. If tokens have labels, each labelled token has its own states.
    The model is in evaluation mode with its adapter active. The features are on the CPU in float32
    and take 4·m·d bytes; d is up to three times the model's width.

    Args:
        model: a model of Transformers, with or without a PEFT adapter.
        rows, collate: the rows, with labels, and a function that makes a batch of some of them.
        precision: of the passes, such as a Trainer's ``compute_loss_context_manager``.

    Raises:
        ProblemError: the model returns no states of tokens; a batch has no labels, or one that is
            neither of a row nor of a token; ``collate`` sorts rows or leaves some out.

    Example:
        >>> from transformers import BertConfig, BertForTokenClassification, default_data_collator
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_attention_heads=2)
        >>> rows = Dataset.from_dict({"input_ids": [[3, 4], [5, 6]], "labels": [[0, -100], [1, 0]]})
        >>> made = features_of(BertForTokenClassification(config), rows, default_data_collator)
        >>> made.x.shape, made.labels, made.row  # of each labelled token
        (torch.Size([3, 24]), tensor([0, 1, 0]), tensor([0, 1, 1]))
    """
    batches = batches_of(rows, InOrder(collate), batch_size, next(model.parameters()).device)
    parts = list[Features]()
    numbers = torch.arange(len(rows)).split(batch_size)
    with evaluating(model), precision():
        pairs = zip(batches, numbers, strict=True)
        for batch, number in tqdm(pairs, "features", len(numbers), disable=not progress):
            batch = dict(batch)
            labels = batch.pop("labels", None)
            if not isinstance(labels, Tensor):
                raise ProblemError("labels: a head needs a label of each row, or of each token")
            if len(labels) != len(number):
                text = f"leaves {len(number)} rows as {len(labels)}, and a head needs each"
                raise ProblemError(f"data_collator: {text}; remove rows from the data instead")
            labels = as_numbers(model, labels).cpu()
            if labels.dim() != 2 or labels.is_floating_point():
                states = _states(model, batch, len(number), encoder=True).float()
                mask = batch.get("attention_mask", states.new_ones(states.shape[:2]))[..., None]
                x = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            else:
                if not (read := labels.ne(IGNORED).any(1)).any():
                    continue
                batch = {name: rows_of(value, len(read), read) for name, value in batch.items()}
                labels, number = labels[read], number[read]
                states = _states(model, batch, len(labels))
                if labels.shape != states.shape[:2]:
                    raise ProblemError(
                        f"labels: have the shape {tuple(labels.shape)}, and the model's states "
                        f"{tuple(states.shape[:2])}; a head needs a label for each token"
                    )
                row, token = (labels != IGNORED).nonzero(as_tuple=True)
                x, labels, number = states[row, token], labels[row, token], number[row]
            parts.append(Features(x.float().cpu(), labels, number))
    if not parts:
        raise ProblemError("labels: no row has a label that is scored; give rows with labels")
    return Features.joined(parts)


@torch.no_grad()
def _states(model: Any, batch: dict[str, Any], count: int, *, encoder: bool = False) -> Tensor:
    """The states of ``count`` rows in three layers, or in the encoder's, ``(n, T, d)``."""
    with model_reads(batch):
        output = model(**batch, output_hidden_states=True)
    layers: Any = getattr(output, "encoder_hidden_states", None) if encoder else None
    layers = layers or getattr(output, "hidden_states", None) or (None,)
    end = len(layers) - 1
    last = layers[end]
    if not isinstance(last, Tensor) or last.dim() != 3 or len(last) != count:
        raise ProblemError(
            f"{type(base_model(model)).__name__}: returns no states of a row's tokens, so that a "
            "head has no features to read; train the adapter in its place"
        )
    states = torch.cat([layers[k] for k in sorted({end // 3, 2 * end // 3, end})], -1)
    read = batch.get("attention_mask", batch.get("input_ids"))
    return states if read is None else states[:, -read.shape[1] :]  # without a tuned prompt's
