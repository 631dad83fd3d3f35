"""Does the missing runs of a comparison, in processes and parts, and estimates their time."""

from __future__ import annotations

import pickle
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
from joblib import Parallel, delayed
from tqdm.auto import tqdm

from hyperopt_peft.comparison.choice import Plan
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import ABLATIONS, Run, Task
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
        progress: whether a bar is shown.
        dry_run: print the runs with their passes and minutes, and do none.

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
            self.check()
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

    def check(self) -> dict[Run, list[int]]:
        """Refuse what is wrong with a method before any run; about the steps of a run of each.

        Raises:
            ProblemError: a phase has too few steps to train an adapter; as `Task.check`.
        """
        rate = max(self.plan.choice.rates)
        steps: dict[Run, list[int]] = {}
        for run in next(self.plan.stages(self.store))[:1]:
            self.task.data.of(run.seed, run.split)
        for name, kind in self.plan.candidates():
            run = Run(name, kind, self.plan.seeds[0], rate, passes=self.plan.passes)
            if kind != "frozen":  # which has the steps of its method, the one before
                each = self.task.check(run)
            steps[run] = each
            least = LEARNS if "adam" in self.task.args.optim else rate
            if each and min(each) * rate < least:
                method, args = self.plan.methods[name], self.task.args
                few = has_upper_level(method) and arguments_of(method, args).lower_steps < 4
                more = f", or the method defaults = {OPEN}" if few else ""
                raise ProblemError(
                    f"passes: {self.plan.passes:g} leave {name} a phase of {min(each)} steps, "
                    f"which hardly train an adapter at a rate of {rate:g}; give more passes or "
                    f"higher rates{more}"
                )
        self.checked = True
        return steps

    def estimate(self) -> str:
        """The missing runs of each method, their passes, and minutes by one timed short run."""
        rows: list[list[Any]] = [["method", "runs", "steps", "passes", "minutes"]]
        steps = self.check()
        first = next(iter(steps))
        minutes = self.task.seconds(first) / 60
        done = Counter((x.method, x.kind, x.passes) for x in self.store.results)
        for run, each in steps.items():
            count = self.plan.count(run.method, run.kind) - done[run.method, run.kind, run.passes]
            count = max(0, count)
            cells = " + ".join(map(str, each)), f"{run.passes:.0f}", f"{count * minutes:.1f}"
            rows.append([run.method + ABLATIONS[run.kind], count, *cells])
        total = sum(row[1] for row in rows[1:]) * minutes / self.runs.jobs
        whole = f"together about {total:.0f} minutes, by a few steps of {first.method}"
        texts = aligned(rows), whole, self.task.layers, self.store.remark()
        return "\n".join(text for text in texts if text)


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
