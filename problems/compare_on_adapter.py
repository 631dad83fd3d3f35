"""The cross-validated trusted losses of the methods of an adapter, a training each."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hyperopt_peft.problems.fold_losses import FoldLosses
from hyperopt_peft.problems.mix_baselines import Baselines
from hyperopt_peft.problems.mix_plans import LEARNED, LEARNED_THEN
from hyperopt_peft.problems.mix_trainer import MixTrainer
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.fingerprint import data_fingerprint, weights_fingerprint


def losses_on_adapter(
    trainer: MixTrainer, fold_of_row: Tensor, *, equal_passes: bool, record: Path | None = None
) -> FoldLosses:
    """The losses of each method and number of steps.

    Args:
        trainer: as for `compare_baselines`.
        fold_of_row: the fold of each trusted row, ``(n,)``, from 0.
        equal_passes: as for `compare_baselines`.
        record: a file of lines, one for each finished training, in which a killed comparison of the
            same data, settings and initial values goes on.
    """
    result, data = FoldLosses(len(fold_of_row)), trainer.data
    with Baselines(trainer) as baselines:
        runs = runs_of(baselines, equal_passes=equal_passes)
        finished = _Record(record, _identity(trainer), writes=trainer.args.should_save)
        folds = fold_of_row.unique().tolist()
        works = [passes for _, passes in works_of(baselines, runs)]
        total, disable = len(folds) * sum(works), trainer.args.disable_tqdm
        with tqdm(total=total, desc="comparison, in passes", disable=disable) as bar:
            for fold in folds:
                judged = (fold_of_row == fold).nonzero().flatten()
                train = data.with_trusted((fold_of_row != fold).nonzero().flatten().tolist())
                rows = data.trusted.select(judged.tolist())
                for (method, steps), work in zip(runs, works, strict=True):
                    key = f"{fold} of {len(folds)}: {method}, {steps} steps"
                    if (known := finished.get(key)) is None:
                        passes = baselines.train(method, steps, train)
                        weights = baselines.row_weights if method == LEARNED else None
                        losses = baselines.losses(rows).tolist()
                        known = {"losses": losses, "passes": passes, "row_weights": weights}
                        finished.add(key, known)
                    run = (method, float(steps))
                    # The weights are those of `LEARNED`, which comes before.
                    search = trainer.search_passes() if method == LEARNED_THEN else 0
                    passes = known["passes"] + search
                    result.add(run, judged, torch.tensor(known["losses"]), passes)
                    if known["row_weights"]:
                        baselines.row_weights = known["row_weights"]
                        result.row_weights.append(known["row_weights"])
                    bar.update(work)
        baselines.restart()
        result.untrained = baselines.losses(data.trusted)
    return result


def runs_of(baselines: Baselines, *, equal_passes: bool) -> list[tuple[str, int]]:
    """Each method of a fold with its steps."""
    lengths = {baselines.steps}
    if equal_passes:
        lengths.add(math.ceil(baselines.passes / baselines.passes_of_a_step))
    simple = [each for each in baselines.methods if each not in (LEARNED, LEARNED_THEN)]
    runs = [(method, steps) for steps in sorted(lengths) for method in simple]
    return [*runs, (LEARNED, baselines.steps), (LEARNED_THEN, baselines.steps)]


def works_of(baselines: Baselines, runs: Sequence[tuple[str, int]]) -> list[tuple[int, int]]:
    """The trainings and the passes over a micro-batch of each of a fold's ``runs``.

    What several of them look at first is trained once.
    """
    works, known = [], set()
    for method, steps in runs:
        name, before = baselines.before(method)
        passes = baselines.passes_of(method, steps)
        if name in known:
            passes -= before * baselines.steps * baselines.passes_of_a_step
            before = 0
        known.add(name)
        works.append((before + 1, passes))
    return works


class _Record:
    """Results by name in a file of lines, of which those with another identity are not read."""

    def __init__(self, path: Path | None, identity: str, *, writes: bool) -> None:
        self.path, self.identity, self.writes = path, identity, writes
        self.known: dict[str, Any] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # a kill cut the last line
                    continue
                if entry["identity"] == identity:
                    self.known[entry["run"]] = entry["result"]

    def get(self, run: str) -> Any:
        return self.known.get(run)

    def add(self, run: str, result: Any) -> None:
        if self.path is not None and self.writes:
            entry = {"run": run, "result": result, "identity": self.identity}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(entry)}\n")


def _identity(trainer: MixTrainer) -> str:
    """The identity of the data, the settings and the initial values."""
    settings = BilevelTrainingArguments.resume_must_match(trainer.args)
    named = zip(map(str, range(len(trainer.initial))), trainer.initial, strict=True)
    frozen = ((n, p) for n, p in trainer.model.named_parameters() if not p.requires_grad)
    votes = trainer.data.trusted_votes
    parts = [
        data_fingerprint(trainer.data.everything),
        weights_fingerprint([("votes", votes)] if votes is not None else []),
        weights_fingerprint(named),
        weights_fingerprint(frozen),
        json.dumps(settings, sort_keys=True, default=str),
    ]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
