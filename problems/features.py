"""What a frozen model makes of rows: a vector for each row, or for each token with a label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from hyperopt_peft.core.labels import model_reads, rows_of
from hyperopt_peft.core.logits import IGNORED
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.example_weights import COLUMNS, without
from hyperopt_peft.trainer.data import collating
from hyperopt_peft.trainer.fingerprint import data_fingerprint, weights_fingerprint
from hyperopt_peft.utils.models import base_model, evaluating
from hyperopt_peft.utils.random_state import RandomState, replay


@dataclass(frozen=True)
class Features:
    """The rows of a head: x, their labels, and where each comes from.

    Attributes:
        x: the features, ``(m, d)`` in float32 on the CPU; m is the number of rows, or of tokens
            with a label.
        labels: a class ``(m,)``, or numbers ``(m,)`` or ``(m, C)``.
        row: the number of the data's row that each is of, ``(m,)``.

    Example:
        >>> features = Features(torch.ones(3, 2), torch.tensor([0, 1, 0]), torch.arange(3))
        >>> len(features.select(torch.tensor([0, 2])).x)
        2
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
        """All rows as a batch of `Head`."""
        return {"features": self.x, "labels": self.labels}

    def select(self, rows: Tensor) -> Features:
        """Those of the data's rows ``rows``, in the present order."""
        chosen = torch.isin(self.row, rows)
        return Features(self.x[chosen], self.labels[chosen], self.row[chosen])

    def standardized(self, like: Features | None = None) -> Features:
        """x with mean 0 and deviation 1 in each feature, so that one λ suits every model.

        Mean and deviation are those of ``like``, by default of these rows.
        """
        deviation, mean = torch.std_mean((like or self).x, 0, correction=0)
        return Features((self.x - mean) / deviation.clamp(min=1e-6), self.labels, self.row)


def features_of(
    model: Any,
    rows: Dataset,
    collate: Callable[[Sequence[Any]], Any],
    *,
    batch_size: int = 32,
    device: torch.device | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    cache: Path | None = None,
    progress: bool = False,
    shifted: bool = False,
    share: Tensor | None = None,
) -> Features:
    """The features of ``rows``: what ``model`` makes of them before its head.

    Of a row it is the mean of the last layer's states over the tokens of ``attention_mask``; where
    each token has a label, the states by which the labels that are scored are predicted. Of an
    encoder-decoder model it is the encoder's, of its text the decoder's. The model is in evaluation
    mode, and its adapter as it is. Besides the model 4·m·d bytes are held.

    Args:
        model: a model of Transformers, with or without a PEFT adapter.
        rows: the rows, with labels.
        collate: makes a batch of some of them.
        batch_size: rows of a batch.
        device: where the model reads its batches; by default that of its parameters.
        precision: of the passes, such as a Trainer's ``compute_loss_context_manager``.
        cache: a file; features of the same rows, model and precision are read from it, else they
            are written to it.
        progress: whether to show a progress bar.
        shifted: whether a label is the next token, as of a causal language model.
        share: of each row the probability with which one of its tokens' labels is read,
            ``(len(rows),)``, by default 1. Those that are do not depend on ``batch_size``.

    Raises:
        ProblemError: the model returns no states of tokens; a batch has no labels, or one that is
            neither of a row nor of a token.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from transformers import default_data_collator
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = BertForSequenceClassification(tiny)
        >>> rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [0, 1]})
        >>> features_of(model, rows, default_data_collator).x.shape
        torch.Size([2, 8])
    """
    device = torch.device(device or next(model.parameters()).device)
    with precision():
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    share = torch.ones(len(rows)) if share is None else share
    if cache is not None:
        identity = f"{_identity(model, rows, collate, share)} {autocast} {shifted}"
    if cache is not None and (known := _read(cache, identity)) is not None:
        return known
    parts, numbers = [], torch.arange(len(rows)).split(batch_size)
    generator = torch.Generator().manual_seed(0)
    with collating("the rows"), replay(RandomState.capture()), evaluating(model), precision():
        for number in tqdm(numbers, desc="features", disable=not progress):
            batch = dict(collate([rows[row] for row in number.tolist()]))
            labels = batch.pop("labels", None)
            if not isinstance(labels, Tensor):
                raise ProblemError("labels: a head needs a label of each row, or of each token")
            batch = without(batch, COLUMNS)
            if labels.dim() != 2 or labels.is_floating_point():
                x = _means(model, send_to_device(batch, device), len(number))
            else:
                labels = _sampled(labels, share[number], generator, shifted)
                if not (read := labels.ne(IGNORED).any(1)).any():
                    continue
                batch = {name: rows_of(value, len(read), read) for name, value in batch.items()}
                labels, number = labels[read], number[read]
                states = _states(model, send_to_device(batch, device), labels)
                row, token = (labels != IGNORED).nonzero(as_tuple=True)
                x, labels = states[row, token - int(shifted)], labels[row, token]
                number = number[row]
            parts.append(Features(x.float().cpu(), labels, number))
    if not parts:
        raise ProblemError("labels: no row has a label that is scored; give rows with labels")
    features = Features.joined(parts)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"x": features.x, "labels": features.labels, "row": features.row}
        save_file(tensors, cache, metadata={"identity": identity})
    return features


def _sampled(labels: Tensor, share: Tensor, generator: torch.Generator, shifted: bool) -> Tensor:
    """The labels of tokens, of which those that are not read are ignored."""
    labels = labels.clone()
    if shifted:
        labels[:, 0] = IGNORED  # no token is before it
    row, token = (labels != IGNORED).nonzero(as_tuple=True)
    left_out = torch.rand(len(row), generator=generator) >= share[row]
    labels[row[left_out], token[left_out]] = IGNORED
    return labels


def _means(model: Any, batch: dict[str, Any], count: int) -> Tensor:
    """The mean state of each row, ``(n, d)``, over the tokens that are no padding."""
    output = _output(model, batch)
    states = getattr(output, "encoder_last_hidden_state", None)
    states = _last(model, output, "hidden_states") if states is None else states
    if states.dim() != 3 or len(states) != count:
        raise _no_states(model)
    mask = batch.get("attention_mask", states.new_ones(states.shape[:2]))
    states, mask = states[:, -mask.shape[1] :], mask[..., None].float()  # without a tuned prompt's
    means: Tensor = (states.float() * mask).sum(1) / mask.sum(1).clamp(min=1)
    return means


def _states(model: Any, batch: dict[str, Any], labels: Tensor) -> Tensor:
    """The state of each token, or of each one of a decoder, of the shape of ``labels``."""
    output = _output(model, batch)
    decodes = getattr(output, "encoder_last_hidden_state", None) is not None
    states = _last(model, output, "decoder_hidden_states" if decodes else "hidden_states")
    read = batch.get("attention_mask", batch.get("input_ids"))
    if not decodes and read is not None:
        states = states[:, -read.shape[1] :]
    if labels.shape != states.shape[:2]:
        raise ProblemError(
            f"labels: have the shape {tuple(labels.shape)}, and the model's states "
            f"{tuple(states.shape[:2])}; a head needs a label for each token"
        )
    return states


@torch.no_grad()
def _output(model: Any, batch: dict[str, Any]) -> Any:
    # The logits, which are not used, are those of one position.
    few = "logits_to_keep" in signature(base_model(model).forward).parameters
    with model_reads(batch):
        return model(**batch, output_hidden_states=True, **({"logits_to_keep": 1} if few else {}))


def _last(model: Any, output: Any, name: str) -> Tensor:
    """The last layer's states in ``output``."""
    states = (getattr(output, name, None) or (None,))[-1]
    if not isinstance(states, Tensor):
        raise _no_states(model)
    return states


def _no_states(model: Any) -> ProblemError:
    return ProblemError(
        f"{type(base_model(model)).__name__}: returns no states of a row's tokens, so that a head "
        "has no features to read; train the adapter in its place"
    )


def _identity(model: Any, rows: Dataset, collate: Any, share: Tensor) -> str:
    """The identity of the features: of rows, shares, the model's weights, and the first batch."""
    with replay(RandomState.capture()), collating("the rows"):
        first = collate([rows[row] for row in range(min(4, len(rows)))])
    tensors = {name: value for name, value in dict(first).items() if isinstance(value, Tensor)}
    named = [*model.named_parameters(), *tensors.items(), ("share", share)]
    return f"{data_fingerprint(rows)} {weights_fingerprint(named)}"


def _read(path: Path, identity: str) -> Features | None:
    """The features in ``path``; None if they are not those of ``identity``."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("identity") != identity:
                return None
            return Features(*(file.get_tensor(name) for name in ("x", "labels", "row")))
    except (OSError, SafetensorError):
        return None
