"""The value function against backward passes: how fast does each estimator lower it?

    python benchmarks/estimators convergence --json benchmarks/results/convergence.json

Problems A (penalties of a logistic regression, in the box [−12, 6]) and B (weights of noisy
images), full batch, float64. Every estimator has the same two optimizers: Adam at the lower level
of A, gradient descent at that of B, Adam at the upper levels. First and second backward passes of
either loss count one each, those of lower steps included. The value is F(u, w*(u)), where Newton's
method (A) or L-BFGS (B) computes w*; these do not count.

``--json`` also draws docs/convergence.png.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.measure import arguments, report
from benchmarks.pages import DOCS
from hyperopt_peft import Engine, NonFiniteError, ProblemError
from hyperopt_peft.engine import minimize
from hyperopt_peft.problems.textbook import hypercleaning, logistic
from hyperopt_peft.utils.plots import lines
from hyperopt_peft.utils.restore import perturbed

METHODS = [
    "direct",
    "darts:xi=1.0",
    "darts:xi=lr",
    "sama",
    "unrolled:steps=10",
    "neumann:terms=20",
    "cg:steps=10",
    "cg:steps=30",
    "minres:steps=30",
    "nystrom:rank=10,steps=10",
    "warm",
    "f2sa",
    "exact",
]
FIGURE = DOCS / "convergence.png"


def problem_a() -> tuple[Any, Any, Any]:
    """The levels, and a projection of the penalties onto their box."""
    upper, lower = logistic.breast_cancer()
    # The penalties come to span eight orders of magnitude, too many for one step length.
    lower.optimizer = torch.optim.Adam(lower.variables, lr=0.02)
    (penalties,) = upper.variables

    @torch.no_grad()
    def box() -> None:
        penalties.clamp_(-12, 6)

    return upper, lower, box


def problem_b() -> tuple[Any, Any, Any]:
    """The levels; the weights have no bounds."""
    upper, lower = hypercleaning.digits()
    return upper, lower, lambda: None


def value(upper: Any, lower: Any) -> float:
    """F(u, w*(u)); then w is restored."""
    with perturbed(lower.variables):
        if isinstance(lower, logistic.Logistic):
            newton(lower)
        else:
            minimize(lower, tolerance=1e-7)
        return float(upper.evaluate(None)[0].detach())


def newton(level: logistic.Logistic) -> None:
    """Move w, ``(d,)``, to the minimum by Newton steps, each halved until the loss falls."""
    w = level.w
    for _ in range(100):
        loss = level.loss(None)
        (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
        rows = [torch.autograd.grad(g, w, retain_graph=True)[0] for g in gradient]
        step = torch.linalg.solve(torch.stack(rows), gradient.detach())
        if step.norm() <= 1e-10 * (1 + w.norm()):
            return
        with torch.no_grad():
            start = w.clone()
            for halvings in range(30):
                w.copy_(start - 0.5**halvings * step)
                if level.loss(None) <= loss:
                    break


def curve(make: Any, method: str, calls: int) -> tuple[list[tuple[int, float]], Any]:
    """About thirty points (backward passes so far, value) within ``calls``, and the upper level."""
    upper, lower, project = make()
    points, spent = [(0, value(upper, lower))], 0
    try:
        engine = Engine(upper, lower, method, lower_steps=10, warmup_steps=100, progress=False)
        while spent < calls:
            (record,) = engine.run(1)
            project()
            spent += engine.lower_steps + record["gradients"] + record["products"]
            if spent - points[-1][0] >= calls / 30:
                points.append((spent, value(upper, lower)))
    except (NonFiniteError, ProblemError) as error:
        print(f"{method} ends after {spent} calls: {error}", flush=True)
    return points, upper


def main() -> None:
    """Run all estimators, print the values and draw the figure."""
    options = arguments("the value function against backward passes", calls=20_000)
    calls = 100 if options.quick else options.calls
    problems = {"A": problem_a, "B": problem_b}
    runs = {
        key: {method: curve(make, method, calls) for method in METHODS}
        for key, make in problems.items()
    }
    curves = {key: {m: points for m, (points, _) in of.items()} for key, of in runs.items()}
    rows: list[dict[str, Any]] = [
        {"estimator": m}
        | {f"{k}: value": of[m][-1][1] if len(of[m]) > 1 else None for k, of in curves.items()}
        | {"B: test accuracy": runs["B"][m][1].test_accuracy() if len(curves["B"][m]) > 1 else None}
        for m in METHODS
    ]
    report(options, {f"Value after {calls} backward passes": rows}, {"curves": curves})
    if options.json is not None:
        draw(curves)


def draw(curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> None:
    """Draw one panel for each problem."""
    panels = {
        f"Problem {key}": {
            method: tuple(zip(*points, strict=True))
            for method, points in named.items()
            if len(points) > 1  # not refused
        }
        for key, named in curves.items()
    }
    lines(panels, FIGURE, xlabel="backward passes", ylabel="F(u, w*(u))", yscale="log")
