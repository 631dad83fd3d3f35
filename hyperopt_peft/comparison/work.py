"""Does the missing runs of a comparison, in processes and parts, and estimates their time."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
from joblib import Parallel, delayed

from hyperopt_peft.comparison.choice import Plan
from hyperopt_peft.comparison.price import Price
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import ABLATIONS, Run, Task
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.checks import LEARNS
from hyperopt_peft.utils.tables import aligned


@dataclass
class Work:
    """Does the runs of a comparison; ``bar`` shows how many are done."""

    task: Task
    store: Store
    jobs: int
    part: tuple[int, int]
    bar: Any
    _prices: dict[Any, Price] = field(default_factory=dict)

    def do(self, runs: Sequence[Run]) -> None:
        """Do the missing ones of ``runs`` that belong to this part.

        Raises:
            ProblemError: the other parts have not done all of ``runs``, which later runs need.
        """
        number, count = self.part
        missing = set(self.store.missing(runs))
        every = enumerate(dict.fromkeys(runs))
        mine = [run for k, run in every if k % count == number - 1 and run in missing]
        priced = [(run, self._price(run)) for run in mine]
        results = Parallel(n_jobs=self.jobs, return_as="generator_unordered")(
            delayed(self.task.run)(run, price) for run, price in priced
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

    def require_learning(self, plan: Plan) -> None:
        """Raise ProblemError if a phase of a reported run has too few steps to train an adapter."""
        rate = max(plan.rates)
        for name, kind in plan.candidates():
            price = self._price(Run(name, kind, plan.seeds[0], min(plan.rates)))
            steps = max(0, min(price.steps(self.task.passes)))
            if steps * rate < LEARNS and "adam" in self.task.args.optim:
                raise ProblemError(
                    f"passes: {self.task.passes:g} leave {name} a phase of {steps} steps, which "
                    f"hardly train an adapter at a rate of {rate:g}; give more passes or higher "
                    "rates"
                )

    def _price(self, run: Run) -> Price:
        """The price of ``run``; with a frozen upper level it is the same."""
        key = run.method, run.kind == "one level", run.development
        if key not in self._prices:
            self._prices[key] = self.task.price(run)
        return self._prices[key]

    def estimate(self, plan: Plan) -> str:
        """The runs of each method, with their passes and minutes by one timed upper step."""
        rows, total = [["method", "runs", "steps", "passes", "minutes"]], 0.0
        for name, kind in plan.candidates():
            run = Run(name, kind, plan.seeds[0], plan.rates[0])
            self._price(run)  # fills the store of frozen layers
            price = self.task.price(run)
            steps = price.steps(self.task.passes)
            passes = sum(price.spent(steps).values())
            runs = plan.count(name, kind)
            minutes = runs * (price.start + passes * price.a_pass) / 60
            total += minutes
            numbers = [str(runs), " + ".join(map(str, steps)), f"{passes:.0f}", f"{minutes:.1f}"]
            rows.append([name + ABLATIONS[kind], *numbers])
        whole = f"together about {total / self.jobs:.0f} minutes as measured now"
        return "\n".join([aligned(rows), whole, self.task.layers])


def require_pickled(task: Task) -> None:
    """Raise ProblemError if ``task`` cannot be sent to other processes.

    Classes that other processes cannot import by name are pickled by value.
    """
    for module in {sys.modules[type(method).__module__] for method in task.methods.values()}:
        if module.__name__.endswith(".py") or not module.__package__:
            cloudpickle.register_pickle_by_value(module)
    try:
        cloudpickle.dumps(task)
    except (TypeError, AttributeError, ValueError, pickle.PicklingError) as error:
        raise ProblemError(
            f"jobs: what the runs share cannot be pickled for other processes ({error}); make it "
            "in base_model or in a method's prepare, or leave jobs at 1"
        ) from error
