"""Does the missing runs of a comparison, in processes and parts, and estimates their time."""

from __future__ import annotations

import math
import pickle
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
from joblib import Parallel, delayed
from tqdm.auto import tqdm

from hyperopt_peft.comparison.choice import Plan
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import ABLATIONS, Price, Run, Task
from hyperopt_peft.comparison.upper import OPEN, arguments_of
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.checks import LEARNS
from hyperopt_peft.trainer.method import has_upper_level
from hyperopt_peft.utils.tables import aligned


@dataclass(frozen=True)
class Runs:
    """How the runs of a comparison are done.

    Args:
        folder: has the finished runs, from which a killed or changed comparison continues.
        jobs: processes, by joblib, whose ``parallel_config`` chooses other backends.
        part: (k, n) for the k-th of n processes that share the runs and ``folder``.
        progress: whether an estimate of the time, and a bar are shown.
        dry_run: print the estimate: the runs with their passes and minutes; and do none.

    Raises:
        ProblemError: no processes; a part without a folder.

    Example:
        >>> Runs(folder="outputs/compare", jobs=4).part
        (1, 1)
    """

    folder: str | Path | None = None
    jobs: int = 1
    part: tuple[int, int] = (1, 1)
    progress: bool = True
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        if self.jobs == 0:
            raise ProblemError("jobs: must be a number of processes, got 0")
        if self.part != (1, 1) and self.folder is None:
            raise ProblemError("part: the parts share their runs through a folder; give folder")


@dataclass
class Work:
    """The runs of a comparison that this process does.

    Raises:
        ProblemError: other processes cannot have what the runs share, or find this one's runs.
    """

    plan: Plan
    task: Task
    store: Store
    runs: Runs
    checked: bool = False

    def __post_init__(self) -> None:
        if self.runs.jobs != 1:
            require_pickled(self.task)
        if self.runs.part != (1, 1) and self.store.anew:
            raise ProblemError(
                f"part: the parts find each other's runs by their contents; {self.store.anew}; "
                "leave part out, or make it in base_model or in a method's prepare"
            )

    def do(self) -> None:
        """Do the missing runs, stage by stage: a stage reads the scores of the one before.

        Raises:
            ProblemError: as `check`; the other parts have not done a stage that later runs need.
        """
        total = sum(self.plan.count(*each) for each in self.plan.candidates())
        with tqdm(total=total, disable=not self.runs.progress, unit="run") as bar:
            for stage in self.plan.stages(self.store):
                self._do(stage, bar)

    def _do(self, runs: Sequence[Run], bar: Any) -> None:
        number, count = self.runs.part
        missing = {*self.store.missing(runs)}
        mine = [run for run in runs[number - 1 :: count] if run in missing]
        if mine and not self.checked:
            prices = self.check()
            if self.runs.progress:
                bar.write(self.estimate(prices), file=sys.stderr)
        bar.update(len(runs) - len(mine))
        results = Parallel(n_jobs=self.runs.jobs, return_as="generator_unordered")(
            delayed(self.task.run)(run) for run in mine
        )
        for result in results:
            self.store.add(result)
            bar.update()
        self.store.reload()
        if left := self.store.missing(runs):
            raise ProblemError(
                f"part: {len(left)} runs of the other parts are not done; run this part again "
                "after them"
            )

    def check(self) -> dict[Run, Price]:
        """Refuse what is wrong with a method before any run; the price of a run of each.

        Raises:
            ProblemError: phases have too few steps to train an adapter; as `Task.check`.
        """
        rate, prices = max(self.plan.choice.rates), dict[Run, Price]()
        for run in next(self.plan.stages(self.store))[:1]:
            self.task.data.of(run.seed, run.split)
        for name, kind in self.plan.candidates():
            run = Run(name, kind, self.plan.seeds[0], rate, passes=self.plan.passes)
            if kind != "frozen":  # which has the steps of its method, the one before
                price = self.task.check(run)
            prices[run] = price
        self._require_steps(prices, rate)
        self.checked = True
        return prices

    def _needed(self, rate: float) -> int:
        """The steps with which an adapter learns."""
        return math.ceil(LEARNS / rate) if "adam" in self.task.args.optim else 1

    def _require_steps(self, prices: Mapping[Run, Price], rate: float) -> None:
        """Raise ProblemError, which names all methods with too few steps and what would do."""
        few = {
            run: price
            for run, price in prices.items()
            if price.phases and price.steps(run.passes) < self._needed(rate)
        }
        if not few:
            return
        phases = " and ".join(
            f"{title(run)} a phase of {price.steps(run.passes)} steps" for run, price in few.items()
        )
        least = max(price.least(self._needed(rate)) for price in few.values())
        known = ((self.plan.methods[run.method], self.task.args) for run in few)
        short = any(has_upper_level(x[0]) and arguments_of(*x).lower_steps < 4 for x in known)
        more = f", or the method defaults = {OPEN}" if short else ""
        raise ProblemError(
            f"passes: {self.plan.passes:g} leave {phases}, and at a rate of {rate:g} an adapter "
            f"learns in {self._needed(rate)}; give {math.ceil(least)} passes or higher rates{more}"
        )

    def estimate(self, prices: Mapping[Run, Price]) -> str:
        """What each method's missing runs take: those by which seeds choose, and those reported.

        ``least`` are the passes with which an adapter learns at the highest rate.
        """
        rows = [["method", "choosing", "reported", "steps", "passes", "least", "minutes"]]
        done = Counter((x.method, x.kind, x.passes, x.split is None) for x in self.store.results)
        total, needed = 0.0, self._needed(max(self.plan.choice.rates))
        for run, price in prices.items():
            last = len(self.plan.seeds) * len(self.plan.endings)
            planned = self.plan.count(run.method, run.kind) - last, last
            counts = [
                max(0, count - done[run.method, run.kind, run.passes, reported])
                for reported, count in zip((False, True), planned, strict=True)
            ]
            minutes = sum(counts) * price.seconds / 60 / abs(self.runs.jobs)
            total += minutes
            steps = (
                " + ".join([str(price.steps(run.passes))] * price.phases) if price.phases else ""
            )
            least = f"{price.least(needed):.0f}" if price.phases else ""
            cells = [steps, f"{run.passes:.0f}", least, f"{minutes:.1f}"]
            rows.append([title(run), *map(str, counts), *cells])
        jobs = "" if self.runs.jobs == 1 else f" with jobs={self.runs.jobs}"
        whole = f"together about {total:.0f} minutes{jobs}, by a few steps of each method"
        texts = aligned(rows), whole, self.task.layers, self.store.remark()
        return "\n".join(text for text in texts if text)


def title(run: Run) -> str:
    """The name of a method or an ablation."""
    return run.method + ABLATIONS[run.kind]


def require_pickled(task: Task) -> None:
    """Raise ProblemError if ``task`` cannot be sent to other processes.

    Classes that other processes cannot import by name are pickled by value.
    """
    names = {type(method).__module__ for method in task.methods.values()}
    for module in (sys.modules[name] for name in names if name in sys.modules):
        if module.__name__.endswith(".py") or not module.__package__:
            cloudpickle.register_pickle_by_value(module)
    try:
        cloudpickle.dumps(task)
    except (TypeError, AttributeError, ValueError, pickle.PicklingError) as error:
        raise ProblemError(
            f"jobs: what the runs share cannot be pickled for other processes ({error}); make it "
            "in base_model or in a method's prepare, or leave jobs at 1"
        ) from error
