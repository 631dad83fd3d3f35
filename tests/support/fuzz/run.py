"""Every estimator on random problems, and random runs of the Trainer: right, warned, or refused.

    python -m tests.support.fuzz.run --seed 3 --problems 300

prints what was neither, and each verdict's count. Problems of odd numbers are two levels at a point
and in an Engine, those of even numbers a run of the Trainer.
"""

import argparse
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from itertools import groupby
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from hyperopt_peft import Engine, check_problem
from hyperopt_peft.engine.step import DIVERGED
from hyperopt_peft.errors import HypergradientWarning, NonFiniteError, ProblemError
from hyperopt_peft.hypergradients import get_estimator, open_oracle
from hyperopt_peft.hypergradients.estimate import LARGE_RESIDUAL, check_estimator
from tests.support.fuzz.grammar import Form
from tests.support.fuzz.levels import Levels
from tests.support.fuzz.reference import (
    Functions,
    Point,
    current,
    flat,
    optimizer_of,
    restore,
    weight_of_squares,
)
from tests.support.fuzz.trainer import Classifier, Numbers, Run, Steps, trained
from tests.support.fuzz.trainer_reference import Reference
from tests.support.networks import differences

STEPS = 80  # of solvers
#: The relative error that rounding explains, of exact products and of differences.
ROUNDING = {"double": (1e-5, 1e-4), "single": (2e-3, 0.03)}
HALF = (0.3, 0.3)
#: The relative error of a run's movement that rounding explains.
OF_RUN = 1e-3
FAULTS = ("WRONG", "RAW", "IMPURE", "LATE")


@dataclass(frozen=True)
class Verdict:
    """What one estimator did on one problem; ``kind`` is a key of the counts."""

    kind: str
    form: Form | Run
    estimator: str
    words: str = ""

    @property
    def fault(self) -> bool:
        return self.kind in FAULTS


def judged(form: Form | Run, name: str, examine: Callable[[], tuple[str, str]]) -> Verdict:
    """The verdict of ``examine``, or of its exception or warning."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", HypergradientWarning)
            kind, words = examine()
    except HypergradientWarning as warning:
        kind, words = "warned", str(warning)
    except (ProblemError, NonFiniteError) as error:
        kind, words = "refused", str(error)
    except Exception as error:
        kind, words = "RAW", repr(error)[:200]
    return Verdict(kind, form, name, words)


def expected(point: Point, form: Form) -> Iterator[tuple[str, Tensor | None]]:
    """Each estimator, and its formula's value at ``point``; None where it has none there."""
    step_size = float(0.9 / torch.linalg.eigvalsh(point.h).abs().max())
    solved = f"steps={STEPS},tolerance=1e-8"
    yield "direct", point.d
    yield "darts", point.darts(1.0)
    yield "darts:xi=0.5,product=exact", point.darts(0.5)
    yield "darts:scheme=forward", point.darts(1.0)
    yield "darts:product=dots", point.darts(1.0)
    yield f"minres:{solved}", point.truth
    yield f"minres:{solved},product=difference", point.truth
    yield "exact", point.truth
    yield f"cg:{solved}", point.truth
    yield f"nystrom:{solved}", point.truth
    yield f"neumann:terms=30,step_size={step_size!r}", point.neumann(30, step_size)
    yield f"cg:{solved},product=difference,damping=0.5", point.damped(0.5)
    yield f"warm:steps={STEPS}", point.truth
    if point.definite:
        yield "f2sa:multiplier=1e3,tolerance=1e-6,inner_steps=500", point.penalised()

    def fresh(w: Tensor) -> torch.optim.Optimizer:
        return optimizer_of(form, [w])

    yield "sama", point.unrolled(1, fresh)
    yield "unrolled:steps=3", point.unrolled(3, fresh)
    yield "unrolled:steps=2,product=difference", point.unrolled(2, fresh)
    yield "fastmix", None


def close(form: Form, name: str, value: Tensor, target: Tensor, point: Point, slack: float) -> str:
    """Empty where ``value`` is ``target`` but for rounding and ``slack``; else the error."""
    exact, difference = ROUNDING.get(form.precision, HALF)
    solvers = ("minres", "cg", "nystrom", "neumann", "exact", "warm", "unrolled")
    first_order = "difference" in name or not name.startswith((*solvers, "direct"))
    rounding = difference if first_order and "product=exact" not in name else exact
    size = point.d.norm() + (point.m @ point.inverse).norm() * point.b.norm()
    error = (value - target).norm()
    if error <= rounding * max(target.norm(), 0.05 * size) + slack:
        return ""
    return f"error {error / target.norm().clamp_min(1e-12):.3g} of {target.norm():.3g}"


class Examination:
    """The estimators on one form, at its point and in an Engine's steps."""

    def __init__(self, seed: int) -> None:
        self.form = Form.draw(seed)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        self.state = current()
        self.functions = Functions(self.form, weight_of_squares(self.form, self.state))

    def levels(self) -> tuple[Levels, object, object]:
        levels = Levels(self.form, plain=False, curvature=self.functions.plain.curvature)
        optimizers = torch.optim.SGD(levels.u, lr=1.0), optimizer_of(self.form, levels.w)
        restore(self.state)
        return levels, *levels.problems(optimizers)

    def verdicts(self) -> Iterator[Verdict]:
        try:
            self.levels()
        except ProblemError as error:
            yield Verdict("refused", self.form, "construction", str(error))
            return
        except Exception as error:
            yield Verdict("RAW", self.form, "construction", repr(error))
            return
        point = Point(self.functions, self.functions.w, self.functions.u, self.state, self.state)
        for name, target in expected(point, self.form):
            yield self._judged(name, lambda n=name, t=target: self._at_the_point(n, t, point))
        for name in ("darts", "sama", "unrolled:steps=2", "cg:steps=150,tolerance=1e-8"):
            yield self._judged(f"Engine {name}", lambda n=name: self._in_training(n))

    def _judged(self, name: str, examine: Callable[[], tuple[str, str]]) -> Verdict:
        verdict = judged(self.form, name, examine)
        if verdict.kind in ("WRONG", "RAW") and self.form.hostile and self._found():
            return replace(verdict, kind="found by check_problem")
        return verdict

    def _found(self) -> bool:
        _, upper, lower = self.levels()
        check = check_problem(upper, lower, progress=False)
        return any(f.severity == "error" or f.kind == "wrong gradient" for f in check.findings)

    def _at_the_point(self, name: str, target: Tensor | None, point: Point) -> tuple[str, str]:
        levels, upper, lower = self.levels()
        estimator = get_estimator(name)
        before = self._snapshot(levels)
        try:
            oracle = open_oracle(upper, lower)
            check_estimator(estimator, upper, lower)
            result = oracle.estimate(estimator)
        finally:
            changed = differences(before, self._snapshot(levels))
        if changed:
            return "IMPURE", ", ".join(changed)
        value = flat(result.hypergradient.parts)
        if target is None:
            return "WRONG", "was not refused"
        slack = 0.0
        if result.residual:
            slack = 1.5 * result.residual * float((point.m @ point.inverse).norm() * point.b.norm())
        words = close(self.form, name, value, target, point, slack)
        if not words:
            return "right", ""
        if result.note or (result.residual or 0) > LARGE_RESIDUAL:
            return "warned", f"{result.note} {result.residual}"
        return "WRONG", f"{words}, residual {result.residual}"

    def _in_training(self, name: str) -> tuple[str, str]:
        """The first upper step of an Engine after two lower steps."""
        levels, upper, lower = self.levels()
        calls: list[tuple[str, object, Tensor]] = []
        levels.record = lambda level: calls.append((level, current(), flat(levels.w)))
        Engine(upper, lower, name, lower_steps=2, progress=False).run(1)
        value = -(flat(levels.u) - flat(levels.start))  # by a step of SGD with rate 1
        steps = [call[1:] for call in calls if call[0] == "lower"][:2]
        states, (_, start) = [state for state, _ in steps], steps[-1]
        above, last = next(call[1:] for call in calls if call[0] == "upper")
        f, u = self.functions, self.functions.u

        def fresh(w: Tensor) -> torch.optim.Optimizer:
            return optimizer_of(self.form, [w])

        point = Point(f, last, u, above, states[-1])
        if name == "darts":
            target = point.d - f.second(start, u, states[-1])[1] @ point.b
        elif name.startswith("cg"):
            if not point.definite:
                return "warned", "not judged: no minimum"
            target = point.truth
        elif self.form.precision not in ROUNDING:
            return "warned", "not judged: steps in half precision are others"
        else:  # sama's moments have those of the first step
            jacobian = f.unrolled(f.w, u, states, fresh, resting=int(name == "sama"))
            target = point.d + jacobian.T @ point.b
        words = close(self.form, name, value, target, point, 0.0)
        return ("WRONG", words) if words else ("right", "")

    @staticmethod
    def _snapshot(levels: Levels) -> dict[str, object]:
        owned = *levels.u, *levels.w
        kept = [x.detach().clone() for x in (*owned, *levels.network.state_dict().values())]
        of_torch, of_numpy, of_python = current()
        generators = of_torch, of_numpy[1].tolist(), of_numpy[2:], of_python
        return {"tensors": kept, "slopes": [x.grad for x in owned], "generators": generators}


def of_trainer(form: Run) -> tuple[str, str]:
    """Whether u and w after a run of ``form`` are those of the reference."""
    numbers = Numbers(form)
    steps = Steps(Classifier(form, numbers))
    with warnings.catch_warnings(record=True) as said, redirect_stdout(StringIO()):
        warnings.simplefilter("always", HypergradientWarning)
        try:
            with TemporaryDirectory() as folder:
                found = trained(form, numbers, steps, folder)
        except ProblemError as error:
            at_once = "\n" not in str(error) and not steps.done
            return "refused" if at_once else "LATE", f"in step {len(steps.done) + 1}: {error}"
    reference = Reference(form, numbers)
    begin = reference.w, reference.u
    reference.run(steps.done)
    pairs = zip("wu", found, (reference.w, reference.u), begin, strict=True)
    errors = [(name, relative(x - y, y - start)) for name, x, y, start in pairs]
    for log, expected in zip(steps.logs, reference.logs, strict=False):  # the last log is no step
        errors += [(name, abs(log[name] - y) / max(abs(y), 1e-2)) for name, y in expected.items()]
    wrong = [f"{name} {error:.2g}" for name, error in errors if not error < OF_RUN]
    if reference.residual > DIVERGED:
        wrong.append(f"a residual of {reference.residual:.2g}")
    warned = any(issubclass(x.category, HypergradientWarning) for x in said)
    return ("warned" if warned and wrong else "WRONG" if wrong else "right"), ", ".join(wrong)


def relative(error: Tensor, size: Tensor) -> float:
    return float(error.norm() / size.norm().clamp(min=1e-9))


def run(seeds: Iterable[int]) -> Iterator[Verdict]:
    torch.set_num_threads(1)
    for seed in seeds:
        if seed % 2:
            yield from Examination(seed).verdicts()
        else:
            form = Run.draw(seed)
            yield judged(form, f"Trainer {form.estimator}", partial(of_trainer, form))


def report(verdicts: Iterable[Verdict]) -> str:
    faults = groupby(filter(lambda v: v.fault, verdicts), lambda v: v.form)
    return "\n".join(
        "\n".join([str(form), *(f"    {v.kind} {v.estimator}: {v.words}" for v in each)])
        for form, each in faults
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", type=int, default=300)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, {arguments.problems} problems", flush=True)
    first = arguments.seed * 1_000_000
    counts: Counter[str] = Counter()
    for seed in range(first, first + arguments.problems):
        verdicts = list(run([seed]))
        counts.update(verdict.kind for verdict in verdicts)
        if faults := report(verdicts):
            print(faults, flush=True)
    print(dict(counts))
    return int(any(kind in FAULTS for kind in counts))


if __name__ == "__main__":
    raise SystemExit(main())
