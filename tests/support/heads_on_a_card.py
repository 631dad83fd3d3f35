"""Scores, reasons and a comparison on heads, by a device that a Trainer has; run as a script."""

import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import Trainer, TrainingArguments

from hyperopt_peft import BilevelTrainingArguments, attribute, why
from hyperopt_peft.comparison import Runs, compare_heads
from hyperopt_peft.problems import Agreement, RowWeights, Sources
from tests.support.other_device import CARD, card
from tests.support.sources import rows, sources
from tests.support.trainers import base_model, data


def results(folder: Path) -> dict[str, Any]:
    args = TrainingArguments(str(folder), report_to="none")
    sets = {"train_dataset": data("classes", 14), "eval_dataset": data("classes", 7, seed=1)}
    trainer = Trainer(base_model(), args, **sets)
    scored = attribute(trainer, model="head", progress=False)
    methods = {"rows": RowWeights(), "sources": Sources(), "vote": Agreement()}
    compared = compare_heads(
        methods,
        partial(base_model, dropout=0.0),
        BilevelTrainingArguments(str(folder), report_to="none"),
        train_dataset=sources(8),
        upper_dataset=rows(8, 3),
        test_dataset=rows(12, 4),
        seeds=[0, 1],
        runs=Runs(progress=False),
    )
    return {
        "scores": scored.scores,
        "losses": scored.losses,
        "check": scored.check(5, share=0.2).actual,
        "suspects": scored.suspects(folds=2).probabilities,
        "reasons": [reason.rows for reason in why(trainer, progress=False)],
        "compared": torch.tensor([compared.scores()[name].tolist() for name in methods]),
    }


def main() -> None:
    """Write the `results` on the CPU, and on a device that mixes with no other."""
    folder = Path(sys.argv[1])
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    made = []
    for device in (torch.device("cpu"), CARD):
        read = property(lambda args, device=device: args._setup_devices and device)
        place = mock.patch.object(TrainingArguments, "device", read)
        with place, card():
            made.append(results(folder))
    torch.save(made, folder / "results.pt")


if __name__ == "__main__":
    main()
