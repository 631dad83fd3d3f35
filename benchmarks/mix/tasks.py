"""The tasks of `cells`: rows that sources label, a few trusted rows, and test rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from rated_text import DOMAINS, one_rater
from text_data import model_path, tweets
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from benchmarks.last_layers import States, disjoint, encode
from hyperopt_peft.problems.data_sources import NO_VOTE

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "outputs/mix"
#: Questions with the votes of labelling functions, in a folder next to the repository.
TREC = ROOT.parent / "shared/data/trec"
#: Settings are chosen on these seeds, whose test rows no other seed is judged by.
DEVELOPMENT_SEEDS = (100, 101)
#: The number of LoRA's layers, the last ones, and the tokens that a text is cut to.
LAYERS, LENGTH = 1, 16
ANNOTATORS = {"good": 0.9, "mediocre": 0.6, "adversarial": 0.2}
ROWS_OF_SOURCE, SOURCES_OF_KIND, TEST, POOL = 60, 4, 400, 1250
GOOD, NEITHER, BAD = 1, 0, -1


@dataclass(frozen=True)
class Task:
    """Rows by number, of which ``n`` are known.

    Attributes:
        inputs: the model's arguments of rows.
        labels: the true classes, ``(n,)``, -1 where nobody knows them; of documents the tokens.
        votes: the class that each source gives to a row, ``(n, K)``, `NO_VOTE` for none; of
            documents 0 for the source of the row.
        train: the rows with votes.
        trusted: the rows with a label to trust.
        test: the rows that a trained model is judged by, once.
        quality: of each source, `GOOD`, `BAD` or `NEITHER`, ``(K,)``.
    """

    inputs: Callable[[Tensor], dict[str, Tensor]]
    labels: Tensor
    votes: Tensor
    train: Tensor
    trusted: Tensor
    test: Tensor
    quality: Tensor

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.labels.max()) + 1

    def votes_of(self, trusted: Tensor) -> Tensor:
        """The right votes on trusted rows, ``(n,)``."""
        labels = self.labels[trusted]
        return labels if labels.dim() == 1 else torch.zeros_like(trusted)


def trec(model: str, trusted: int, source: torch.Generator, development: bool) -> Task:
    """Questions of six classes with the votes of 68 labelling functions.

    Trusted rows are of the first half of the gold rows. Test rows are the second half, whose
    classes have other shares; in development they are the rest of the first half. A training row
    that is also a gold row is left out.
    """
    train, gold = questions()
    count, half = len(train), len(gold) // 2
    rows = [*train, *gold]
    votes = torch.full((len(rows), 68), NO_VOTE)
    for number, row in enumerate(train):
        for function, vote in row["votes"]:
            votes[number, function] = vote
    gold_texts = {row["text"] for row in gold}
    leaks = {row["text"] for row in gold[half:]}
    used = [i for i, row in enumerate(train) if row["votes"] and row["text"] not in gold_texts]
    first = torch.tensor([count + i for i in range(half) if gold[i]["text"] not in leaks])
    first = first[torch.randperm(len(first), generator=source)]
    below = torch.tensor(used)
    if model == "lora":  # as many steps as the other tasks
        below = below[torch.randperm(len(below), generator=source)[:1000]]
    test = first[trusted:] if development else torch.arange(count + half, len(rows))
    labels = torch.tensor([row.get("label", -1) for row in rows])
    right = torch.tensor([_accuracy(gold, function) for function in range(votes.shape[1])])
    quality = torch.full_like(right, NEITHER)
    quality[right >= 0.7], quality[right <= 0.35] = GOOD, BAD
    texts = [row["text"] for row in rows]
    inputs = _features(texts, below) if model == "head" else _states("trec", texts, labels)
    return Task(inputs, labels, votes, below, first[:trusted], test, quality)


@cache
def questions() -> tuple[list[dict], list[dict]]:  # type: ignore[type-arg]
    """Training rows with votes, and gold rows with votes and labels."""
    train, gold = (
        [json.loads(line) for line in (TREC / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "gold")
    )
    return train, gold


def _accuracy(gold: Sequence[dict], function: int) -> float:  # type: ignore[type-arg]
    """The share of a function's votes on the gold rows that are right, one half of none."""
    right = [vote == row["label"] for row in gold for k, vote in row["votes"] if k == function]
    return sum(right) / len(right) if right else 0.5


def annotators(trusted: int, source: torch.Generator, seed: int) -> Task:
    """Tweets that twelve annotators label, 60 each: four good, four mediocre, four adversarial.

    A good one is right with probability .9 and a mediocre one .6, else another class is drawn. An
    adversarial one gives the next class with probability .8.
    """
    table = tweets().to_pandas().sample(2 * POOL, random_state=0)
    labels = torch.tensor(table.label.to_numpy())
    order = torch.randperm(POOL - TEST, generator=source) + TEST
    offset = 0 if seed in DEVELOPMENT_SEEDS else POOL
    count = len(ANNOTATORS) * SOURCES_OF_KIND
    chosen = order[: count * ROWS_OF_SOURCE + trusted] + offset
    train, apart = chosen[:-trusted], chosen[-trusted:]
    votes = torch.full((len(labels), count), NO_VOTE)
    for number, rows in enumerate(train.split(ROWS_OF_SOURCE)):
        kind = list(ANNOTATORS)[number // SOURCES_OF_KIND]
        wrong = torch.rand(len(rows), generator=source) >= ANNOTATORS[kind]
        step = torch.randint(1, 3, (len(rows),), generator=source)
        step = torch.ones_like(step) if kind == "adversarial" else step
        votes[rows, number] = (labels[rows] + step * wrong) % 3
    quality = torch.tensor([GOOD, NEITHER, BAD]).repeat_interleave(SOURCES_OF_KIND)
    texts = list(table.text)
    inputs = _states("tweets", texts, labels)
    _, test = disjoint([order + offset, torch.arange(TEST) + offset], texts, LENGTH)
    return Task(inputs, labels, votes, train, apart, test, quality)


def domains(trusted: int, source: torch.Generator, seed: int) -> Task:
    """Sentiment of four domains, each with a flipped and a shuffled copy, for one of the domains.

    Every seed has the next domain as its target.
    """
    size, judged = 1000, 300  # rows of a domain, and test rows in each half of them
    tables = [one_rater(domain, seed=0).sample(size, random_state=0) for domain in DOMAINS]
    texts = [text for table in tables for text in table.text]
    labels = torch.cat([torch.tensor(table.clean.to_numpy()) for table in tables])
    votes, train = torch.full((len(labels), 3 * len(DOMAINS)), NO_VOTE), []
    half, target = size // 2, seed % len(DOMAINS)
    for number in range(len(DOMAINS)):
        begin = number * size + (0 if seed in DEVELOPMENT_SEEDS else half)
        rest = torch.randperm(half - judged, generator=source) + begin + judged
        rows = rest[:ROWS_OF_SOURCE]
        shuffled = labels[rows][torch.randperm(len(rows), generator=source)]
        copies = torch.stack([labels[rows], 2 - labels[rows], shuffled], dim=1)
        votes[rows, 3 * number : 3 * number + 3] = copies
        train.append(rows)
        if number == target:
            apart, test = rest[ROWS_OF_SOURCE:][:trusted], torch.arange(judged) + begin
    quality = torch.tensor([GOOD, BAD, BAD] * len(DOMAINS))
    inputs = _states("domains", texts, labels)
    return Task(inputs, labels, votes, torch.cat(train), apart, test, quality)


def _states(name: str, texts: Sequence[str], labels: Tensor) -> Callable[..., dict[str, Tensor]]:
    """Arguments of `LastLayers`, in batches without columns of padding alone."""
    layers = 6 - LAYERS
    states: States = cached(
        f"{name}-{layers}-{LENGTH}", lambda: encode(texts, labels, LENGTH, layers)
    )

    def inputs(index: Tensor) -> dict[str, Tensor]:
        batch = states.inputs(index)
        longest = int(batch["mask"].sum(1).max())
        return {key: value[:, :longest] for key, value in batch.items()}

    return inputs


def _features(texts: Sequence[str], train: Tensor) -> Callable[[Tensor], dict[str, Tensor]]:
    """The mean of MiniLM's last states, with mean 0 and deviation 1 over the training rows."""
    features: Tensor = cached("trec-features", lambda: pooled(texts))
    features = (features - features[train].mean(0)) / features[train].std(0)
    return lambda index: {"features": features[index]}


@torch.no_grad()
def pooled(texts: Sequence[str]) -> Tensor:
    """The mean of MiniLM's last states of each text, ``(n, 384)``."""
    tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
    model = AutoModel.from_pretrained(model_path("minilm")).eval()
    means = []
    for begin in range(0, len(texts), 100):
        options = {"truncation": True, "max_length": 32, "padding": True}
        batch = tokenizer(list(texts[begin : begin + 100]), return_tensors="pt", **options)
        mask = batch.attention_mask[..., None].float()
        means.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(means)


_known: dict[str, object] = {}


def cached(name: str, make: Callable[[], object]):  # type: ignore[no-untyped-def]
    """What ``make`` returns, computed once."""
    path = CACHE / f"{name}.pt"
    if name not in _known:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(make(), path)
        _known[name] = torch.load(path, weights_only=False)
    return _known[name]
