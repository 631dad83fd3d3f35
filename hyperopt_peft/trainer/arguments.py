"""The arguments of `BilevelTrainer`: those of `transformers.Trainer`, and their upper twins."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients import Estimator, get_estimator
from hyperopt_peft.utils.validation import matches, spelt


@dataclass
class BilevelTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, which keep their meaning for the lower level, and more.

    Epochs and steps count optimizer steps of the lower level. The learning rate schedule
    (``lr_scheduler_type``, ``warmup_steps``) is that of both levels, each with its own peak.

    Raises:
        ProblemError: an unknown estimator or option, or a value out of range.
    """

    hypergradient: str = HfArg(
        default="darts:scheme=forward",
        help="hypergradient estimator, with options: cg:steps=5,damping=1.0",
    )
    lower_steps: int = HfArg(
        default=1, help="optimizer steps from one update of the upper level to the next"
    )
    upper_learning_rate: float = HfArg(
        default=1e-3, help="peak learning rate of the upper level's variables"
    )
    upper_weight_decay: float = HfArg(
        default=0.0, help="the optimizer's weight decay of the upper level's variables"
    )
    upper_max_grad_norm: float = HfArg(
        default=1.0, help="norm the hypergradient is clipped to; 0 for none"
    )
    per_device_upper_batch_size: int | None = HfArg(
        default=None,
        help="examples of the upper level a device; per_device_train_batch_size if not given",
    )
    upper_fraction: float = HfArg(
        default=0.2,
        help="share of train_dataset that the upper level gets where no upper_dataset is given",
    )
    non_finite: Literal["raise", "skip"] = HfArg(
        default="raise",
        help="what a NaN or infinite loss, gradient or curvature does: raise (a checkpoint is "
        "written first), or skip (the step is left out and counted)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        rates = ["learning_rate", "weight_decay", "max_grad_norm"]
        counts = ["per_device_train_batch_size", "gradient_accumulation_steps"]
        hints = get_type_hints(type(self))
        for name in (*rates, *counts, *self.bilevel_settings()):
            value = getattr(self, name)
            if not matches(value, hints[name]):
                raise ProblemError(f"{name} must be {spelt(hints[name])}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ProblemError(f"{name} must be finite, got {value}")
        self.estimator()
        rates += ["upper_learning_rate", "upper_weight_decay", "upper_max_grad_norm"]
        counts += ["lower_steps", "per_device_upper_batch_size"]
        self._require("not be negative", lambda x: x >= 0, *rates)
        self._require("be at least 1", lambda n: n >= 1, *counts)
        self._require("be in (0, 1)", lambda x: 0 < x < 1, "upper_fraction")

    def _require(self, words: str, rule: Callable[[Any], bool], *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not rule(value):
                raise ProblemError(f"{name} must {words}, got {value}")

    def estimator(self) -> Estimator:
        """The estimator that ``hypergradient`` names.

        Raises:
            ProblemError: an unknown one, an unknown option, or one that looks back on more than
                one lower step: the Trainer keeps one.
        """
        estimator = get_estimator(self.hypergradient)
        needs = estimator.requirements
        if needs.history > 1:
            raise ProblemError(
                f"{estimator.name} looks back on {needs.history} lower steps, which only the "
                "Engine keeps; choose darts, neumann, cg or minres, or one step"
            )
        if needs.every_step and self.lower_steps > 1:
            raise ProblemError(
                f"{estimator.name} carries over what each lower step did, and the Trainer keeps "
                f"only one of lower_steps={self.lower_steps}; leave carry out, or use the Engine"
            )
        return estimator

    def bilevel_settings(self) -> dict[str, Any]:
        """The fields of this class and its subclasses, without those of TrainingArguments."""
        inherited = TrainingArguments.__dataclass_fields__
        return {n: getattr(self, n) for n in self.__dataclass_fields__ if n not in inherited}
