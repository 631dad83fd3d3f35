"""The run, Φ and the rows of a `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from tempfile import TemporaryDirectory
from typing import Any

import datasets
from transformers import (
    PrinterCallback,
    Trainer,
    enable_full_determinism,
    set_seed,
)
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hyperopt_peft.adapters import peft_internals
from hyperopt_peft.adapters.dora.fast import FastFullNorm
from hyperopt_peft.adapters.dora.variants import VARIANTS
from hyperopt_peft.attribution.evaluation import Evaluation
from hyperopt_peft.attribution.methods import Setting
from hyperopt_peft.attribution.recorder import Recorder, RowWeightedBiDoRA
from hyperopt_peft.attribution.rows import (
    INDEX,
    ModelOnRows,
    NumberedCollator,
    NumberedRows,
    RowWeighted,
)
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.problems.bidora_trainer import BiDoRATrainer
from hyperopt_peft.trainer.accumulation import Accumulated
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.checks import check_labels
from hyperopt_peft.trainer.data import label_column, require_examples, shared
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.trainer.upper_batches import loader_of
from hyperopt_peft.utils.random_state import RandomState

#: Methods of a Trainer that decide what is trained, beside the loss.
DECISIVE = (
    "create_optimizer",
    "create_scheduler",
    "get_decay_parameter_names",
    "get_optimizer_cls_and_kwargs",
    "get_train_dataloader",
    "_get_train_sampler",
    "get_batch_samples",
    "training_step",
)
logger = logging.get_logger(__name__)


def of_trainer(
    trainer: Any,
    evaluation: Any,
    slices: str | None,
    *,
    second_derivatives: bool,
    points: int | None,
    memory_limit: float,
    progress: bool,
) -> tuple[Setting, dict[str, Sequence[Any]]]:
    """Train what ``trainer`` trains, and return the run and the columns of the rows.

    Args:
        trainer: gives model, arguments, training set and collator; it is not trained itself.
        evaluation: the rows of Φ; by default ``trainer.eval_dataset``.
        slices: the column of ``evaluation`` that groups its rows.
        second_derivatives: whether the method differentiates gradients of the training loss.
        points: see `Run`.
        memory_limit: see `Run`.
        progress: whether to show a progress bar.

    Raises:
        ProblemError: see `attribute`.
    """
    if not isinstance(trainer, Trainer):
        raise ProblemError(
            f"training: must be a Problem or a transformers.Trainer, got {type(trainer).__name__}"
        )
    _check_run(trainer)
    upper = getattr(trainer, "upper", None) is not None
    train = trainer.examples if upper else trainer.train_dataset
    rows = _rows_of(trainer, train, "train_dataset")
    check_labels(trainer.model, train, {"data_collator": trainer.data_collator})
    given = trainer.eval_dataset if evaluation is None else evaluation
    above = _rows_of(trainer, given, "evaluation")
    common = shared(given, train)
    if given is train or common == len(above):
        raise ProblemError(
            "evaluation: every row of it is a training row too, and would explain itself; give "
            "rows that are not trained on"
        )
    if common:
        logger.warning("%d of %d evaluation rows are training rows too", common, len(above))
    groups = _groups(given, slices, len(above))
    collate = loader_of(trainer, trainer.train_dataset, "train_dataset").collate_fn
    model, random_state = _model(trainer)
    if second_derivatives:
        require_norm_in_graph(model)
    recorder = Recorder(len(rows), memory_limit, points)
    with TemporaryDirectory(prefix="attribution-") as folder:  # the user's has his checkpoints
        options = {
            "args": _arguments(trainer.args, folder, progress, bilevel=upper),
            "data_collator": NumberedCollator(collate),
            "processing_class": trainer.processing_class,
            "callbacks": [recorder],
            "optimizers": _optimizers(trainer),
            "optimizer_cls_and_kwargs": trainer.optimizer_cls_and_kwargs,
        }
        runner: BilevelTrainer
        if upper:
            runner = RowWeightedBiDoRA(model, recorder, **options, **_numbered(trainer, rows))
        else:
            runner = BilevelTrainer(
                model, lower=recorder.level, upper=None, train_dataset=rows, **options
            )
        runner.remove_callback(PrinterCallback)
        recorder.runner = runner
        if random_state is not None:
            random_state.restore()
        try:
            runner.train()
        except NonFiniteError as error:
            step = recorder.trainer.state.global_step + 1
            raise NonFiniteError(
                f"step {step}: {error.__cause__ or error}; lower the learning rate or max_grad_norm"
            ) from error
    trainer.state.global_step, trainer.state.epoch = runner.state.global_step, runner.state.epoch
    run = recorder.run
    assert run is not None
    reader = ModelOnRows(runner, collate)
    parts = {name: reader.parts(above, chosen) for name, chosen in groups.items()}
    setting = Setting(
        run,
        Evaluation(run.weights, parts),
        {name: len(chosen) / len(above) for name, chosen in groups.items()},
        Accumulated(RowWeighted(runner, run.weights, training=False)),
        lambda: reader.micro_batches(rows),
        measure=lambda test: reader.measure(_test_rows(trainer, test, train, given)),
        probabilities=lambda chosen: reader.probabilities(rows, chosen),
        labels=reader.labels(rows),
    )
    return setting, _columns(train)


def _check_run(trainer: Any) -> None:
    """Raise ProblemError where the trainer trains a loss or in a way that is not known here."""
    own = type(trainer).compute_loss not in (Trainer.compute_loss, BilevelTrainer.compute_loss)
    if own or trainer.compute_loss_func is not None or trainer.args.label_smoothing_factor:
        raise ProblemError(
            "training: the trainer has a loss of its own (compute_loss, compute_loss_func or label "
            "smoothing), whose share of each row is not known; use attribute with a level of your "
            "own"
        )
    if getattr(trainer, "upper", None) is not None and not isinstance(trainer, BiDoRATrainer):
        raise ProblemError(
            f"training: {type(trainer).__name__} has levels whose share of each row is not known; "
            "give a BiDoRATrainer, the trainer of one level, or an Engine with levels of your own"
        )
    for name in DECISIVE:
        module = getattr(getattr(trainer, name), "__module__", "").partition(".")[0]
        if module not in ("transformers", "hyperopt_peft"):
            raise ProblemError(
                f"training: {type(trainer).__name__} has a {name} of its own, which the recorded "
                "run would not call; give the arguments or the optimizers of a "
                "transformers.Trainer, or use attribute with a level of your own"
            )
    if trainer.args.neftune_noise_alpha is not None:
        raise ProblemError(
            "neftune_noise_alpha: the noise is of the Trainer's own run, and not of its "
            "repetitions; leave it out"
        )


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
            'or choose method="unrolled:product=difference", which is approximate'
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
            "training: the trainer has trained already, and the run has to begin where it began; "
            "give a new trainer, or one with model_init"
        )
    return trainer.model, None


def _optimizers(trainer: Any) -> tuple[Any, Any]:
    """The optimizer and the scheduler that the user gave; the Trainer makes those of model_init."""
    return (None, None) if trainer.model_init else (trainer.optimizer, trainer.lr_scheduler)


def _arguments(args: Any, folder: str, progress: bool, *, bilevel: bool) -> Any:
    """``args`` for a run that evaluates and reports nothing, and writes into ``folder``."""
    kind = type(args) if bilevel else BilevelTrainingArguments
    given = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
    known = {field.name for field in fields(kind)}
    given = {name: value for name, value in given.items() if name in known}
    return kind(
        **given
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


def _rows_of(trainer: Any, data: Any, name: str) -> NumberedRows:
    """``data`` with the columns that the model takes.

    Raises:
        ProblemError: no data, or data without a length or an index.
    """
    require_examples(name, data, by_index=True)
    if isinstance(data, datasets.Dataset) and trainer.args.remove_unused_columns:
        data = data.select_columns(loader_of(trainer, data, name).dataset.column_names)
    assert has_length(data)
    return NumberedRows(data)


def _numbered(trainer: Any, rows: NumberedRows) -> dict[str, Any]:
    """The data sets that ``trainer`` was given, with the numbers of their rows."""
    numbered = rows.data.add_column(INDEX, list(range(len(rows))))
    if trainer.given_upper is None:
        return {"train_dataset": numbered}
    first = len(trainer.train_dataset)
    return {
        "train_dataset": numbered.select(range(first)),
        "upper_dataset": numbered.select(range(first, len(rows))),
    }


def _test_rows(trainer: Any, test: Any, train: Any, evaluation: Any) -> NumberedRows:
    rows = _rows_of(trainer, test, "test")
    for name, data in (("training", train), ("evaluation", evaluation)):
        if common := len(rows) if test is data else shared(test, data):
            raise ProblemError(
                f"test: {common} of {len(rows)} rows are {name} rows too, which the scores have "
                "seen; remove them"
            )
    return rows


def _groups(data: Any, column: str | None, count: int) -> dict[str, list[int]]:
    """The rows of each value of ``column``."""
    if column is None:
        return {"all": list(range(count))}
    if not isinstance(data, datasets.Dataset) or column not in data.column_names:
        known = getattr(data, "column_names", type(data).__name__)
        raise ProblemError(f"slices: the evaluation rows have no column {column!r}, only {known}")
    groups: dict[str, list[int]] = {}
    for row, value in enumerate(data[column]):
        groups.setdefault(str(value), []).append(row)
    return groups


def _columns(data: Any) -> dict[str, Sequence[Any]]:
    """Text and labels of ``data``, to show."""
    if not isinstance(data, datasets.Dataset):
        return {}
    label = label_column(data)
    shown = {
        name: data[name][:]
        for name, feature in data.features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string") or name == label
    }
    if label and isinstance(data.features[label], datasets.ClassLabel):
        shown[label] = [data.features[label].int2str(value) for value in shown[label]]
    return shown
