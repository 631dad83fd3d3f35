"""Do hypergradients over many hyper-parameters of a training beat search at equal passes?

    pip install -e ".[examples,optuna]"
    python benchmarks/tune.py --json benchmarks/results/tune.json

LoRA in the last two layers of MiniLM, 200 tweets or movie sentences, 40 steps of AdamW with warm-up
and decay (`tune_runs`): 25 or 26 hyper-parameters. Every method selects by the loss of 100 held-out
rows; 400 test rows are only reported (`tune_tables`). A method's cost is its forward+backward and
second backward passes over batches, in trainings of 40. Parts: ``develop``, the settings of the
descent and the rate of full fine-tuning, on development seeds and rows; ``compare``, all methods.
A search is an entry of the JSON file, which is written after each training: an interrupted
benchmark goes on from it. It takes some 40 minutes of one core.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import io
import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measure import contents, keep_memory, table
from scipy.stats import qmc
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from attribution_tables import TASKS, Row, Runs
from text_data import quiet
from tune_runs import DEVELOPMENT_SEEDS, RANGES, STEPS, Tuned, hypergradient, level
from tune_tables import BUDGETS, CONTROL, OURS, RANDOM, TPE, decision, tables_of, targets_of

SEEDS, PLAIN = (0, 1, 2, 3, 4), 4
ONE_RATE = "one rate"
#: The rate of B in rates of A, of LoRA+ (arXiv:2402.12354).
RATIO = 16.0
#: The best of these on the development seeds, by the mean held-out loss, is ``FULL_RATE``.
FULL_RATES = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
FULL_RATE = 2e-4
#: Factors of the rate that Prodigy finds (arXiv:2306.06101), of its documentation.
FACTORS = (1.0, 0.5, 2.0)


@dataclass(frozen=True)
class Descent:
    """How the held-out loss descends over u, from the best of the first plain rates.

    A step is along −g or −sign(g), and ``length`` is its 2-norm at first, in logarithms. Where the
    held-out loss falls, u moves and the length grows by half. Otherwise the length becomes a third,
    and the next step is along the same gradient.

    Attributes:
        orders: over how many orders of the data a gradient is averaged.
        sign: whether all coordinates of a step have the same size.
        random: whether g is drawn from a normal distribution, for each step anew.
    """

    length: float = 1.0
    orders: int = 1
    sign: bool = False
    random: bool = False

    def direction(self, gradient: Tensor) -> Tensor:
        """Of a step, with 2-norm 1."""
        along = gradient.sign() if self.sign else gradient
        return -along / along.norm()


DESCENTS = {
    "gradient, length 1": Descent(),
    "gradient, length 3": Descent(length=3.0),
    "gradient, length 1, 3 orders": Descent(orders=3),
    "sign, length 1": Descent(sign=True),
    "sign, length 0.3": Descent(length=0.3, sign=True),
    "sign, length 1, 3 orders": Descent(orders=3, sign=True),
}
#: Chosen on the development seeds, by the mean test loss.
CHOSEN = DESCENTS["sign, length 0.3"]


class Search:
    """An entry of the file, with the trials of a search in order."""

    def __init__(self, runs: Runs, tuned: Tuned, part: str, task: str, method: str) -> None:
        key = {"part": part, "task": task, "seed": tuned.seed, "method": method}
        self.runs, self.level, self.row = runs, tuned, runs.entry(**key)
        self.trials: list[Row] = self.row.setdefault("trials", [])

    def train(self, u: Tensor, trainings: float = 1.0, optimizer: Any = None) -> Row:
        """Train at u and measure: the test rows only where the trial can be selected."""
        self.level.train(u, optimizer=optimizer)
        rows = self.level.rows
        trial: Row = {"trainings": trainings, "held": rounded(self.level.measure(rows.held)[0])}
        if all(trial["held"] < other["held"] for other in self.trials):
            trial["loss"], trial["accuracy"] = map(rounded, self.level.measure(rows.test))
        self.trials.append(trial)
        return trial

    def all_of(self, points: Iterable[Tensor], **options: Any) -> None:
        """A trial at each of ``points``."""
        for u in list(points)[len(self.trials) :]:
            self.train(u, **options)
            self.runs.save()


def rounded(value: float) -> float:
    """``value`` with six digits, for a file."""
    return float(f"{value:.6g}")


def rates(count: int, factor: float = 1.0) -> list[float]:
    """Rates on a logarithmic scale, of which the first 4, 12 and 28 are almost equally spaced."""
    least, largest = RANGES["rate"]
    sequence = qmc.Halton(1, scramble=False).fast_forward(4).random(count)[:, 0]
    return [factor * math.exp(least + (largest - least) * float(x)) for x in sequence]


def at_random(search: Search, count: int) -> list[Tensor]:
    """Points from the uniform distribution over the space."""
    source = torch.Generator().manual_seed(search.level.seed)
    least, largest = torch.tensor(search.level.space.limits()).T
    shares = torch.rand(count, len(least), generator=source)
    return list(least + (largest - least) * shares)


def tpe(search: Search, plain: list[Row], count: int) -> None:
    """Optuna's TPE over the space, after the plain rates, whose trials are known."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=search.level.seed))
    space = search.level.space
    for rate in rates(len(plain)):
        values = map(float, space.plain(rate))
        study.enqueue_trial({str(k): value for k, value in enumerate(values)})
    search.trials += plain[len(search.trials) :]
    for number in range(count):
        trial = study.ask()
        u = [trial.suggest_float(str(k), *limits) for k, limits in enumerate(space.limits())]
        if number == len(search.trials):
            search.train(torch.tensor(u))
            search.runs.save()
        study.tell(trial, search.trials[number]["held"])


def descend(search: Search, plain: list[Row], descent: Descent, budget: float) -> None:
    """A descent that starts from the best of the plain rates, whose trials are known."""
    row, trials = search.row, search.trials
    if not trials:
        trials += plain
        lowest = min(trial["held"] for trial in plain)
        rate = rates(len(plain))[[trial["held"] for trial in plain].index(lowest)]
        start = search.level.space.plain(rate).tolist()
        row |= {"u": start, "lowest": lowest, "length": descent.length, "gradient": None}
        row |= {"cost": 0.0, "seconds": {"trainings": 0.0, "hypergradients": 0.0}}
    while True:
        here, known, cost = torch.tensor(row["u"]), row["gradient"], 0.0
        if descent.random:
            source = torch.Generator().manual_seed(1000 * search.level.seed + len(trials))
            known = torch.randn(len(here), generator=source).tolist()
        if known is None:
            cost = row["cost"]
        if sum(trial["trainings"] for trial in trials) + cost + 1 > budget:
            break
        if known is None:
            found, row["cost"] = mean_gradient(search, here, descent.orders)
            known, cost = found.tolist(), row["cost"]
        gradient = torch.tensor(known)
        step = row["length"] * descent.direction(gradient)
        trial = search.train(here + step, cost + 1)
        trial["change"] = rounded(trial["held"] - row["lowest"])
        if not descent.random:
            trial["predicted"] = rounded(float(gradient @ step))
        if trial["change"] < 0:
            row |= {"u": (here + step).tolist(), "lowest": trial["held"], "gradient": None}
            row["length"] *= 1.5
        else:
            row |= {"length": row["length"] / 3, "gradient": known}
        search.runs.save()


def mean_gradient(search: Search, u: Tensor, orders: int) -> tuple[Tensor, float]:
    """The hypergradient at u over orders of the data, and its cost in trainings.

    The training at u in the first order is a trial already, whose steps can be kept.
    """
    found, passes, seconds = [], 0, search.row["seconds"]
    for order in range(orders):
        begin = time.process_time()
        steps = search.level.train(u, order, keep=True)
        middle = time.process_time()
        gradient, more = hypergradient(search.level, steps)
        seconds["trainings"] += middle - begin
        seconds["hypergradients"] += time.process_time() - middle
        found.append(gradient)
        passes += more + (len(steps) if order else 0)
    return torch.stack(found).mean(0), passes / STEPS


def develop(runs: Runs) -> None:
    """The descents, and the rates of full fine-tuning, on the development seeds."""
    for task, seed in zip(TASKS, DEVELOPMENT_SEEDS):
        full, tuned = level(task, seed, full=True), level(task, seed)
        Search(runs, full, "full", task, "full").all_of(map(full.space.plain, FULL_RATES))
        search = partial(Search, runs, tuned, "develop", task)
        plain = search("plain rates")
        plain.all_of(map(tuned.space.plain, rates(PLAIN)))
        for name, descent in DESCENTS.items():
            descend(search(name), plain.trials, descent, BUDGETS[1])
        close(runs, "develop", task, seed, BUDGETS[1])


def compare(runs: Runs, trials: int, quick: bool) -> None:
    """Every method on every task and seed, with up to ``trials`` trials of a search."""
    for seed, task in product(SEEDS[:1] if quick else SEEDS, TASKS):
        begin, tuned = time.process_time(), level(task, seed)
        search = partial(Search, runs, tuned, "compare", task)
        searches(search, trials)
        first = search(ONE_RATE).trials[:PLAIN]
        descend(search(OURS), first, CHOSEN, 2 * PLAIN if quick else trials)
        control = Descent(CHOSEN.length, random=True)
        descend(search(CONTROL), first, control, 2 * PLAIN if quick else min(trials, BUDGETS[0]))
        close(runs, "compare", task, seed, BUDGETS[-1] if quick else trials)
        print(task, seed, f"{time.process_time() - begin:.0f} s", flush=True)


def close(runs: Runs, part: str, task: str, seed: int, budget: int) -> None:
    """Note that all methods have done their trainings up to ``budget`` on a task and seed."""
    for row in runs.of(part):
        if (row["task"], row["seed"]) == (task, seed):
            row["budget"] = budget
    runs.save()


def searches(search: Callable[[str], Search], count: int) -> None:
    """The methods without hypergradients, with up to ``count`` trials.

    LoRA+ and Prodigy have at most ten and three.
    """
    from prodigyopt import Prodigy

    grid, drawn, prodigy = search(ONE_RATE), search(RANDOM), search("Prodigy")
    plain = grid.level.space.plain
    grid.all_of(map(plain, rates(count)))
    search("10 × the rate of full fine-tuning").all_of([plain(10 * FULL_RATE)])
    # A quarter of the rates: the geometric mean of A's and B's is that of one rate.
    pairs = rates(min(count, BUDGETS[0]), RATIO**-0.5)
    search("LoRA+, one rate").all_of(plain(rate, RATIO) for rate in pairs)
    for factor in FACTORS[len(prodigy.trials) :]:
        made = partial(Prodigy, lr=1.0, weight_decay=0.01, d_coef=factor)
        with redirect_stdout(io.StringIO()):  # it prints which decay it uses
            prodigy.all_of([plain(1.0)] * (len(prodigy.trials) + 1), optimizer=made)
    drawn.all_of(at_random(drawn, count))
    tpe(search(TPE), grid.trials[:PLAIN], max(PLAIN + 1, count))


def main() -> None:
    """Run what is missing in the JSON file, and summarise all of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="all searches; goes on from it")
    parser.add_argument("--quick", action="store_true", help="few trials of one seed, a minute")
    parser.add_argument("--trials", type=int, default=BUDGETS[-1], help="at most, of a search")
    parser.add_argument("--part", choices=("develop", "compare"), help="this part alone")
    given = parser.parse_args()
    given.device = "cpu"
    torch.set_num_threads(1)
    keep_memory()
    quiet()
    runs = Runs(given.json)
    if given.part != "compare" and not given.quick:
        develop(runs)
    if given.part != "develop":
        compare(runs, PLAIN if given.quick else given.trials, given.quick)
    tables, targets = tables_of(runs), targets_of(runs)
    for title, rows in tables.items():
        print(f"\n{title}\n\n{table(rows)}")
    said = {}
    if targets:
        said = {"decision": decision(runs)}
        print(f"\nTargets\n\n{table([t.record() for t in targets])}\n\n{said['decision']}")
    more = {k: v for k, v in contents(given, tables, targets, {}).items() if k != "details"}
    runs.save(said | more)


if __name__ == "__main__":
    main()
