"""The arguments of `BilevelTrainer`: `transformers.TrainingArguments` and the upper level's."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_type_hints

import torch
from transformers import TrainingArguments

from hyperopt_peft.engine.step import require_history
from hyperopt_peft.errors import ProblemError, did_you_mean
from hyperopt_peft.hypergradients import Estimator, get_estimator
from hyperopt_peft.hypergradients.registry import DEFAULT
from hyperopt_peft.trainer.over import Combined, combined_arguments
from hyperopt_peft.utils.validation import (
    Bound,
    NonNegativeFloat,
    PositiveInt,
    option,
    require_types,
)

#: The fields of `transformers.TrainingArguments` that change a run's result. A checkpoint and the
#: run that resumes from it must agree in them. Some are of earlier or later releases.
RESUME_MUST_MATCH = """
accelerator_config adam_beta1 adam_beta2 adam_epsilon average_tokens_across_devices bf16 data_seed
dataloader_drop_last full_determinism gradient_accumulation_steps group_by_length label_names
label_smoothing_factor learning_rate length_column_name liger_kernel_config lr_scheduler_kwargs
lr_scheduler_type max_grad_norm max_steps neftune_noise_alpha num_train_epochs optim optim_args
optim_target_modules per_device_train_batch_size remove_unused_columns seed tf32
train_sampling_strategy use_liger_kernel warmup_ratio warmup_steps weight_decay
""".split()  # noqa: SIM905

#: The types of arguments of `transformers.TrainingArguments` that are checked.
BOUNDS: dict[str, Any] = {
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm"), NonNegativeFloat),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), PositiveInt),
    "seed": (SEED := Annotated[int, Bound("≥", 0), Bound("<", 2**32)]),
    "data_seed": SEED | None,
}

#: The values of the upper level's arguments that neither the user nor the method sets.
DEFAULTS: dict[str, Any] = {
    "hypergradient": DEFAULT,
    "lower_steps": 1,
    "upper_learning_rate": 1e-3,
    "upper_weight_decay": 0.0,
    "upper_max_grad_norm": 1.0,
    "upper_fraction": 0.2,
    "non_finite": "raise",
    "retrain": "warm",
}


@dataclass
class BilevelTrainingArguments(TrainingArguments, metaclass=Combined):
    """`transformers.TrainingArguments` for the lower level, with arguments for the upper level.

    Epochs and steps count optimizer steps of the lower level. Both levels have one learning-rate
    schedule, each with its own peak. Callbacks that have a state resume with it. Where the user
    gives no argument for the upper level, it is None until `with_defaults`, which trainers call.

    Raises:
        ProblemError: the estimator or one of its options is unknown, or a value is out of range.

    Example:
        >>> args = BilevelTrainingArguments(
        ...     output_dir="outputs", hypergradient="cg:steps=5,damping=1.0", report_to="none"
        ... )
        >>> args.estimator()
        ConjugateGradient(...)
    """

    #: The arguments class of the trainer that a bilevel trainer extends.
    parents = TrainingArguments

    hypergradient: str = option(None, help="estimator, with options: cg:steps=5,damping=1.0")
    logging_steps: float = option(10, help="steps between log lines, or a share of all")
    lower_steps: PositiveInt = option(None, help="lower-level steps for each upper step")
    upper_learning_rate: NonNegativeFloat = option(None, help="the upper level's peak rate")
    upper_weight_decay: NonNegativeFloat = option(None, help="the upper level's decay")
    upper_prior: NonNegativeFloat | None = option(None, help="τ of the prior ½·τ·mean‖u − u0‖²")
    upper_max_grad_norm: NonNegativeFloat = option(None, help="longest hypergradient; 0: any")
    per_device_upper_batch_size: PositiveInt | None = option(
        None,
        help="upper-level examples per device and batch; by default as many as of a lower step, or "
        "up to 128 for a method whose upper loss needs all of them",
    )
    upper_fraction: Annotated[float, Bound(">", 0), Bound("<", 1)] = option(
        None, help="share of train_dataset that the upper level gets if there is no upper_dataset"
    )
    non_finite: Literal["raise", "skip"] = option(
        None,
        help="on a NaN or infinite loss, gradient or curvature: raise, or skip and count the step",
    )
    retrain: Literal["none", "warm", "scratch"] = option(
        None,
        help="second training after a method's search, on all examples with the upper level "
        "frozen: none; warm, from the end of the search; scratch, from the initial values",
    )
    retrain_arguments: dict[str, Any] | str | None = option(
        None,
        help="arguments of the second training that differ, such as "
        '{"learning_rate": 1e-4, "max_steps": 100}',
    )
    restore_callback_states_from_checkpoint: bool = option(True, help="callbacks keep their state")

    #: Whether printed lines have norms and rates too; no field, since it is an option of a command.
    details = False

    @classmethod
    def of(cls, args: Any, **settings: Any) -> Any:
        """A copy of ``args``, which may be a parent's, with ``settings`` of the upper level.

        Raises:
            ProblemError: ``args`` has another class, or a setting is unknown or out of range.

        Example:
            >>> BilevelTrainingArguments.of(TrainingArguments("outputs"), lower_steps=4).lower_steps
            4
        """
        ours, parents = vars(cls).get("made_by", (None, (cls, cls.parents)))[1]
        kind: Any = type(args)
        if issubclass(kind, parents) and not issubclass(kind, BilevelTrainingArguments):
            kind = combined_arguments(ours, kind)
        if not (issubclass(kind, parents) and issubclass(kind, ours)):
            raise ProblemError(
                f"args must be {cls.__name__}, got {kind.__name__}; use the trainer's Arguments"
            )
        made = kind.__new__(kind)
        made.__dict__.update({x.name: x.default for x in fields(kind)} | vars(args) | settings)
        for name in settings.keys() - (known := made.bilevel_settings()).keys():
            raise ProblemError(f"{name}: no argument of the upper level{did_you_mean(name, known)}")
        made._complete()
        return made

    def __post_init__(self) -> None:
        super().__post_init__()
        self._complete()

    def _complete(self) -> None:
        if not torch.accelerator.is_available():  # PyTorch warns of each loader that pins memory
            self.dataloader_pin_memory = False
        given: Any = self.retrain_arguments
        given = dict(json.loads(given) if isinstance(given, str) else given or {})
        hints = get_type_hints(type(self))
        for name, value in given.items():
            if name not in hints or name == "output_dir":
                raise ProblemError(
                    f"retrain_arguments: the second training has no argument {name!r}; use names "
                    f"of {type(self).__name__}, such as learning_rate"
                )
            if isinstance(value, str) and hints[name] is float:  # YAML reads 3e-5 as a string
                with suppress(ValueError):
                    given[name] = float(value)
        self.retrain_arguments = given or None
        self._check()
        if self.retrain_arguments:
            self.for_retraining()

    def _check(self) -> None:
        given = [name for name, value in self.bilevel_settings().items() if value is not None]
        require_types(self, (*BOUNDS, *given), **BOUNDS)
        if self.max_steps == 0 or (self.max_steps < 0 and self.num_train_epochs <= 0):
            raise ProblemError(
                "max_steps must be positive, or -1 with a positive num_train_epochs, got "
                f"{self.max_steps} with {self.num_train_epochs}: the run would train nothing"
            )
        self.estimator()

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """A copy with ``defaults``, or else `DEFAULTS`, for arguments that the user did not give.

        These are the arguments that have their class's default. For the upper level it is None, so
        that each value counts as given; those of `transformers.TrainingArguments` have another.

        Raises:
            ProblemError: a value is out of range, or a name is unknown.

        Example:
            >>> args = BilevelTrainingArguments("outputs", lower_steps=1, report_to="none")
            >>> args = args.with_defaults({"lower_steps": 4, "hypergradient": "direct"})
            >>> args.lower_steps, args.hypergradient, args.retrain
            (1, 'direct', 'warm')
        """
        args, known = copy.copy(self), {each.name: each.default for each in fields(self)}
        for name, value in {**DEFAULTS, **defaults}.items():
            if name not in known:
                raise ProblemError(f"defaults: {type(self).__name__} has no {name!r}; leave it out")
            if getattr(self, name) == known[name]:
                setattr(args, name, value)
        args._check()
        return args

    def for_retraining(self) -> Self:
        """The arguments of the second training, whose ``output_dir`` is the subfolder ``retrain``.

        Raises:
            ProblemError: a value of ``retrain_arguments`` is out of range.

        Example:
            >>> options = {"retrain_arguments": {"max_steps": 9}, "report_to": "none"}
            >>> BilevelTrainingArguments("outputs", **options).for_retraining().max_steps
            9
        """
        args = copy.copy(self)
        changes = dict(cast(dict[str, Any], self.retrain_arguments or {}))
        if "num_train_epochs" in changes:
            changes.setdefault("max_steps", -1)
        args.__dict__.update(changes)
        args.output_dir = str(Path(self.output_dir or "") / "retrain")
        args.push_to_hub = False
        try:
            args._check()
        except ProblemError as error:
            raise ProblemError(f"retrain_arguments: {error}") from None
        return args

    def estimator(self) -> Estimator:
        """The estimator that ``hypergradient`` names.

        Raises:
            ProblemError: the estimator or an option is unknown, or the estimator needs records of
                more than one lower step.
        """
        estimator = get_estimator(DEFAULT if self.hypergradient is None else self.hypergradient)
        require_history(estimator, lower_steps=self.lower_steps or 1, recorded=1)
        return estimator

    def steps_of(self, rows: int) -> int:
        """The number of optimizer steps of a training on ``rows`` rows."""
        if self.max_steps > 0:
            return int(self.max_steps)
        size = self.train_batch_size * self.world_size
        batches = rows // size if self.dataloader_drop_last else math.ceil(rows / size)
        an_epoch: int = max(1, math.ceil(batches / self.gradient_accumulation_steps))
        return math.ceil(float(self.num_train_epochs) * an_epoch)

    def bilevel_settings(self) -> dict[str, Any]:
        """The fields that this class adds to those of `parents`, with their values."""
        inherited = {each.name for each in fields(self.parents)}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in inherited}

    def resume_must_match(self) -> dict[str, Any]:
        """The arguments in which a checkpoint and a resumed run must agree."""
        values, levels = self.to_dict(), self.bilevel_settings()
        # A resumed run may change non_finite; the search's settings record the retrain arguments.
        levels = {n: v for n, v in levels.items() if n != "non_finite" and "retrain" not in n}
        standard = {field.name for field in fields(TrainingArguments)}
        of_parents = [field.name for field in fields(self.parents) if field.name not in standard]
        names = (*RESUME_MUST_MATCH, *of_parents)
        return {**{name: values[name] for name in names if name in values}, **levels}
