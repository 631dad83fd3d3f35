"""MiniLM's last layers on cached states of the layers below, so that a run takes seconds."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from rated_text import DOMAINS, archive
from text_data import load_model, model_path

LENGTH, FROZEN = 24, 4


def movies() -> pandas.DataFrame:
    """Movie sentences, positive where their mean rating is."""
    file = archive()[f"{DOMAINS['movies']}_GroundTruth.txt"]
    names = ["id", "mean", "text"]
    table = pandas.read_csv(io.BytesIO(file), sep="\t", names=names, quoting=3)
    table = table.assign(label=(table["mean"] > 0).astype(int))
    return table[["text", "label"]].drop_duplicates("text")


class LastLayers(nn.Module):
    """MiniLM's layers above the ``frozen`` ones, mean pooling and a head, on states of those."""

    def __init__(self, model: Any, classes: int = 2, frozen: int = FROZEN) -> None:
        super().__init__()
        self.layers = model.bert.encoder.layer[frozen:]
        self.classifier = nn.Linear(model.config.hidden_size, classes)

    def forward(
        self, states: Tensor, mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Cross entropy and logits from ``(rows, tokens, hidden)`` states."""
        bias = (1 - mask)[:, None, None, :] * torch.finfo(states.dtype).min
        for layer in self.layers:
            states = layer(states, bias)
            states = states[0] if isinstance(states, tuple) else states
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        logits = self.classifier(pooled)
        loss = None if labels is None else cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits)


@dataclass(frozen=True)
class States:
    """The hidden states of a task's rows after the frozen layers, with masks and labels."""

    states: Tensor
    mask: Tensor
    labels: Tensor

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> dict[str, Tensor]:
        """The batch of ``rows``, each with its number under ``row``."""
        index = torch.tensor([row["row"] for row in rows])
        return {**self.inputs(index), "labels": self.labels[index]}

    def inputs(self, index: Tensor) -> dict[str, Tensor]:
        """States and masks of the rows ``index``."""
        return {"states": self.states[index], "mask": self.mask[index]}


def encode(
    texts: Sequence[str], labels: Tensor, length: int = LENGTH, frozen: int = FROZEN
) -> States:
    """``texts``, cut to ``length`` tokens, through the ``frozen`` layers, without dropout."""
    tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
    model = load_model("minilm", ["no", "yes"]).eval()
    model.bert.encoder.layer = model.bert.encoder.layer[:frozen]
    options = {"truncation": True, "max_length": length, "padding": "max_length"}
    inputs = tokenizer(list(texts), return_tensors="pt", **options)
    with torch.no_grad():
        states = [
            model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
            for ids, mask in zip(inputs.input_ids.split(100), inputs.attention_mask.split(100))
        ]
    return States(torch.cat(states), inputs.attention_mask.float(), labels)
