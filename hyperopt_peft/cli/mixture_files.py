"""A learned mixture in the configurations of trainers that take a fixed one.

Each trainer keeps n_k·v_k / max v rows of a source with n_k rows of weight v_k, or draws sources in
that proportion, so that no row occurs twice. ``files`` has the number of rows of each file, by the
name of the source, and ``weights`` the weight v_k > 0 of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

Files = Mapping[str, Mapping[str, int]]
Weights = Mapping[str, float]

#: What `datasets.load_dataset` calls a file; a TSV file needs an option that the trainers lack.
KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
DIGITS = 12  # the probabilities must add up to 1 within 1e-8


def trl(files: Files, weights: Weights) -> dict[str, Any]:
    """TRL's ``datasets`` (1.16), where ``fraction`` is the share of the mixture's rows.

    TRL makes the largest mixture with these shares, of the first rows of each file.

    Example:
        >>> files = {"wiki": {"w.jsonl": 60}, "code": {"c.jsonl": 20, "d.csv": 20}}
        >>> [one["fraction"] for one in trl(files, {"wiki": 0.5, "code": 1.5})["datasets"]]
        [0.333333333333, 0.333333333333, 0.333333333333]
    """
    kept = [(path, weights[name] * rows) for name, path, rows in _each(files)]
    total = sum(rows for _, rows in kept)
    return {
        "datasets": [
            {
                "path": KINDS[_suffix(path)],
                "data_files": path,
                "split": "train",
                "fraction": _rounded(rows / total),
            }
            for path, rows in kept
        ]
    }


def axolotl(files: Files, weights: Weights) -> dict[str, Any]:
    """axolotl's ``datasets``, where ``weight``, in (0, 1], is the share of a file's rows to keep.

    Example:
        >>> files = {"wiki": {"w.jsonl": 60}, "code": {"c.jsonl": 20}}
        >>> axolotl(files, {"wiki": 0.5, "code": 2.0})["datasets"]
        [{'path': 'w.jsonl', 'weight': 0.25}, {'path': 'c.jsonl', 'weight': 1.0}]
    """
    largest = max(weights[name] for name in files)
    return {
        "datasets": [
            {"path": path, "weight": _rounded(weights[name] / largest)}
            for name, path, _ in _each(files)
        ]
    }


def llama_factory(files: Files, weights: Weights) -> dict[str, Any]:
    """LLaMA-Factory's mixing options: the probability of a source, until one has no more rows.

    Example:
        >>> files = {"wiki": {"w.jsonl": 60}, "code": {"c.jsonl": 20}}
        >>> llama_factory(files, {"wiki": 0.5, "code": 1.5})["interleave_probs"]
        '0.5,0.5'
    """
    drawn = {name: weights[name] * sum(files[name].values()) for name in files}
    total = sum(drawn.values())
    return {
        "dataset": ",".join(drawn),
        "mix_strategy": "interleave_under",
        "interleave_probs": ",".join(str(_rounded(each / total)) for each in drawn.values()),
    }


#: The functions by the name of the trainer, with what a reader of the file needs to know.
TRAINERS = {
    "trl": (trl, "fraction: the share of the mixture; TRL takes the first rows, so shuffle files"),
    "axolotl": (axolotl, "weight: the share of the file's rows that are kept"),
    "llama-factory": (llama_factory, "the names of the data sets are those in dataset_info.json"),
}


def write_mixture(folder: Path, files: Files, weights: Weights) -> None:
    """Write ``trl.yaml``, ``axolotl.yaml`` and ``llama-factory.yaml``; none if a file is TSV."""
    if not all(_suffix(path) in KINDS for _, path, _ in _each(files)):
        return
    folder.mkdir(exist_ok=True)
    for trainer, (mixture, comment) in TRAINERS.items():
        text = yaml.safe_dump(mixture(files, weights), sort_keys=False)
        (folder / f"{trainer}.yaml").write_text(f"# {comment}\n{text}", encoding="utf-8")


def _each(files: Files) -> Iterator[tuple[str, str, int]]:
    """The source, the path and the number of rows of each file."""
    for name, paths in files.items():
        for path, rows in paths.items():
            yield name, path, rows


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()


def _rounded(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")
