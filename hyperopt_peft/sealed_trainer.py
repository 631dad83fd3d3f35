"""What a `BilevelTrainer` writes: checkpoints to resume from bit by bit, settings, model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from hyperopt_peft import checkpoint, processes
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients import Estimator
from hyperopt_peft.problem import Problem
from hyperopt_peft.training_arguments import BilevelTrainingArguments

SETTINGS = "bilevel_settings.json"
LEVELS = "levels.safetensors"


class SealedTrainer(Trainer):
    """A `transformers.Trainer` of one or two levels whose checkpoints are whole or not used.

    To the Trainer's own files a checkpoint adds both levels' variables (one may be outside the
    model), what was not yet logged, and the hashes of all files, written last.
    """

    args: BilevelTrainingArguments
    lower: Problem
    upper: Problem | None
    upper_dataset: Any
    estimator: Estimator
    skipped: int
    _noted: dict[str, list[float]]  # numbers since the last log
    _window: (
        Mapping[str, Any] | None
    )  # what a checkpoint had not yet logged, until training goes on

    @property
    def _levels(self) -> list[Problem]:
        return [self.lower] if self.upper is None else [self.lower, self.upper]

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the run that resumes from it."""
        args = self.args
        return {
            "hypergradient": repr(self.estimator) if self.upper is not None else None,
            "lower_steps": args.lower_steps,
            "seed": args.seed,
            "optim": str(args.optim),
            "batch": [
                args.per_device_train_batch_size,
                args.per_device_upper_batch_size,
                args.gradient_accumulation_steps,
                processes.count(),
            ],
            "examples": [len(self.train_dataset), len(self.upper_dataset or ())]
            if hasattr(self.train_dataset, "__len__")
            else None,
            "variables": [
                {name: list(v.shape) for name, v in zip(level.names, level.variables, strict=True)}
                for level in self._levels
            ],
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output = Path(self._get_output_dir(trial=trial))
        folder = output / f"{checkpoint.PREFIX}{self.state.global_step}"
        record = {
            "settings": self.settings(),
            "skipped": self.skipped,
            "window": {
                "loss": float(self._tr_loss),
                "logged": self._globalstep_last_logged,
                "noted": self._noted,
            },
        }
        # Older checkpoints go when this one is whole, not before.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with checkpoint.writing(folder):
                if self.args.should_save:
                    # A folder that is written again is not whole until it has been.
                    (folder / checkpoint.SEAL).unlink(missing_ok=True)
                super()._save_checkpoint(model, trial)
                if self.args.should_save:
                    save_file(self._named_variables(), folder / LEVELS)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    checkpoint.seal(folder, record)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            checkpoint.rotate(output, limit, self.state.best_model_checkpoint)

    def _named_variables(self) -> dict[str, Tensor]:
        return {
            f"{key}.{name}": variable.detach().contiguous()
            for key, level in zip(("lower", "upper"), self._levels)
            for name, variable in zip(level.names, level.variables, strict=True)
        }

    def _resume(self, folder: Path) -> None:
        record = checkpoint.unseal(folder)
        known, now = record["settings"], json.loads(json.dumps(self.settings()))
        for key, value in now.items():
            if known.get(key) != value:
                raise ProblemError(
                    f"{folder} was made with {key}={known.get(key)!r}, this run has {value!r}; "
                    "resume with the same settings, or start a new run in another output_dir"
                )
        self._load_levels(folder)
        self.skipped, self._window = record["skipped"], record["window"]

    @torch.no_grad()
    def _load_levels(self, folder: Path) -> None:
        values = load_file(folder / LEVELS)
        for name, variable in self._named_variables().items():
            variable.copy_(values[name])

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            self._load_levels(Path(self.state.best_model_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            text = json.dumps(self.args.bilevel_settings(), indent=1)
            (Path(output_dir or self.args.output_dir) / SETTINGS).write_text(text)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As `transformers.Trainer.create_model_card`, with the bilevel settings and results."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            settings = {"levels": {x.name: len(x.variables) for x in self._levels}}
            lines = {**settings, **self.args.bilevel_settings()}.items()
            logs = [r for r in self.state.log_history if "loss" in r and "step" in r]
            keys = ("step", "loss", "upper_loss", "implicit_ratio", "residual")
            last = {key: logs[-1][key] for key in keys if logs and key in logs[-1]}
            with (Path(self.args.output_dir) / "README.md").open("a") as file:
                file.write("\n\n## Bilevel training\n\nTrained with hyperopt-peft.\n\n")
                file.writelines(f"- {key}: {value}\n" for key, value in lines)
                file.writelines(f"- last {key}: {value}\n" for key, value in last.items())
