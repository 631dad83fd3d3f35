"""The files of a learnt mix: weights, a picture of them over the run, and what other tools read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hyperopt_peft.problems.mix_trainer import MixTrainer

#: Colours of sources in a picture; the others are grey.
NAMED = 10


def write_weights(trainer: MixTrainer, path: Path) -> None:
    """Write counts, shares and weights of the sources as JSON."""
    shares, weights = trainer.shares(), trainer.row_weights()
    sources = {
        name: {"rows": count, "share": shares[name], "row_weight": weights[name]}
        for name, count in trainer.data.counts.items()
    }
    path.write_text(json.dumps({"sources": sources}, indent=1) + "\n")


def snippets(
    weights: Mapping[str, float],
    shares: Mapping[str, float],
    files: Mapping[str, Sequence[str]],
) -> str:
    """The mix in the configurations of other trainers.

    TRL and axolotl take a part of the rows of each data set, here that of the largest weight
    whole. LLaMA-Factory draws each data set with a probability.

    Args:
        weights: the weight of a row of each source.
        shares: the share of each source in the training loss.
        files: the files of each source, by name.

    Example:
        >>> files = {"wiki": ["w.jsonl"], "code": ["c.jsonl"]}
        >>> print(snippets({"wiki": 1.5, "code": 0.5}, {"wiki": 0.6, "code": 0.4}, files))
        # TRL
        datasets:
        - path: json
          data_files: w.jsonl
          split: train
        - path: json
          data_files: c.jsonl
          split: train[:33%]
        ...
    """
    largest = max(weights[name] for name in files)
    kept = {name: weights[name] / largest for name in files}
    kinds = {".jsonl": "json", ".tsv": "csv"}
    trl, axolotl = [], []
    for name, paths in files.items():
        data = paths[0] if len(paths) == 1 else list(paths)
        suffix = Path(paths[0]).suffix
        percent = max(1, round(100 * kept[name]))
        part = "train" if percent == 100 else f"train[:{percent}%]"
        path = kinds.get(suffix, suffix.removeprefix("."))
        trl.append({"path": path, "data_files": data, "split": part})
        axolotl.append({"path": data, "weight": max(0.001, round(kept[name], 3))})
    total = sum(shares[name] for name in files)
    factory = {
        "dataset": ",".join(files),
        "mix_strategy": "interleave_over",
        "interleave_probs": ",".join(f"{shares[name] / total:.10f}" for name in files),
    }
    parts = {
        "TRL": {"datasets": trl},
        "axolotl": {"datasets": axolotl},
        "LLaMA-Factory": factory,
    }
    return "\n".join(f"# {name}\n{yaml.safe_dump(x, sort_keys=False)}" for name, x in parts.items())


def picture(
    first: Mapping[str, float],
    history: Sequence[Mapping[str, Any]],
    trainer: MixTrainer,
    path: Path,
) -> None:
    """The share of each source over the search, the largest changes in colour.

    Args:
        first: the shares before the search.
        history: the search's log, which may have no records of shares.
        trainer: has the shares after the search.
    """
    from matplotlib.figure import Figure

    names, last = list(first), trainer.shares()
    records = [record for record in history if f"lower_share_{names[0]}" in record]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    end = trainer.args.steps_of(len(trainer.data.everything))
    steps = [0, *(record["step"] for record in records), end]
    shares = {
        name: [first[name], *(record[f"lower_share_{name}"] for record in records), last[name]]
        for name in names
    }
    by_change = sorted(shares, key=lambda name: -abs(shares[name][-1] - shares[name][0]))
    for place, name in enumerate(by_change):
        named = place < NAMED
        style: dict[str, Any] = {} if named else {"color": "0.8", "linewidth": 0.8}
        axes.plot(steps, shares[name], label=name if named else None, zorder=2 + named, **style)
    axes.set_xlabel("step of the search")
    axes.set_ylabel("share in the training loss")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    figure.savefig(path, dpi=120)
