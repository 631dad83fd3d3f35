"""hyperopt-peft compare-estimators: estimators side by side on your model and data."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.hf_argparser import HfArg

from hyperopt_peft import compare_hypergradients
from hyperopt_peft.cli.options import parse
from hyperopt_peft.cli.text.setup import TYPES, MethodArguments, Setup, prepare
from hyperopt_peft.diagnostics.compare import Comparison, get_reference
from hyperopt_peft.diagnostics.curvature import Spectrum, spectrum
from hyperopt_peft.diagnostics.recommend import Thresholds, recommend
from hyperopt_peft.hypergradients import get_estimator
from hyperopt_peft.problems import BiDoRATrainer
from hyperopt_peft.utils.validation import require_count


@dataclass
class EstimatorArguments:
    """The estimators, the point of comparison, and the thresholds of the recommendation."""

    _argument_group_name = "command"

    steps: int = HfArg(default=0, help="lower steps of the search before the comparison")
    methods: list[str] | None = HfArg(
        default=None,
        help="estimators with options; if not given direct, darts (ξ of 1 and of the learning "
        "rate), neumann, cg and minres, the last two with the damping",
    )
    damping: float | None = HfArg(
        default=None,
        help="of the default cg and minres, which solve with H + damping·I; if not given the "
        "smallest with a condition number of 10, by the measured spectrum",
    )
    reference: str | None = HfArg(
        default=None,
        help="the reference: an estimator, or retraining with options; if not given retraining by "
        "gradient descent with the largest stable learning rate of the lower variables",
    )
    reference_steps: int = HfArg(default=20, help="steps of each retraining of the reference")
    directions: int = HfArg(
        default=4, help="random directions of the reference, beside those of the methods"
    )
    repeats: int = HfArg(default=1, help="draws of dropout masks; medians are reported")
    min_cosine: float = HfArg(default=0.95, help="smallest acceptable cosine to the reference")
    max_relative_error: float = HfArg(default=0.3, help="largest acceptable error")
    max_residual: float = HfArg(default=0.1, help="largest residual of a reference that is trusted")

    def __post_init__(self) -> None:
        require_count("steps", self.steps, least=0)
        require_count("repeats", self.repeats, least=1)
        self.thresholds()
        known = Spectrum(1.0, 1.0)
        get_reference(self.truth(known))
        for method in self.chosen(known, 1.0):
            get_estimator(method)

    def thresholds(self) -> Thresholds:
        """The thresholds of the recommendation."""
        return Thresholds(self.min_cosine, self.max_relative_error, self.max_residual)

    def chosen(self, measured: Spectrum, learning_rate: float) -> list[str]:
        """The estimators to compare, with ``learning_rate`` for ``lr`` in ``xi=lr``."""
        damping = measured.damping() if self.damping is None else self.damping
        damped = f"damping={damping:.3g}"
        methods = self.methods or [
            "direct",
            "darts:scheme=forward",
            "darts:scheme=forward,xi=lr",
            "neumann:terms=5",
            f"cg:steps=5,{damped}",
            f"minres:steps=5,{damped}",
            f"minres:steps=5,{damped},product=difference",
            f"minres:steps=40,{damped}",
        ]
        return [method.replace("xi=lr", f"xi={learning_rate:g}") for method in methods]

    def truth(self, measured: Spectrum) -> str:
        """The reference, by default a retraining with learning rate 1/|λ|max."""
        rate = 1 / measured.radius if measured.radius else 1.0
        steps = f"steps={self.reference_steps},directions={self.directions}"
        return self.reference or f"retraining:{steps},lr={rate:.3g}"


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train for ``steps`` steps, compare on one batch a level, recommend.

    Raises:
        ProblemError: a bad option, model or data set.
        NonFiniteError: a loss or the reference is not finite.
    """
    kinds = (EstimatorArguments, *TYPES)
    own, model_args, data, args = parse("compare-estimators", kinds, argv)
    comparison = compare(trained(prepare(model_args, data), args, own.steps), own)
    print(f"{comparison}\n\n{recommend(comparison, own.thresholds())}")


def trained(setup: Setup, args: MethodArguments, steps: int) -> BiDoRATrainer:
    """A BiDoRA trainer after ``steps`` lower steps of the search; nothing is written."""
    args.method, args.retrain, args.max_steps = "bidora", "none", steps
    args.save_strategy = type(args.save_strategy)("no")
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        trainer = setup.trainer(setup.model(args.seed, dora=True), args)
        if steps:
            trainer.train()
    trainer.model.train()
    return trainer


def batches_of(trainer: BiDoRATrainer, number: int = 0) -> dict[str, Any]:
    """Batch ``number`` of each level's examples in order, ``upper_batch`` and ``lower_batch``."""
    args = trainer.args
    size = args.per_device_train_batch_size

    def batch(data: Any, size: int) -> Any:
        rows = range(number * size, number * size + min(size, len(data)))
        return trainer.data_collator([data[row % len(data)] for row in rows])

    return {
        "upper_batch": batch(trainer.upper_dataset, args.per_device_upper_batch_size or size),
        "lower_batch": batch(trainer.train_dataset, size),
    }


def compare(trainer: BiDoRATrainer, own: EstimatorArguments) -> Comparison:
    """The estimators at the trainer's point, on the first batch of each level.

    Raises:
        ProblemError: an unknown estimator.
        NonFiniteError: the reference is not finite.
    """
    args, lower, upper = trainer.args, trainer.lower, trainer.upper
    assert upper is not None
    batches = batches_of(trainer)
    with trainer.compute_loss_context_manager():
        measured = spectrum(upper, lower, **batches, seed=args.seed)
        return compare_hypergradients(
            upper,
            lower,
            own.chosen(measured, args.learning_rate),
            own.truth(measured),
            repeats=own.repeats,
            seed=args.seed,
            **batches,
            progress=sys.stderr.isatty(),
        )
