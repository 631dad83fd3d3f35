"""What a `BilevelTrainer` writes: checkpoints to resume from bit by bit, settings, model card."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from hyperopt_peft.core.problem import Problem, devices_of
from hyperopt_peft.engine import checkpoint
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients import Estimator
from hyperopt_peft.hypergradients.oracle import State
from hyperopt_peft.hypergradients.state import packed, unpacked
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.epoch_begin import EpochBegin
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.distributed import full, sharded_like

SETTINGS = "bilevel_settings.json"
LEVELS = "levels.safetensors"
ESTIMATOR = "estimator.pt"
# Not the optimizer's, for which FSDP has a name of its own.
NEEDED = (LEVELS, ESTIMATOR, "scheduler.pt", "trainer_state.json")
# These take effect at once when a run goes on, or are compared as part of another entry; all others
# are part of what is being trained.
FREE = ("non_finite", "upper_max_grad_norm", "upper_fraction", "per_device_upper_batch_size")


class GoOn(TrainerCallback):
    """Restores what was not yet logged, which the Trainer sets to zero."""

    def __init__(self, trainer: SealedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Where a checkpoint is resumed, set what it had not yet logged."""
        if self.trainer._window is not None:
            self.trainer._set_unlogged(self.trainer._window)
            self.trainer._window = None


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
    optimizer: Any
    current_flos: float
    _tr_loss: Tensor
    _total_loss_scalar: float
    _noted: dict[str, list[float]]  # numbers since the last log
    _kept: State  # by the estimator, since the last upper step
    _packed: Mapping[str, Any] | None  # the same in a checkpoint, until it is asked for
    _epoch: EpochBegin
    _signalled: bool  # whether a checkpoint was asked for by SIGTERM, which ends the run
    _window: Mapping[str, Any] | None  # what was not yet logged, of the checkpoint to go on from

    @property
    def _levels(self) -> list[Problem]:
        return [self.lower] if self.upper is None else [self.lower, self.upper]

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the run that resumes from it."""
        args = self.args
        own = args.bilevel_settings().items()
        return {
            **{k: v for k, v in own if k not in FREE and not k.startswith("retrain")},
            "hypergradient": repr(self.estimator) if self.upper is not None else None,
            "learning_rate": args.learning_rate,
            "weight_decay": args.weight_decay,
            "seed": args.seed,
            "optim": str(args.optim),
            "batch": [
                args.per_device_train_batch_size,
                args.per_device_upper_batch_size,
                args.gradient_accumulation_steps,
                distributed.count(),
            ],
            "examples": [len(self.train_dataset), len(self.upper_dataset or ())]
            if hasattr(self.train_dataset, "__len__")
            else None,
            "variables": [
                {name: list(v.shape) for name, v in zip(level.names, level.variables, strict=True)}
                for level in self._levels
            ],
        }

    def _average_notes(self) -> None:
        """Take means over the processes of what each has noted: a level's metrics are its own."""
        notes = {(k, i): v for k, values in self._noted.items() for i, v in enumerate(values)}
        self._noted = {}
        for (key, _), value in distributed.averages(notes).items():
            self._noted.setdefault(key, []).append(value)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._average_notes()
        output = Path(self._get_output_dir(trial=trial))
        folder = output / f"{checkpoint.PREFIX}{self.state.global_step}"
        record = {
            "settings": self.settings(),
            "skipped": self.skipped,
            "window": {**self._unlogged(), "loss": float(self._tr_loss)},
        }
        self._signalled |= (folder / checkpoint.INCOMPLETE).exists()
        # Older checkpoints go when this one is whole, not before.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with checkpoint.writing(folder):
                if self.args.should_save:
                    # A folder that is written again is not whole until it has been.
                    (folder / checkpoint.SEAL).unlink(missing_ok=True)
                super()._save_checkpoint(model, trial)
                values = {n: full(v.detach()).contiguous() for n, v in self._named_variables()}
                kept = packed(self._kept) if self._packed is None else self._packed
                self._epoch.write(folder)
                if self.args.should_save:
                    save_file(values, folder / LEVELS)
                    torch.save(kept, folder / ESTIMATOR)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    checkpoint.seal(folder, record)
        finally:
            self.args.save_total_limit = limit
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            checkpoint.rotate(output, limit, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The Trainer asks for it when its own files are written.
        if (Path(checkpoint_folder) / checkpoint.SEAL).is_file():
            super()._push_from_checkpoint(checkpoint_folder)

    def _unlogged(self) -> dict[str, Any]:
        """What the next log is made of, and the last: copies."""
        return {
            "loss": self._tr_loss.clone(),
            "total": self._total_loss_scalar,
            "logged": self._globalstep_last_logged,
            "noted": {key: list(values) for key, values in self._noted.items()},
        }

    def _set_unlogged(self, window: Mapping[str, Any]) -> None:
        self._tr_loss = torch.zeros_like(self._tr_loss) + window["loss"]
        self._total_loss_scalar = window["total"]
        self._globalstep_last_logged = window["logged"]
        self._noted = {key: list(values) for key, values in window["noted"].items()}

    def _init_training_state(
        self, max_steps: int, per_epoch: int, epochs: int, folder: str | None, trial: Any
    ) -> tuple[int, int]:
        """The epoch, and how many of its batches were taken; a stream may have begun again."""
        epoch, batches = super()._init_training_state(max_steps, per_epoch, epochs, folder, trial)
        if folder is not None and batches and not has_length(self.train_dataset):
            begin = EpochBegin.read(Path(folder))
            steps = self.state.global_step - begin.step
            epoch, batches = begin.epoch, steps * self.args.gradient_accumulation_steps
        return epoch, batches

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed at its end, where the Trainer would take one more step.
            self.control.should_training_stop = True
            return
        epoch, folder = kwargs["epoch"], kwargs["resume_from_checkpoint"]
        resumed = folder is not None and epoch == kwargs["epochs_trained"]
        if resumed and kwargs["steps_trained_in_current_epoch"]:
            self._epoch = EpochBegin.read(Path(folder))
            self._epoch.random_state.restore()
        else:
            if resumed:
                self._load_rng_state(folder)
            self._epoch = EpochBegin.now(epoch, self.state.global_step, devices_of(*self._levels))
        super()._run_epoch(**kwargs)

    def _named_variables(self) -> list[tuple[str, Tensor]]:
        return [
            (f"{key}.{name}", variable)
            for key, level in zip(("lower", "upper"), self._levels)
            for name, variable in zip(level.names, level.variables, strict=True)
        ]

    def _resume(self, folder: Path, record: Mapping[str, Any]) -> None:
        if missing := {"settings", "skipped", "window"} - record.keys():
            raise ProblemError(f"{folder / checkpoint.SEAL} is damaged: it lacks {sorted(missing)}")
        for name in NEEDED:
            if not (folder / name).is_file():
                raise ProblemError(
                    f"{folder} was written without {name} (save_only_model?): there is nothing to "
                    "resume from; use an earlier checkpoint, or start a new run"
                )
        known, now = record["settings"], json.loads(json.dumps(self.settings()))
        for key, value in now.items():
            if known.get(key) != value:
                raise ProblemError(
                    f"{folder} was made with {key}={known.get(key)!r}, this run has {value!r}; "
                    "resume with the same settings, or start a new run in another output_dir"
                )
        self._packed = checkpoint.read_state(folder / ESTIMATOR)
        self.skipped, self._window = record["skipped"], record["window"]

    def _estimator_state(self) -> State:
        if self._packed is not None:
            self._kept = unpacked(self._packed, self.lower.variables)
            self._packed = None
        return self._kept

    @torch.no_grad()
    def _load_levels(self, folder: Path) -> None:
        values = load_file(folder / LEVELS)
        for name, variable in self._named_variables():
            variable.copy_(sharded_like(values[name], variable))

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        checkpoint.unseal(best)
        super()._load_best_model()
        self._load_levels(best)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            text = json.dumps(self.args.bilevel_settings(), indent=1)
            (Path(output_dir or self.args.output_dir) / SETTINGS).write_text(text)

    def end_training(self) -> None:
        """Leave the other processes, after all else: the last line of a script.

        A process that exits while threads of gloo hold its tensors is aborted; they end with the
        process group. DDP goes first: where it is the last to hold the group, Python waits for
        those threads, and they for Python.
        """
        self._release_models()
        gc.collect()
        self.accelerator.end_training()

    def _release_models(self) -> None:
        """Let go of what `accelerate` wrapped the model in."""
        self.model_wrapped = self.model
        self.accelerator.free_memory()

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
