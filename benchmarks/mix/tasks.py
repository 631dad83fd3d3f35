"""The tasks of `cells`: sources of doubtful labels, a few trusted rows, and test rows."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rated_text import DOMAINS, archive, class_of, one_rater
from text_data import load_model, tweets
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.last_layers import LENGTH, LastLayers, States, disjoint, encode
from hyperopt_peft.problems.votes import NO_VOTE

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "outputs/mix"
#: Questions with the votes of labelling functions, in a folder next to the repository.
TREC = ROOT.parent / "shared/data/trec"
#: Settings are chosen on these seeds, whose test rows no other seed is judged by.
DEVELOPMENT_SEEDS = range(50, 54)
#: The layers of MiniLM below the one that is trained.
BELOW = 5
#: Simulated annotators of each kind, how often one is right, and rows of one.
ANNOTATORS, OF_A_KIND, ROWS = {"good": 0.9, "mediocre": 0.6, "adversarial": 0.2}, 4, 60
#: Sentences of movie reviews come in blocks, in each of which the same persons rate.
BLOCK, BLOCKS, RATERS = 30, 20, 3


class OnStates(nn.Module):
    """MiniLM's last layer and a head on the states of ``states``, of rows by their numbers."""

    def __init__(self, states: States, classes: int) -> None:
        super().__init__()
        self.states = states
        self.last = LastLayers(load_model("minilm", ["no", "yes"]), classes, BELOW)
        self.config = SimpleNamespace(num_labels=classes, problem_type=None)

    def forward(
        self, row: Tensor, labels: Tensor | None = None, output_hidden_states: bool = False
    ) -> SequenceClassifierOutput:
        """Loss and logits; the hidden states are the mean over a row's tokens, as one token."""
        inputs = self.states.inputs(row)
        longest = int(inputs["mask"].sum(1).max())
        output = self.last(**{name: x[:, :longest] for name, x in inputs.items()}, labels=labels)
        output.hidden_states = (output.hidden_states[0][:, None],)
        return output


@dataclass(frozen=True)
class Task:
    """Rows by their numbers, in the column ``row``, with ``labels``.

    Attributes:
        states: of all rows, after the layers below.
        classes: the number of classes.
        sources: the rows of each source by name, or all rows with the column ``votes``.
        trusted: rows with right labels, with ``votes`` where the sources vote on them.
        test: rows that a trained model is judged by, once.
    """

    states: States
    classes: int
    sources: Mapping[str, Dataset] | Dataset
    trusted: Dataset
    test: Dataset

    def model(self, seed: int) -> Any:
        """LoRA in the last layer and a new head, drawn from ``seed``."""
        torch.manual_seed(seed)
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
        )
        return get_peft_model(OnStates(self.states, self.classes), config)  # type: ignore[arg-type]


def rows_of(index: Tensor, labels: Tensor, votes: Tensor | None = None) -> Dataset:
    """A data set of the rows ``index``, with their ``labels`` and, if given, their votes."""
    columns = {"row": index.tolist(), "labels": labels.tolist()}
    return Dataset.from_dict(columns if votes is None else {**columns, "votes": votes.tolist()})


def trec(trusted: int, source: torch.Generator, development: bool) -> Task:
    """Questions of six classes with the votes of 68 labelling functions.

    Trusted rows are of the first half of the gold rows. Test rows are the second half; in
    development they are the rest of the first half. A training row that is also a gold row is left
    out.
    """
    train, gold = (
        [json.loads(line) for line in (TREC / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "gold")
    )
    count, half, rows = len(train), len(gold) // 2, [*train, *gold]
    votes = torch.full((len(rows), 68), NO_VOTE)
    for number, row in enumerate(rows):
        for function, vote in row["votes"]:
            votes[number, function] = vote
    known = {row["text"] for row in gold}
    used = torch.tensor([row["text"] not in known for row in train]) & (votes[:count] >= 0).any(1)
    leaks = {row["text"] for row in gold[half:]}
    first = torch.tensor([count + i for i in range(half) if gold[i]["text"] not in leaks])
    first = first[torch.randperm(len(first), generator=source)]
    test = first[trusted:] if development else torch.arange(count + half, len(rows))
    first, below = first[:trusted], used.nonzero().flatten()
    votes = votes[:, (votes[below] != NO_VOTE).any(0)]
    labels = torch.tensor([row.get("label", 0) for row in rows])
    states = states_of("trec", [row["text"] for row in rows], labels)
    sources = rows_of(below, labels[below], votes[below]).remove_columns("labels")
    apart = rows_of(first, labels[first], votes[first])
    return Task(states, 6, sources, apart, rows_of(test, labels[test]))


def raters(trusted: int, source: torch.Generator, development: bool) -> Task:
    """Sentences of movie reviews in three classes, each rated by three persons.

    Ratings come in blocks of 30 sentences. In a block the ratings at one place are of one person:
    the means by place differ by 8 times what chance gives. 20 blocks have three persons each, who
    are the sources; other blocks have the trusted and 600 test rows, with the class of the mean
    rating.
    """
    domain, count = DOMAINS["movies"], 100 * BLOCK
    read = {"sep": "\t", "header": None, "quoting": 3}
    # Every third block of the file, in which sentences of one class follow each other.
    place = (np.arange(0, 300, 3)[:, None] * BLOCK + np.arange(BLOCK)).flatten()
    texts, ratings = (
        list(pandas.read_csv(io.BytesIO(archive()[f"{domain}_{name}.txt"]), **read)[column][place])
        for name, column in (("GroundTruth", 2), ("anonDataRatings", 3))
    )
    ratings = [pandas.Series(json.loads(each)) for each in ratings]
    labels = torch.tensor(class_of(pandas.Series([each.mean() for each in ratings])).to_numpy())
    half = count // BLOCK // 2
    block = 2 * torch.randperm(half, generator=source) + (0 if development else 1)
    row = (block[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
    train, rest = row[: BLOCKS * BLOCK], row[BLOCKS * BLOCK :]
    # Sentences of a block are often of one class: trusted and test rows are drawn one by one.
    rest = rest[torch.randperm(len(rest), generator=source)]
    votes = torch.full((count, BLOCKS * RATERS), NO_VOTE)
    for number, rows in enumerate(train.split(BLOCK)):
        persons = torch.randperm(min(map(len, (ratings[r] for r in rows))), generator=source)
        for each in rows.tolist():
            classes = class_of(ratings[each])[persons[:RATERS].tolist()]
            votes[each, number * RATERS : (number + 1) * RATERS] = torch.tensor(list(classes))
    train, first, test = disjoint([train, rest[:trusted], rest[trusted:][:600]], texts)
    sources = rows_of(train, labels[train], votes[train]).remove_columns("labels")
    states = states_of("raters", texts, labels)
    return Task(states, 3, sources, rows_of(first, labels[first]), rows_of(test, labels[test]))


def domains(
    trusted: int, source: torch.Generator, development: bool, seed: int, copies: bool = False
) -> Task:
    """Sentiment in three classes of four domains, for one of the domains; every seed has the next.

    A source is 200 sentences of a domain, each with the class of one person's rating. With
    ``copies`` it is 60 of them with the right class; each source then has a flipped and a shuffled
    copy.
    """
    size, judged = 1200, 300  # rows of a domain, and test rows in each half of them
    tables = [one_rater(domain, seed=0).sample(size, random_state=0) for domain in DOMAINS]
    texts = [text for table in tables for text in table.text]
    noisy, labels = (
        torch.cat([torch.tensor(table[name].to_numpy()) for table in tables])
        for name in ("noisy", "clean")
    )
    sources, half, target, count = {}, size // 2, seed % len(DOMAINS), ROWS if copies else 200
    for number, name in enumerate(DOMAINS):
        begin = number * size + (0 if development else half)
        rest = torch.randperm(half - judged, generator=source) + begin + judged
        rows = rest[:count]
        if copies:
            shuffled = labels[rows][torch.randperm(len(rows), generator=source)]
            sources[name] = rows_of(rows, labels[rows])
            sources[f"{name}, flipped"] = rows_of(rows, 2 - labels[rows])
            sources[f"{name}, shuffled"] = rows_of(rows, shuffled)
        else:
            sources[name] = rows_of(rows, noisy[rows])
        if number == target:
            first, test = rest[count:][:trusted], torch.arange(judged) + begin
    states = states_of("domains", texts, labels)
    return Task(states, 3, sources, rows_of(first, labels[first]), rows_of(test, labels[test]))


def annotators(trusted: int, source: torch.Generator, development: bool) -> Task:
    """Tweets in three classes that twelve simulated annotators label, 60 each, four of a kind.

    A good one is right with probability .9 and a mediocre one .6, else another class is drawn. An
    adversarial one gives the next class with probability .8.
    """
    pool, judged = 1250, 400
    table = tweets().to_pandas().sample(2 * pool, random_state=0)
    texts, labels = list(table.text), torch.tensor(table.label.to_numpy())
    begin, count = 0 if development else pool, len(ANNOTATORS) * OF_A_KIND
    order = torch.randperm(pool - judged, generator=source) + begin + judged
    train, first = order[: count * ROWS], order[count * ROWS :][:trusted]
    sources = {}
    for number, rows in enumerate(train.split(ROWS)):
        kind = list(ANNOTATORS)[number // OF_A_KIND]
        wrong = torch.rand(len(rows), generator=source) >= ANNOTATORS[kind]
        step = torch.randint(1, 3, (len(rows),), generator=source)
        step = torch.ones_like(step) if kind == "adversarial" else step
        sources[f"{kind} {number}"] = rows_of(rows, (labels[rows] + step * wrong) % 3)
    _, test = disjoint([order, torch.arange(judged) + begin], texts)
    states = states_of("tweets", texts, labels)
    return Task(states, 3, sources, rows_of(first, labels[first]), rows_of(test, labels[test]))


def draw(name: str, trusted: int, seed: int) -> Task:
    """The rows of ``seed`` with ``trusted`` trusted ones."""
    source, development = torch.Generator().manual_seed(seed), seed in DEVELOPMENT_SEEDS
    if name in ("domains", "copies"):
        return domains(trusted, source, development, seed, copies=name == "copies")
    make: dict[str, Callable[..., Task]] = {
        "trec": trec,
        "raters": raters,
        "annotators": annotators,
    }
    return make[name](trusted, source, development)


_known: dict[str, States] = {}


def states_of(name: str, texts: Sequence[str], labels: Tensor) -> States:
    """The states of ``texts`` after the layers below, computed once and then read from a file."""
    path = CACHE / f"{name}-{BELOW}-{LENGTH}.pt"
    if name not in _known:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(vars(encode(texts, labels, frozen=BELOW)), path)
        _known[name] = States(**torch.load(path))
    return _known[name]
