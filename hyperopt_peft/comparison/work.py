"""Does the missing runs of a comparison, in processes and parts, and estimates their time."""

from __future__ import annotations

import pickle
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
from joblib import Parallel, delayed

from hyperopt_peft.comparison.choice import Plan
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import ABLATIONS, Run, Task
from hyperopt_peft.comparison.upper import OPEN, arguments_of
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.checks import LEARNS
from hyperopt_peft.trainer.method import has_upper_level
from hyperopt_peft.utils.tables import aligned


@dataclass
class Work:
    """Does the runs of a comparison; ``bar`` shows how many are done."""

    plan: Plan
    task: Task
    store: Store
    jobs: int
    part: tuple[int, int]
    bar: Any
    checked: bool = False

    def do(self, runs: Sequence[Run]) -> None:
        """Do the missing ones of ``runs`` that belong to this part.

        Raises:
            ProblemError: the other parts have not done all of ``runs``, which later runs need.
        """
        number, count = self.part
        missing = set(self.store.missing(runs))
        mine = [run for run in [*dict.fromkeys(runs)][number - 1 :: count] if run in missing]
        if mine and not self.checked:
            self.check()
        self.bar.update(len(runs) - len(mine))
        results = Parallel(n_jobs=self.jobs, return_as="generator_unordered")(
            delayed(self.task.run)(run) for run in mine
        )
        for result in results:
            self.store.add(result)
            self.bar.update()
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
        rate, steps = max(self.plan.choice.rates), dict[Run, list[int]]()
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
        rows, steps, total = [["method", "runs", "steps", "passes", "minutes"]], self.check(), 0.0
        minutes = self.task.seconds(first := next(iter(steps))) / 60
        done = Counter((x.method, x.kind, x.passes) for x in self.store.results)
        for run, each in steps.items():
            runs = self.plan.count(run.method, run.kind) - done[run.method, run.kind, run.passes]
            total += (runs := max(0, runs)) * minutes
            cells = " + ".join(map(str, each)), f"{run.passes:.0f}", f"{runs * minutes:.1f}"
            rows.append([run.method + ABLATIONS[run.kind], str(runs), *cells])
        whole = f"together about {total / self.jobs:.0f} minutes, by a few steps of {first.method}"
        return "\n".join(
            filter(None, [aligned(rows), whole, self.task.layers, self.store.remark()])
        )


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
