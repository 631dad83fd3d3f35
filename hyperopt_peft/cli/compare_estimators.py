"""hyperopt-peft check: estimators on your own model and data, and which of them to use."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.hf_argparser import HfArg

from hyperopt_peft import compare_hypergradients
from hyperopt_peft.cli.options import parse
from hyperopt_peft.cli.text.setup import TYPES, prepare
from hyperopt_peft.core.data import Batches
from hyperopt_peft.diagnostics.recommend import Thresholds, recommend
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients import Comparison, get_estimator
from hyperopt_peft.problems import BiDoRATrainer


@dataclass
class CheckArguments:
    """What is compared, where, and what is close enough."""

    _argument_group_name = "command"

    steps: int = HfArg(default=0, help="lower steps of the search before the comparison")
    methods: list[str] | None = HfArg(
        default=None,
        help="estimators with options; if not given direct, darts (ξ of 1 and of the learning "
        "rate), neumann, cg and minres, the last two with the damping",
    )
    damping: float = HfArg(
        default=1.0,
        help="of the reference and of the default cg and minres: the Hessian of a network is "
        "indefinite, and H + damping·I is solved with",
    )
    reference_steps: int = HfArg(default=40, help="MINRES steps of the reference")
    repeats: int = HfArg(default=3, help="draws of dropout masks; medians are reported")
    min_cosine: float = HfArg(default=0.95, help="to the reference, from which one will do")
    max_relative_error: float = HfArg(default=0.3, help="to the reference, up to which one will do")
    max_residual: float = HfArg(
        default=0.1, help="of the reference, above which it is not to be trusted"
    )

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ProblemError(f"steps must not be negative, got {self.steps}")
        if self.repeats < 1:
            raise ProblemError(f"repeats must be at least 1, got {self.repeats}")
        self.thresholds()
        for method in [*self.chosen(), self.reference()]:
            get_estimator(method)

    def thresholds(self) -> Thresholds:
        """What is close enough."""
        return Thresholds(self.min_cosine, self.max_relative_error, self.max_residual)

    def chosen(self) -> list[str]:
        """The estimators to compare."""
        damped = f"damping={self.damping:g}"
        return self.methods or [
            "direct",
            "darts:scheme=forward",
            "darts:scheme=forward,xi=lr",
            "neumann:terms=5",
            f"cg:steps=5,{damped}",
            f"minres:steps=5,{damped}",
            f"minres:steps=5,{damped},product=difference",
        ]

    def reference(self) -> str:
        """What is taken for the truth."""
        return f"minres:steps={self.reference_steps},damping={self.damping:g}"


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train for the steps asked for, compare on one batch a level, recommend.

    Raises:
        ProblemError: a bad option, model or data set.
        NonFiniteError: a loss or the reference is not finite.
    """
    own, model_args, data, args = parse("check", __doc__, (CheckArguments, *TYPES), argv)
    setup = prepare(model_args, data)
    args.method, args.retrain, args.max_steps = "bidora", "none", own.steps
    args.save_strategy = type(args.save_strategy)("no")
    with tempfile.TemporaryDirectory() as folder:  # nothing of the training is kept
        args.output_dir = folder
        model = setup.model(args.seed, dora=True)
        trainer = setup.trainer(model, args)
        if own.steps:
            trainer.train()
    comparison = compare(trainer, own)
    print(f"{comparison}\n\n{recommend(comparison, own.thresholds())}")


def compare(trainer: BiDoRATrainer, own: CheckArguments) -> Comparison:
    """The estimators at the trainer's point, on the first batch of each level.

    Raises:
        ProblemError: an unknown estimator.
        NonFiniteError: the reference is not finite.
    """
    args, lower, upper = trainer.args, trainer.lower, trainer.upper
    assert upper is not None
    trainer.model.train()
    size = args.per_device_train_batch_size
    lower.batches = _first_batch(trainer, trainer.train_dataset, size)
    upper.batches = _first_batch(
        trainer, trainer.upper_dataset, args.per_device_upper_batch_size or size
    )
    # For ξ = lr there must be an optimizer; nothing steps it.
    lower.optimizer = torch.optim.SGD(lower.variables, lr=args.learning_rate)
    with trainer.compute_loss_context_manager():
        return compare_hypergradients(
            upper, lower, own.chosen(), own.reference(), repeats=own.repeats, seed=args.seed
        )


def _first_batch(trainer: BiDoRATrainer, data: Any, size: int) -> Batches:
    rows = [data[row] for row in range(min(size, len(data)))]
    return Batches([trainer.data_collator(rows)], "check")
