"""Sentences with the label of one rater, and the label of many raters' mean."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas

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
    files = archive()
    read = {"sep": "\t", "header": None, "quoting": 3, "index_col": 0}
    texts, rated = (
        pandas.read_csv(io.BytesIO(files[f"{DOMAINS[domain]}_{name}.txt"]), names=columns, **read)
        for name, columns in (
            ("GroundTruth", ["id", "mean", "text"]),
            ("anonDataRatings", ["id", "mean", "deviation", "ratings"]),
        )
    )
    table = texts[["text"]].join(rated["ratings"].map(json.loads), how="inner")
    noisy = table.ratings.map(np.random.RandomState(seed).choice)
    clean = table.ratings.map(np.mean)
    table = table.assign(noisy=class_of(noisy), clean=class_of(clean))[["text", "noisy", "clean"]]
    return table.drop_duplicates("text")


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
