"""hyperopt-peft check: the two levels, and estimators, examined on your model and data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hyperopt_peft import check_problem, compare_hypergradients
from hyperopt_peft.cli.options import RunArguments
from hyperopt_peft.cli.plan import Work, plan, whole
from hyperopt_peft.cli.report import Report, as_text
from hyperopt_peft.cli.text.data import cache_folder
from hyperopt_peft.cli.text.setup import SHARED, choose, prepare
from hyperopt_peft.diagnostics.curvature import Spectrum, spectrum
from hyperopt_peft.diagnostics.recommend import recommend
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients import get_estimator
from hyperopt_peft.hypergradients.implicit.minres import MINRES
from hyperopt_peft.trainer.data import batches_of
from hyperopt_peft.trainer.quiet import quiet
from hyperopt_peft.utils.signal_to_noise import MIN_SAMPLES
from hyperopt_peft.utils.validation import option

NONE = ["none"]


@dataclass
class CheckArguments(RunArguments):
    """The method, the point at which its levels are examined, and the estimators."""

    method: str = option("bidora", help="one with two levels; as the option of train")
    search_steps: int = option(0, help="lower steps of the search before the check")
    solver_steps: int = option(10, help="steps of the solvers that measure the curvature")
    estimators: list[str] | None = option(
        None,
        help="estimators with options, or none; by default direct, darts, neumann, and cg and "
        "minres with a damping by the measured spectrum",
    )
    reference: str = option("minres:steps=100", help="the estimator to compare with")

    def __post_init__(self) -> None:
        for estimator in (self.reference, *self.chosen(Spectrum(1.0, 1.0), 1.0)):
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


TYPES = (CheckArguments, *SHARED)


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train for ``search_steps``, examine both levels; write ``check.html``."""
    chosen = choose("check", CheckArguments, argv)
    command, args = chosen.command, chosen.args
    output = args.output_dir
    steps = command.search_steps or args.max_steps
    args = quiet(args, cache_folder(), retrain="none", max_steps=steps)
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
    if command.details:
        print(f"\n{as_text(page.details)}")
    page.options = chosen.options
    print(f"\n{page.write(output or '.')} has the measurements too")


def planned(command: CheckArguments, learning_rate: float) -> list[Work]:
    """The work of the check and of the comparison, in passes."""
    solves = 5 + MIN_SAMPLES  # of the curvature at two points, and of the noise
    works = [Work("both levels", solves, 0, MINRES(steps=command.solver_steps).cost() or 2)]
    estimators = command.chosen(Spectrum(1.0, 1.0), learning_rate)
    if count := len(estimators):
        costs = [get_estimator(estimator).cost() or 2 for estimator in estimators]
        works.append(Work("estimators", count, 0, sum(costs) / count))
        works.append(Work("reference", 1, 0, get_estimator(command.reference).cost() or 2))
    return works


def _examine(trainer: Any, command: CheckArguments) -> Report:
    """Print the findings of the levels on their first batches, then the estimators."""
    upper, lower, args = trainer.upper, trainer.lower, trainer.args
    shown: dict[str, Any] = {"seed": args.seed, "progress": sys.stderr.isatty()}
    size = args.per_device_train_batch_size
    uppers = _batches(trainer, trainer.upper_dataset, args.per_device_upper_batch_size or size)
    lowers = _batches(trainer, trainer.train_dataset, size)
    point = {"upper_batch": uppers[0], "lower_batch": lowers[0]}
    several: dict[str, Any] = {"upper_batches": uppers, "lower_batches": lowers}
    steps = command.solver_steps
    print("measuring both levels …", file=sys.stderr)
    check = check_problem(upper, lower, **point, **several, solver_steps=steps, **shown)
    found = "\n".join(map(str, check.findings))
    page = Report("check", "both levels are sound", {})
    if found:
        page.verdict = f"{len(check.findings)} findings on the two levels"
        page.sections = {"Findings": found}
    page.details = {"Measurements": "\n".join(check.measurements())}
    print(f"{page.verdict}\n{found}".rstrip(), flush=True)
    if command.estimators == NONE:
        return page
    measured = check.curvature or spectrum(upper, lower, **point, seed=args.seed)
    estimators, reference = command.chosen(measured, args.learning_rate), command.reference
    print(f"computing {len(estimators)} estimates and {reference} …", file=sys.stderr)
    comparison = compare_hypergradients(
        upper, lower, estimators, reference, repeats=1, **point, **shown
    )
    advice, table = recommend(comparison), comparison.table()
    more = {"Estimators": str(advice), "Beside the reference": [[*x[:3], x[-1]] for x in table]}
    print(f"\n{as_text(more)}")
    page.verdict += f"; use {advice.estimator}" if advice.estimator else "; no estimator is near"
    page.sections = {**page.sections, **more}
    page.details |= {"Estimators": table, "Reference": "\n".join(comparison.remarks())}
    return page


def _batches(trainer: Any, rows: Any, size: int) -> list[Any]:
    """The first batches of ``rows``, from the beginning again where they are few."""
    size = min(size, len(rows))
    chosen = [number % len(rows) for number in range(MIN_SAMPLES * size)]
    return batches_of(rows, trainer.data_collator, size, trainer.args.device, chosen=chosen)
