"""Trains and records what a `transformers.Trainer` trains; returns the run and Φ."""

from __future__ import annotations

from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from transformers import EarlyStoppingCallback, Trainer, enable_full_determinism, set_seed
from transformers.utils import logging

from hyperopt_peft.adapters import peft_internals
from hyperopt_peft.attribution.recorder import method_of, recorded
from hyperopt_peft.attribution.rows import ModelOnRows, TrainerData, classes_of_rows
from hyperopt_peft.attribution.scores import Evaluation, Trained
from hyperopt_peft.core.labels import RowLosses
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.method import Method
from hyperopt_peft.trainer.own_loss import BATCHES, require_row_losses
from hyperopt_peft.trainer.quiet import quiet
from hyperopt_peft.trainer.step import Accumulated
from hyperopt_peft.utils.precision import require_float32
from hyperopt_peft.utils.random_state import RandomState

logger = logging.get_logger(__name__)
#: Methods of a Trainer that decide how it trains, but which the recorded run does not call. Those
#: of these libraries train as the recorded run does, if the loss agrees.
KNOWN_LIBRARIES = ("transformers", "trl", "hyperopt_peft")
UNSUPPORTED_OVERRIDES = (
    *("create_optimizer", "get_optimizer_cls_and_kwargs", "get_decay_parameter_names"),
    *("create_scheduler", "get_train_dataloader", "_get_train_sampler", "get_batch_samples"),
    *("training_step", "_prepare_inputs", "_prepare_input"),
)


def trained_by_trainer(
    trainer: Any,
    evaluation: Any,
    *,
    twice: bool,
    progress: bool,
    row_losses: RowLosses | None,
    **options: Any,
) -> Trained:
    """Train what ``trainer`` trains, and return its run and Φ; see `attribute` and `recorded`."""
    require_attributable(trainer)
    warn_of_uncalled(trainer)
    data = TrainerData(trainer, evaluation)
    random_state = _new_model(trainer)
    require_float32(trainer.model)
    require_losses_of_rows(trainer, data, row_losses)
    if twice:
        require_norm_in_graph(trainer.model)
    with TemporaryDirectory(prefix="attribution-") as folder:  # apart from the user's checkpoints
        changes = {"remove_unused_columns": False, "disable_tqdm": not progress}
        args = quiet(trainer.args, folder, BilevelTrainingArguments, **changes)
        runner = recorded(trainer, args, data, options, twice=twice, rule=row_losses)
        if random_state is not None:
            random_state.restore()
        runner.train()
    run = runner.recording.run
    assert run is not None
    run.settings["seconds"] = runner.passes.read()["seconds"]
    trainer.state.global_step, trainer.state.epoch = runner.state.global_step, runner.state.epoch
    batches = data.batches
    passes = runner.compute_loss_context_manager, runner.tags, row_losses
    model = ModelOnRows(runner.model, *passes)
    final = method_of(runner).lower(runner.model, partial(runner.task_loss, training=False))
    return Trained(
        run,
        Evaluation(run.weights, model.mean(batches(data.evaluation_rows))),
        Accumulated(final),
        lambda: model.micro_batches(batches(data.train_rows)),
        probabilities=lambda rows: model.probabilities(batches(data.train_rows, rows)),
        labels=classes_of_rows(batches(data.train_rows)),
        columns=data.shown[0],
        progress=progress,
    )


def require_trainer(trainer: Any) -> None:
    """Raise ProblemError unless ``trainer`` is a Trainer, with a method if it is a bilevel one."""
    name = type(trainer).__name__
    if not isinstance(trainer, Trainer):
        raise ProblemError(f"training: must be a Problem or a transformers.Trainer, got {name}")
    if getattr(trainer, "method", trainer) is None:
        raise ProblemError(
            f"training: {name} has levels without a loss for each row; give it a method, or use a "
            "level of your own"
        )


def rule_of(trainer: Any, given: RowLosses | None) -> RowLosses | None:
    """The rule ``given`` for losses of rows, or that of a bilevel ``trainer``."""
    return given or getattr(getattr(trainer, "phase", None), "row_losses", None)


def require_losses_of_rows(trainer: Any, data: TrainerData, rule: RowLosses | None) -> None:
    """Raise ProblemError unless the loss of ``trainer`` is known, or ``rule`` gives it by row."""
    size = trainer.args.per_device_train_batch_size
    first = range(len(data.train_rows))[: size * BATCHES]
    chosen = [first[k : k + size] for k in first[::size]]
    batches = [data.batches(data.train_rows, rows)[0] for rows in chosen if rule is not None]
    require_row_losses(trainer, rule, batches, data.collate.tags)


def require_attributable(trainer: Any) -> None:
    """Raise ProblemError if the trainer has trained, or if the recorded run would differ."""
    require_trainer(trainer)
    if getattr(trainer, "upper", None) is not None:
        raise ProblemError(
            "training: has two levels, and rows have scores for the training of one; give a method "
            'without upper level, such as lora or dora, or model="head"'
        )
    if trainer.state.global_step and trainer.model_init is None:
        raise ProblemError(
            "training: attribute() must see training from its first step; give a new trainer, or "
            "one with model_init"
        )
    method = method_of(trainer)
    for name in ("finish", "export"):
        if getattr(type(method), name) is not getattr(Method, name):
            raise ProblemError(
                f"training: {type(method).__name__}.{name} changes the model during the run, and "
                "its derivative is not known; give a method without it"
            )
    for name in UNSUPPORTED_OVERRIDES:
        module = getattr(getattr(trainer, name), "__module__", "").partition(".")[0]
        if module not in KNOWN_LIBRARIES:
            raise ProblemError(
                f"training: {type(trainer).__name__} has a {name} of its own, which the recorded "
                "run would not call; use the arguments of a stock Trainer, or a level of your own"
            )
    refused = {
        "neftune_noise_alpha": "repetitions of the run would lack the noise",
        "packing": "the texts in a pack would share a score",
        "activation_offloading": "the recorded run keeps activations on the device",
    }
    for name, reason in refused.items():
        if getattr(trainer.args, name, None):
            raise ProblemError(f"{name}: {reason}; leave it out")


def require_norm_in_graph(model: Any) -> None:
    """Raise ProblemError if a DoRA layer leaves its norm out of the gradient, as PEFT's do.

    Double backward does not give the derivative of such a gradient.
    """
    detached = [
        name
        for name, module in model.named_modules()
        if getattr(module, "lora_magnitude_vector", None)
        and any(
            getattr(variant, "norm_grad", "detach") == "detach"
            for variant in peft_internals.variants(module)
        )
    ]
    if detached:
        raise ProblemError(
            f"training: {len(detached)} DoRA layers, such as {detached[0]}, leave their norm out "
            "of the gradient; call hyperopt_peft.adapters.use_fast_dora(model) before training, "
            'or choose estimator="unrolled:product=difference", which is approximate'
        )


def _new_model(trainer: Any) -> RandomState | None:
    """Give ``trainer`` a new model if it has ``model_init``; returns the random state after that.

    Without ``model_init`` the result is None: training begins with the current random state.
    """
    if trainer.model_init is not None:
        seed = trainer.args.seed
        enable_full_determinism(seed) if trainer.args.full_determinism else set_seed(seed)
        trainer.model = trainer.model_wrapped = trainer.call_model_init().to(trainer.args.device)
        return RandomState.capture([trainer.args.device])
    return None


def warn_of_uncalled(trainer: Any) -> None:
    """Warn of what may end or change the training of ``trainer``, but not the recorded run."""
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    own = [x for x in kinds if x.__module__.partition(".")[0] not in KNOWN_LIBRARIES]
    uncalled = [kind.__name__ for kind in kinds if kind in (EarlyStoppingCallback, *own)]
    uncalled += ["load_best_model_at_end"] if trainer.args.load_best_model_at_end else []
    if uncalled:
        logger.warning(
            f"training: scores are of a run without {', '.join(uncalled)}; if these change what is "
            "trained, leave them out and give the steps that they led to as max_steps"
        )
