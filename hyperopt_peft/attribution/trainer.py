"""The run, Φ and the rows of a `transformers.Trainer`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from itertools import count
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import ConcatDataset
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    enable_full_determinism,
    set_seed,
)

from hyperopt_peft.adapters import peft_internals
from hyperopt_peft.adapters.dora.fast import FastFullNorm
from hyperopt_peft.adapters.dora.variants import VARIANTS
from hyperopt_peft.attribution.evaluation import Evaluation
from hyperopt_peft.attribution.own_loss import OWN_LOSS, has_own_loss, require_mean_over_labels
from hyperopt_peft.attribution.recorder import Recorder, RowWeightedBiDoRA
from hyperopt_peft.attribution.rows import (
    INDEX,
    ModelOnRows,
    NumberedCollator,
    NumberedRows,
    RowWeighted,
)
from hyperopt_peft.attribution.run import Run
from hyperopt_peft.attribution.scores import RetrainingSetup
from hyperopt_peft.attribution.trainer_data import TrainerData, level_count, shown_columns
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.problems.bidora import BiDoRA
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.step import Accumulated
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.precision import require_float32
from hyperopt_peft.utils.random_state import RandomState

#: Libraries whose own methods of these names train as the recorded run does, if the loss agrees.
KNOWN_LIBRARIES = ("transformers", "trl", "hyperopt_peft")
#: Methods of a Trainer that decide what is trained and that the recorded run does not call.
UNSUPPORTED_OVERRIDES = (
    "create_optimizer",
    "create_scheduler",
    "get_decay_parameter_names",
    "get_optimizer_cls_and_kwargs",
    "get_train_dataloader",
    "_get_train_sampler",
    "get_batch_samples",
    "training_step",
)


class _Bar(ProgressCallback):
    """A progress bar alone."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing."""


def setup_from_trainer(
    trainer: Any,
    evaluation: Any,
    slices: str | None,
    *,
    second_derivatives: bool,
    differentiated: bool,
    memory_limit: float,
    progress: bool,
) -> tuple[RetrainingSetup, dict[str, Sequence[Any]]]:
    """Train what ``trainer`` trains, and return its run, Φ and the columns of the rows.

    ``trainer`` gives model, arguments, training set and collator; ``second_derivatives`` says
    whether the estimator differentiates gradients of the training loss. All else is as in
    `attribute` and `Run`.
    """
    _check_trainer(trainer)
    data = TrainerData.read(trainer, evaluation, slices)
    model, random_state = _model(trainer)
    require_float32(model)
    if has_own_loss(trainer):
        require_mean_over_labels(trainer, data)
    if second_derivatives:
        require_norm_in_graph(model)
    recorder = Recorder(
        len(data.train_rows), memory_limit, differentiated=differentiated, twice=second_derivatives
    )
    with TemporaryDirectory(prefix="attribution-") as folder:  # the user's has his checkpoints
        runner = _runner(trainer, model, recorder, data, _arguments(trainer, folder, progress))
        _train(runner, recorder, random_state)
    trainer.state.global_step, trainer.state.epoch = runner.state.global_step, runner.state.epoch
    return _setup(trainer, runner, recorder, data), shown_columns(data.train)


def _runner(
    trainer: Any, model: Any, recorder: Recorder, data: TrainerData, args: Any
) -> BilevelTrainer:
    """A Trainer of ``model`` whose loss has a weight for each row, and whose steps are recorded."""
    options = {
        "args": args,
        "data_collator": NumberedCollator(data.collate),
        "processing_class": trainer.processing_class,
        "callbacks": [recorder],
        "optimizers": _optimizers(trainer),
        "optimizer_cls_and_kwargs": trainer.optimizer_cls_and_kwargs,
    }
    runner: BilevelTrainer
    if level_count(trainer) == 1:
        runner = BilevelTrainer(
            model, lower=recorder.level, upper=None, train_dataset=data.train_rows, **options
        )
    else:
        datasets_ = _datasets(trainer, data.train_rows)
        runner = RowWeightedBiDoRA(model, recorder, method=trainer.method, **options, **datasets_)
    for kind in (PrinterCallback, ProgressCallback):
        runner.remove_callback(kind)
    if not args.disable_tqdm:
        runner.add_callback(_Bar)
    recorder.runner = runner
    return runner


def _train(runner: BilevelTrainer, recorder: Recorder, random_state: RandomState | None) -> None:
    """Train from ``random_state``, None for the present one.

    Raises:
        NonFiniteError: the run diverges; the message names the step.
    """
    if random_state is not None:
        random_state.restore()
    begin = time.perf_counter()
    try:
        runner.train()
    except NonFiniteError as error:
        step = recorder.trainer.state.global_step + 1
        raise NonFiniteError(
            f"step {step}: {error.__cause__ or error}; lower the learning rate or max_grad_norm"
        ) from error
    assert recorder.run is not None
    recorder.run.settings["seconds"] = time.perf_counter() - begin


def _setup(
    trainer: Any, runner: BilevelTrainer, recorder: Recorder, data: TrainerData
) -> RetrainingSetup:
    """The run of ``recorder``, and Φ at its end."""
    run, reader = recorder.run, ModelOnRows(runner, data.collate)
    assert run is not None
    size = len(data.evaluation_rows)
    losses = {name: reader.losses(data.evaluation_rows, rows) for name, rows in data.groups.items()}
    return RetrainingSetup(
        run,
        Evaluation(run.weights, losses),
        {name: len(rows) / size for name, rows in data.groups.items()},
        Accumulated(RowWeighted(runner, run.weights, training=False, twice=recorder.twice)),
        lambda: reader.micro_batches(data.train_rows),
        measure=lambda test: reader.measure(data.test_rows(trainer, test)),
        enlarged=partial(_enlarged, run, reader, data) if len(run.levels) == 1 else None,
        probabilities=lambda rows: reader.probabilities(data.train_rows, rows),
        labels=reader.labels(data.train_rows),
    )


@contextmanager
def _enlarged(run: Run, reader: ModelOnRows, data: TrainerData, seed: int) -> Iterator[None]:
    """The run on training and evaluation rows, in a new order, with as many visits of rows."""
    rows: Any = ConcatDataset([data.train_rows, data.evaluation_rows])
    generator = torch.Generator().manual_seed(seed)
    first, every = distributed.rank(), distributed.world_size()
    order = (
        row
        for _ in count()
        for row in torch.randperm(len(rows), generator=generator).tolist()[first::every]
    )
    steps = run.steps
    run.steps = [reader.on_rows(step, rows, order) for step in steps]
    try:
        with run.repeated(run.row_weights):
            yield
    finally:
        run.steps = steps


def require_trainer(trainer: Any) -> None:
    """Raise ProblemError for something else than a `transformers.Trainer`."""
    if not isinstance(trainer, Trainer):
        raise ProblemError(
            f"training: must be a Problem or a transformers.Trainer, got {type(trainer).__name__}"
        )


def _check_trainer(trainer: Any) -> None:
    """Raise ProblemError where the trainer trains a loss or in a way that is not known here."""
    require_trainer(trainer)
    if trainer.compute_loss_func is not None or trainer.args.label_smoothing_factor:
        raise ProblemError(f"compute_loss_func, label_smoothing_factor: {OWN_LOSS}")
    known = isinstance(getattr(trainer, "method", None), BiDoRA) and trainer.parent() is Trainer
    if level_count(trainer) == 2 and not known:
        raise ProblemError(
            f"training: {type(trainer).__name__} has levels whose share of each row is not known; "
            "give one with the method BiDoRA, the trainer of one level, or an Engine with levels "
            "of your own"
        )
    for name in UNSUPPORTED_OVERRIDES:
        module = getattr(getattr(trainer, name), "__module__", "").partition(".")[0]
        if module not in KNOWN_LIBRARIES:
            raise ProblemError(
                f"training: {type(trainer).__name__} has a {name} of its own, which the recorded "
                "run would not call; give the arguments or the optimizers of a "
                "transformers.Trainer, or use attribute with a level of your own"
            )
    refused = {
        "neftune_noise_alpha": "the noise is of the Trainer's own run, and not of its repetitions",
        "packing": "a pack is one row of many texts, which would share a score",
        "activation_offloading": "the recorded run keeps activations on the device",
    }
    for name, reason in refused.items():
        if getattr(trainer.args, name, None):
            raise ProblemError(f"{name}: {reason}; leave it out")


def require_norm_in_graph(model: Any) -> None:
    """Raise ProblemError where a DoRA layer leaves its norm out of the gradient, as PEFT's do.

    Such a gradient is that of no function, and double backward does not give its derivative.
    """
    full: tuple[Any, ...] = (FastFullNorm, *(variant for _, variant in VARIANTS.values()))
    detached = [
        name
        for name, module in model.named_modules()
        if getattr(module, "lora_magnitude_vector", None)
        and not all(isinstance(variant, full) for variant in peft_internals.variants(module))
    ]
    if detached:
        raise ProblemError(
            f"training: {len(detached)} DoRA layers, such as {detached[0]}, leave their norm out "
            "of the gradient; call hyperopt_peft.adapters.use_fast_dora(model) before training, "
            'or choose estimator="unrolled:product=difference", which is approximate'
        )


def _model(trainer: Any) -> tuple[Any, RandomState | None]:
    """The model that ``trainer.train()`` would train, and the random state it would begin with.

    With ``model_init`` the Trainer makes the model after it has set its seed; otherwise training
    begins with the random state that the construction of a Trainer leaves, here None.
    """
    if trainer.model_init is not None:
        seed = trainer.args.seed
        enable_full_determinism(seed) if trainer.args.full_determinism else set_seed(seed)
        trainer.model = trainer.model_wrapped = trainer.call_model_init().to(trainer.args.device)
        return trainer.model, RandomState.capture([trainer.args.device])
    if trainer.state.global_step:
        raise ProblemError(
            "training: attribute() must see training from its first step; give a new trainer, or "
            "one with model_init"
        )
    return trainer.model, None


def _optimizers(trainer: Any) -> tuple[Any, Any]:
    """The optimizer and the scheduler that the user gave; the Trainer makes those of model_init."""
    return (None, None) if trainer.model_init else (trainer.optimizer, trainer.lr_scheduler)


def _arguments(trainer: Any, folder: str, progress: bool) -> Any:
    """Arguments of a run that evaluates and reports nothing, and writes into ``folder``."""
    args = trainer.args
    kind = BilevelTrainingArguments if level_count(trainer) == 1 else type(args)
    names = {field.name for field in fields(args) if field.init}
    names &= {field.name for field in fields(kind)}
    return kind(
        **{name: getattr(args, name) for name in names}
        | {
            "output_dir": folder,
            "save_strategy": "no",
            "eval_strategy": "no",
            "eval_on_start": False,
            "logging_first_step": False,
            "load_best_model_at_end": False,
            "push_to_hub": False,
            "report_to": "none",
            "logging_strategy": "no",
            "remove_unused_columns": False,
            "disable_tqdm": not progress,
        }
    )


def _datasets(trainer: Any, rows: NumberedRows) -> dict[str, Any]:
    """The data sets that a trainer of two levels was given, with the numbers of their rows."""
    numbered = rows.data.add_column(INDEX, list(range(len(rows))))
    if trainer._rows[1] is None:
        return {"train_dataset": numbered}
    first = len(trainer.train_dataset)
    return {
        "train_dataset": numbered.select(range(first)),
        "upper_dataset": numbered.select(range(first, len(rows))),
    }
