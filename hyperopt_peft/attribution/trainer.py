"""Trains and records what a `transformers.Trainer` trains; returns the run and Φ."""

from __future__ import annotations

from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, Trainer, enable_full_determinism, set_seed
from transformers.utils import logging

from hyperopt_peft.adapters import peft_internals
from hyperopt_peft.attribution.recorder import RecordedTrainer
from hyperopt_peft.attribution.rows import ModelOnRows, TrainerData
from hyperopt_peft.attribution.scores import Evaluation, Trained
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.method import Method
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
    data: TrainerData, *, twice: bool, progress: bool, **options: Any
) -> Trained:
    """Train what the Trainer of ``data`` trains, and return its run and Φ; see `attribute`.

    ``twice`` and ``options`` are those of `RecordedTrainer`.
    """
    require_attributable(data)
    warn_of_uncalled(data.trainer)
    random_state = new_model(data.trainer)
    require_float32(data.model)
    data.require_losses()
    if twice:
        require_norm_in_graph(data.model)
    with TemporaryDirectory(prefix="attribution-") as folder:  # apart from the user's checkpoints
        changes = {"remove_unused_columns": False, "disable_tqdm": not progress}
        args = quiet(data.trainer.args, folder, BilevelTrainingArguments, **changes)
        runner = RecordedTrainer(data, args, twice=twice, **options)
        if random_state is not None:
            random_state.restore()
        runner.train()
    run, state = runner.run, data.trainer.state
    run.settings["seconds"] = runner.passes.read()["seconds"]
    state.global_step, state.epoch = runner.state.global_step, runner.state.epoch
    batches, rows = data.batches, data.train_rows
    model = ModelOnRows(data.model, runner.compute_loss_context_manager, runner.tags, data.rule)
    final = data.method.lower(data.model, partial(runner.task_loss, training=False))
    return Trained(
        run,
        Evaluation(run.weights, model.mean(batches(data.evaluation_rows))),
        Accumulated(final),
        lambda: model.micro_batches(batches(rows)),
        probabilities=lambda chosen: model.probabilities(batches(rows, chosen)),
        labels=data.classes(),
        columns=data.shown[0],
        progress=progress,
    )


def require_attributable(data: TrainerData) -> None:
    """Raise ProblemError if the Trainer has trained, or if the recorded run would differ."""
    trainer, method = data.trainer, type(data.method)
    if data.has_upper_level:
        raise ProblemError(
            "training: has two levels, and rows have scores for the training of one; give a method "
            'without upper level, such as lora or dora, or model="head"'
        )
    if trainer.state.global_step and trainer.model_init is None:
        raise ProblemError(
            "training: attribute() must see training from its first step; give a new trainer, or "
            "one with model_init"
        )
    for name in ("finish", "export"):
        if getattr(method, name) is not getattr(Method, name):
            raise ProblemError(
                f"training: {method.__name__}.{name} changes the model during the run, and "
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


def require_norm_in_graph(model: nn.Module) -> None:
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


def new_model(trainer: Any) -> RandomState | None:
    """Give ``trainer`` a new model if it has ``model_init``; returns the random state after that.

    Without ``model_init`` the result is None: training begins with the current random state.
    """
    if trainer.model_init is not None:
        seed = trainer.args.seed
        enable_full_determinism(seed) if trainer.args.full_determinism else set_seed(seed)
        trainer.model = trainer.model_wrapped = trainer.call_model_init().to(trainer.args.device)
        return RandomState.capture([trainer.args.device])
    return None


def warn_of_uncalled(trainer: Trainer) -> None:
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
