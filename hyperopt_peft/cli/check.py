"""hyperopt-peft check: the two levels, and estimators, examined on your model and data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.hf_argparser import HfArg

from hyperopt_peft import check_problem, compare_hypergradients
from hyperopt_peft.cli.options import RunArguments
from hyperopt_peft.cli.plan import Work, plan, whole
from hyperopt_peft.cli.report import Report
from hyperopt_peft.cli.text.data import cache_folder
from hyperopt_peft.cli.text.setup import SHARED, changed, choose, prepare
from hyperopt_peft.diagnostics import Retraining
from hyperopt_peft.diagnostics.compare import get_reference
from hyperopt_peft.diagnostics.curvature import Spectrum, spectrum
from hyperopt_peft.diagnostics.recommend import recommend
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients import Estimator, get_estimator
from hyperopt_peft.hypergradients.implicit.minres import MINRES
from hyperopt_peft.utils.signal_to_noise import MIN_SAMPLES
from hyperopt_peft.utils.validation import require_count

NONE = ["none"]


@dataclass
class CheckArguments(RunArguments):
    """The method, the point at which its levels are examined, and the estimators."""

    method: str = HfArg(default="bidora", help="one with two levels; as the option of train")
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
    """Parse ``argv``, train for ``search_steps``, examine both levels; write ``check.md``."""
    chosen = choose("check", CheckArguments, argv)
    command, args = chosen.command, chosen.args
    if str(args.resume_from_checkpoint).lower() not in ("none", "false"):
        raise ProblemError("resume_from_checkpoint: this command does not resume; leave it out")
    output = args.output_dir
    args = changed(args, retrain="none", max_steps=command.search_steps)
    args.save_strategy, args.output_dir = type(args.save_strategy)("no"), cache_folder()
    setup = prepare(chosen.model, chosen.data, args, chosen.method)
    trainer = setup.trainer(args, chosen.method)
    if trainer.upper is None:
        raise ProblemError(f"method: {chosen.name} has no upper level to check")
    if command.dry_run:
        works = [whole(trainer, "search")] * bool(command.search_steps)
        works += planned(command, args.learning_rate)
        print(plan(works, trainer))
        return
    if command.search_steps:
        trainer.train()
    trainer.model.train()
    with trainer.compute_loss_context_manager():
        page = _examine(trainer, command)
    page.options = chosen.options
    page.subtitle = f"after {command.search_steps} steps of the search on {chosen.model.model}"
    print(f"\n{page.write(output or '.')} has all of it")


def planned(command: CheckArguments, learning_rate: float) -> list[Work]:
    """The work of the check and of the comparison, in passes."""
    solves = 5 + MIN_SAMPLES  # of the curvature at two points, and of the noise
    works = [Work("both levels", solves, 0, _passes(MINRES(steps=command.solver_steps)))]
    estimators = [*map(get_estimator, command.chosen(Spectrum(1.0, 1.0), learning_rate))]
    if count := len(estimators):
        reference: Any = get_reference(command.reference)
        known = isinstance(reference, Retraining)
        each = reference.passes(count + 1 + reference.directions) if known else _passes(reference)
        works.append(Work("estimators", count, 0, sum(map(_passes, estimators)) / count))
        works.append(Work("reference", 1, 0, each))
    return works


def _passes(estimator: Estimator) -> int:
    return estimator.cost() or 2


def _examine(trainer: Any, command: CheckArguments) -> Report:
    """Print the check of the levels on their first batches, then the estimators side by side."""
    upper, lower, args = trainer.upper, trainer.lower, trainer.args
    shown: dict[str, Any] = {"seed": args.seed, "progress": sys.stderr.isatty()}
    pairs = [_batches(trainer, number) for number in range(MIN_SAMPLES)]
    several: dict[str, Any] = {f"{name}es": [pair[name] for pair in pairs] for name in pairs[0]}
    steps = command.solver_steps
    check = check_problem(upper, lower, **pairs[0], **several, solver_steps=steps, **shown)
    print(check, flush=True)
    found = len(check.findings)
    verdict = f"{found} finding{'s' * (found != 1)} at this point" if found else "nothing is amiss"
    page = Report("check", verdict, {}, texts={"Both levels": str(check)})
    if command.estimators == NONE:
        return page
    measured = check.curvature or spectrum(upper, lower, **pairs[0], seed=args.seed)
    estimators, reference = command.chosen(measured, args.learning_rate), command.truth(measured)
    comparison = compare_hypergradients(
        upper, lower, estimators, reference, repeats=1, **pairs[0], **shown
    )
    advice = recommend(comparison)
    print(f"\n{comparison}\n\n{advice}")
    page.verdict = f"{page.verdict}; {str(advice).splitlines()[-1]}"
    page.texts = {**page.texts, "Estimators": f"{comparison}\n\n{advice}"}
    return page


def _batches(trainer: Any, number: int) -> dict[str, Any]:
    """Batch ``number`` of each level's examples in order, ``upper_batch`` and ``lower_batch``."""
    size = trainer.args.per_device_train_batch_size
    parts = {
        "upper_batch": (trainer.upper_dataset, trainer.args.per_device_upper_batch_size or size),
        "lower_batch": (trainer.train_dataset, size),
    }
    batches = {}
    for name, (data, size) in parts.items():
        rows = range(number * size, number * size + min(size, len(data)))
        batches[name] = trainer.data_collator([data[row % len(data)] for row in rows])
    return batches
