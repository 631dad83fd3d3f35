"""Frozen lower layers: what is below an adapter never changes, and is computed once a text.

A training with an adapter in the last two of six layers then takes a third of the time. The frozen
layers have no dropout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithPadding

#: The states ``(tokens, d)`` above the frozen layers, by the tokens of a text.
States = dict[tuple[int, ...], Tensor]


class Known(nn.Module):
    """In place of the embeddings: the known states, padded with zeros, ``(n, tokens, d)``."""

    def __init__(self, states: States, padding: int) -> None:
        super().__init__()
        self.states, self.padding = states, padding

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        """Look them up."""
        texts = [tuple(k for k in row if k != self.padding) for row in input_ids.tolist()]
        return pad_sequence([self.states[text] for text in texts], batch_first=True)


class Passed(nn.Module):
    """In place of a layer whose output is known."""

    def forward(self, states: Tensor, *_: Any, **__: Any) -> Tensor:
        """The same states."""
        return states


@torch.no_grad()
def states_of(
    model: Any, layers: int, parts: Iterable[Dataset], collate: DataCollatorWithPadding
) -> States:
    """The states above the lowest ``layers`` of the texts in ``parts``, each of them once."""
    found: States = {}
    model.base_model.eval()
    for rows in parts:
        texts = rows.select_columns(["input_ids", "attention_mask"])
        for begin in range(0, len(texts), 100):
            batch = collate([texts[k] for k in range(begin, min(begin + 100, len(texts)))])
            output = model.base_model(**batch, output_hidden_states=True)
            for ids, mask, states in zip(
                batch["input_ids"], batch["attention_mask"].bool(), output.hidden_states[layers]
            ):
                found[tuple(ids[mask].tolist())] = states[mask].clone()
    return found


def without_lower_layers(model: Any, layers: int, states: States) -> Any:
    """``model`` with ``states`` in place of its embeddings and lowest ``layers``; names stay."""
    encoder, upper = model.base_model, model.base_model.encoder.layer[layers:]
    encoder.embeddings = Known(states, model.config.pad_token_id)
    encoder.encoder.layer = nn.ModuleList([*(Passed() for _ in range(layers)), *upper])
    return model
