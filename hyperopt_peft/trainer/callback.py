"""`BilevelCallback`: the files of two levels in the checkpoints of `transformers.Trainer`."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from hyperopt_peft.adapters.layers import keep_active
from hyperopt_peft.engine import checkpoint
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.data import passes
from hyperopt_peft.trainer.internals import NEEDED, counters_of
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.distributed import gather, sharded_like
from hyperopt_peft.utils.random_state import RandomState
from hyperopt_peft.utils.validation import require_settings

#: The checkpoint from which a run resumes, its folder and record, or None.
Point = tuple[Path, Mapping[str, Any]] | None
LEVELS, ESTIMATOR = "levels.safetensors", "estimator.pt"
logger = logging.getLogger(__name__)


class BilevelCallback(TrainerCallback):
    """Writes and restores the files that bilevel training adds to a checkpoint.

    These are the variables of both levels (a level may own tensors outside the model), the
    estimator's state, the random states of each process (now and at the beginning of the epoch),
    and the manifest: settings and hashes of all files, written last. The callback stores no state
    in ``trainer_state.json``, because the Trainer would rebuild it from there without ``trainer``,
    the `BilevelTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.writing: Path | None = None  # a checkpoint without its manifest
        self.signalled = False  # whether SIGTERM asked for a checkpoint and ended the run

    @contextmanager
    def run(self, point: Point, settings: Mapping[str, Any]) -> Iterator[None]:
        """Train in the body, from ``point``; checkpoints have ``settings``, and must agree."""
        self.writing, self.signalled = None, False
        self.resumed = None if point is None else point[0]
        self.settings = settings
        self.activate = keep_active(self.trainer.model)
        self.save_total_limit = self.trainer.args.save_total_limit
        if point is not None:
            self._check(*point)
        try:
            yield
        except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            if self.writing is not None:
                raise checkpoint.failed(self.writing, error) from error
            if isinstance(error, SafetensorError | pickle.UnpicklingError):
                raise ProblemError(
                    "the checkpoint: a file is damaged or would run code, and was not loaded "
                    f"({error}); use an earlier checkpoint"
                ) from error
            raise
        finally:
            self.trainer.args.save_total_limit = self.save_total_limit

    def _check(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Raise ProblemError unless the run can resume from the checkpoint ``folder``."""
        for name in (LEVELS, ESTIMATOR, *NEEDED):
            if not (folder / name).is_file():
                raise ProblemError(
                    f"{folder}: written without {name} (save_only_model?); use an earlier "
                    "checkpoint, or start a new run"
                )
        require_settings(str(folder), record["settings"], "this run", self.settings)
        self.trainer.skipped = record["skipped"]
        logger.warning("resuming from %s", folder)

    def write(self, folder: Path) -> None:
        """Write the levels' files into ``folder``; `complete` adds the manifest later."""
        trainer, args = self.trainer, self.trainer.args
        self.writing = folder
        folder.mkdir(parents=True, exist_ok=True)
        if args.should_save:
            (folder / checkpoint.MANIFEST).unlink(missing_ok=True)
        values = {n: gather(x.detach()).contiguous() for n, x in trainer.named_tensors()}
        step = trainer.current_step.bilevel
        state = {} if step is None else step.state_dict()
        if args.should_save:
            save_file(values, folder / LEVELS)
            torch.save(state, folder / ESTIMATOR)
        now = RandomState.capture(trainer.current_step.devices)
        position = {"step": self.epoch_step, "epoch": dict(self.epoch_random.states)}
        position |= {"counters": counters_of(trainer), **trainer.passes.read()}
        torch.save({**position, "now": dict(now.states)}, _position(folder))

    def complete(self) -> None:
        """Write the manifest of the last checkpoint, then delete older checkpoints."""
        trainer, args, folder = self.trainer, self.trainer.args, self.writing
        if folder is None:
            return
        trainer.accelerator.wait_for_everyone()
        if args.should_save:
            checkpoint.write_manifest(
                folder, {"settings": self.settings, "skipped": trainer.skipped}
            )
        self.writing = None
        args.save_total_limit = self.save_total_limit
        if args.should_save:
            best = trainer.state.best_model_checkpoint
            checkpoint.rotate(folder.parent, self.save_total_limit, best)

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Restore the levels, after the Trainer has prepared model and optimizer."""
        self.activate()
        self.trainer.adopt_prepared_parameters()
        if self.resumed is not None:
            # A variable need not be a parameter of the model.
            self._load_levels(self.resumed)
            position = checkpoint.read_state(_position(self.resumed))
            self.trainer.passes.begin(position["passes"], position["seconds"])
            if (step := self.trainer.current_step.bilevel) is not None:
                step.load_state_dict(checkpoint.read_state(self.resumed / ESTIMATOR))

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Record the random states at the epoch's beginning; a resumed epoch restores them."""
        done = state.global_step
        if done >= state.max_steps:  # resumed at the end, where the Trainer takes one more step
            control.should_training_stop = True
        folder, self.resumed = self.resumed, None
        self.epoch_step = done
        read = 0  # batches
        if folder is not None:
            position = checkpoint.read_state(_position(folder))
            vars(self.trainer).update(position["counters"])
            steps = state.max_steps
            if has_length(train_dataloader):
                steps = -(-len(train_dataloader) // args.gradient_accumulation_steps)
            if position["step"] not in (done - done % steps, done - (done % steps or steps)):
                logger.warning(
                    "%s: an epoch ended early (should_epoch_stop), so the resumed run reads the "
                    "data in another order than an uninterrupted run",
                    folder,
                )
            within = done % steps > 0 and not args.ignore_data_skip
            RandomState(position["epoch" if within else "now"]).restore()
            if within:
                self.epoch_step = position["step"]
                read = (done - position["step"]) * args.gradient_accumulation_steps
            if hasattr(train_dataloader, "set_epoch"):  # accelerate's skip_first_batches forgets it
                train_dataloader.set_epoch(done // steps)
        self.epoch_random = RandomState.capture(self.trainer.current_step.devices)
        # The Trainer's own iterator ends with the stream, and skips no batches beyond that.
        endless = None if has_length(train_dataloader) else passes(train_dataloader)
        self.batches = endless and islice(endless, read, None)

    def on_save(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Write the manifest, after the Trainer has written its files."""
        self.complete()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the levels' values of the best model, after the Trainer has loaded that."""
        self._complete_on_signal(args, state, control)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = Path(state.best_model_checkpoint)
            checkpoint.verify_manifest(best)
            self.activate()
            self._load_levels(best)

    def _complete_on_signal(
        self, args: object, state: object, control: object, **kwargs: Any
    ) -> None:
        # On SIGTERM the Trainer writes a checkpoint in any of these events and skips `on_save`.
        if self.writing is not None:
            self.complete()
            self.signalled = True

    on_step_end = on_epoch_end = _complete_on_signal

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the step's gradients; the Trainer's clipping, just before, has seen none."""
        self._complete_on_signal(args, state, control)
        self.trainer.current_step.return_gradients()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin an optimizer step of both levels."""
        self._complete_on_signal(args, state, control)
        self.trainer.begin_step()

    def on_optimizer_step(
        self, args: object, state: object, control: object, **kwargs: Any
    ) -> None:
        """Let the method change the upper variables after an upper step."""
        if self.trainer.method is not None and self.trainer.current_step.upper:
            self.trainer.method.project()

    @torch.no_grad()
    def _load_levels(self, folder: Path) -> None:
        values = load_file(folder / LEVELS)
        for name, tensor in self.trainer.named_tensors():
            tensor.copy_(sharded_like(values[name], tensor))


def _position(folder: Path) -> Path:
    return folder / f"epoch_{distributed.rank()}.pt"
