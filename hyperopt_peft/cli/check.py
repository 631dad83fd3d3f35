"""hyperopt-peft check: the two levels, and estimators, examined on your model and data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.hf_argparser import HfArg

from hyperopt_peft import check_problem, compare_hypergradients
from hyperopt_peft.cli.options import parse
from hyperopt_peft.cli.plan import Work, seconds_a_pass, table, whole
from hyperopt_peft.cli.report import Report
from hyperopt_peft.cli.text.data import cache_folder
from hyperopt_peft.cli.text.setup import SHARED, changed, prepare
from hyperopt_peft.diagnostics import Retraining
from hyperopt_peft.diagnostics.compare import get_reference
from hyperopt_peft.diagnostics.curvature import Spectrum, spectrum
from hyperopt_peft.diagnostics.recommend import recommend
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients import Estimator, get_estimator
from hyperopt_peft.hypergradients.implicit.minres import MINRES
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils.signal_to_noise import MIN_SAMPLES
from hyperopt_peft.utils.validation import require_count

NONE = ["none"]


@dataclass
class CheckArguments:
    """The point at which the levels are examined, and the estimators."""

    _argument_group_name = "command"

    dry_run: bool = HfArg(default=False, help="print passes and minutes; train and write nothing")
    search_steps: int = HfArg(default=0, help="lower steps of the search before the check")
    solver_steps: int = HfArg(default=10, help="steps of the solvers that measure the curvature")
    estimators: list[str] | None = HfArg(
        default=None,
        help="estimators with options, or none; if not given direct, darts (ξ of 1 and of the "
        "learning rate), neumann, cg and minres, the last two with the smallest damping that "
        "leaves a condition number of 10, by the measured spectrum",
    )
    reference: str = HfArg(
        default="retraining:steps=20,directions=4",
        help="the reference: an estimator, or retraining with options, whose lr is by default the "
        "largest stable learning rate of the lower variables",
    )

    def __post_init__(self) -> None:
        require_count("search_steps", self.search_steps, least=0)
        require_count("solver_steps", self.solver_steps, least=1)
        get_reference(self.reference)
        for estimator in self.chosen(Spectrum(1.0, 1.0), 1.0):
            get_estimator(estimator)

    def chosen(self, measured: Spectrum, learning_rate: float) -> list[str]:
        """The estimators to compare, with ``learning_rate`` for ``lr`` in ``xi=lr``."""
        if self.estimators == NONE:
            return []
        damping = f"damping={measured.damping():.3g}"
        estimators = self.estimators or [
            "direct",
            "darts:scheme=forward",
            "darts:scheme=forward,xi=lr",
            "neumann:terms=5",
            f"cg:steps=5,{damping}",
            f"minres:steps=5,{damping}",
            f"minres:steps=5,{damping},product=difference",
            f"minres:steps=40,{damping}",
        ]
        return [estimator.replace("xi=lr", f"xi={learning_rate:g}") for estimator in estimators]

    def truth(self, measured: Spectrum) -> str:
        """The reference, for retraining with the learning rate 1/|λ|max if it has none."""
        name, _, options = self.reference.partition(":")
        if name != Retraining.name or "lr=" in options or not measured.radius:
            return self.reference
        return f"{name}:{options}{',' if options else ''}lr={1 / measured.radius:.3g}"


TYPES = (CheckArguments, *SHARED)


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train for ``search_steps``, examine both levels; write ``check.html``."""
    (command, model_args, data, args), flags = parse("check", TYPES, argv)
    if str(args.resume_from_checkpoint).lower() not in ("none", "false"):
        raise ProblemError("resume_from_checkpoint: this command does not resume; leave it out")
    output = args.output_dir
    args = changed(args, method="bidora", retrain="none", max_steps=command.search_steps)
    args.save_strategy, args.output_dir = type(args.save_strategy)("no"), cache_folder()
    setup = prepare(model_args, data)
    trainer = setup.trainer(args)
    if command.dry_run:
        works = planned(command, args.learning_rate)
        if command.search_steps:
            works.insert(0, whole(setup, trainer, "search"))
        print(table(works, seconds_a_pass(trainer)))
        return
    if command.search_steps:
        trainer.train()
    trainer.model.train()
    with trainer.compute_loss_context_manager():
        page = _examine(trainer, command)
    page.flags = flags
    page.subtitle = f"after {command.search_steps} steps of the search on {model_args.model}"
    print(f"\n{page.write(output or '.', 'check.html')} has all of it")


def planned(command: CheckArguments, learning_rate: float) -> list[Work]:
    """The work of the check and of the comparison, in passes."""
    solves = 5 + MIN_SAMPLES  # of the curvature at two points, and of the noise
    works = [Work("both levels", solves, 0, _passes(MINRES(steps=command.solver_steps)))]
    estimators = [*map(get_estimator, command.chosen(Spectrum(1.0, 1.0), learning_rate))]
    if not estimators:
        return works
    count, reference = len(estimators), get_reference(command.reference)
    passes = _passes(reference)
    if isinstance(reference, Retraining):
        passes = reference.passes(count + 1 + reference.directions)
    mean = sum(map(_passes, estimators)) / count
    return [*works, Work("estimators", count, 0, mean), Work("reference", 1, 0, passes)]


def _passes(estimator: Estimator) -> int:
    return estimator.cost() or 2


def _examine(trainer: BilevelTrainer, command: CheckArguments) -> Report:
    """Print the check of the levels on their first batches, then the estimators side by side."""
    upper, lower, args = trainer.upper, trainer.lower, trainer.args
    assert upper is not None
    shown: dict[str, Any] = {"seed": args.seed, "progress": sys.stderr.isatty()}
    pairs = [_batches(trainer, number) for number in range(MIN_SAMPLES)]
    several: dict[str, Any] = {f"{name}es": [pair[name] for pair in pairs] for name in pairs[0]}
    steps = command.solver_steps
    check = check_problem(upper, lower, **pairs[0], **several, solver_steps=steps, **shown)
    print(check, flush=True)
    found = len(check.findings)
    verdict = f"{found} finding{'s' * (found != 1)} at this point" if found else "nothing is amiss"
    page = Report("check", verdict, (), texts={"Both levels": str(check)})
    if command.estimators == NONE:
        return page
    measured = check.curvature or spectrum(upper, lower, **pairs[0], seed=args.seed)
    estimators = command.chosen(measured, args.learning_rate)
    reference = command.truth(measured)
    comparison = compare_hypergradients(
        upper, lower, estimators, reference, repeats=1, **pairs[0], **shown
    )
    advice = recommend(comparison)
    print(f"\n{comparison}\n\n{advice}")
    page.verdict = f"{page.verdict}; {str(advice).splitlines()[-1]}"
    page.texts = {**page.texts, "Estimators": f"{comparison}\n\n{advice}"}
    return page


def _batches(trainer: BilevelTrainer, number: int) -> dict[str, Any]:
    """Batch ``number`` of each level's examples in order, ``upper_batch`` and ``lower_batch``."""
    args = trainer.args

    def batch(data: Any, size: int) -> Any:
        rows = range(number * size, number * size + min(size, len(data)))
        return trainer.data_collator([data[row % len(data)] for row in rows])

    size = args.per_device_train_batch_size
    return {
        "upper_batch": batch(trainer.upper_dataset, args.per_device_upper_batch_size or size),
        "lower_batch": batch(trainer.train_dataset, size),
    }
