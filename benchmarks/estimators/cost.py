"""What each estimator costs, in forward+backward passes of the lower loss, beside its error.

    python benchmarks/estimators cost --json estimators.json

Cost: one iteration (a lower step, a hypergradient, an upper step) on the MLP of
`benchmarks.speed.mlp`, here and in the libraries of `benchmarks.speed.peers`; G is one
forward+backward of the lower loss. Error: relative to the exact hypergradient at the lower minimum
of problem A, penalties of a logistic regression, and problem B, weights of noisy images.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.measure import Target, arguments, interleaved, ratio, report
from benchmarks.memory import peak_memory
from benchmarks.speed.mlp import batch, engine, networks, weighted_loss
from benchmarks.speed.peers import betty, plain_loop, torchopt_root
from hyperopt_peft import compare_hypergradients
from hyperopt_peft.engine import minimize
from hyperopt_peft.problems.textbook import hypercleaning, logistic

CG = "cg:steps=5,damping=1.0,tolerance=0.0"
# On the MLP, cost only: its Hessian is indefinite, so the solvers are damped to take all steps.
COSTED = {
    "direct": "direct",
    "darts:scheme=forward": "darts:scheme=forward",
    "darts": "darts",
    "darts, exact product": "darts:product=exact",
    "neumann(5)": "neumann:terms=5,step_size=0.01",
    "neumann(5), own step": "neumann:terms=5",
    "cg(5)": CG,
    "cg(5), differences": CG + ",product=difference",
    "minres(5)": "minres:steps=5,damping=1.0,tolerance=0.0",
    "unrolled(1)": "unrolled:steps=1",
}
# At a minimum nothing need be damped, and `neumann` finds its step.
MEASURED = {
    "neumann(5)": "neumann:terms=5",
    "neumann(5), own step": "neumann:terms=5",
    "cg(5)": "cg:steps=5,tolerance=0.0",
    "cg(5), differences": "cg:steps=5,tolerance=0.0,product=difference",
    "minres(5)": "minres:steps=5,tolerance=0.0",
}


def peers() -> dict[str, Callable[[], object]]:
    """One iteration of every peer that is installed; says which are not."""
    installed: dict[str, Callable[[], object]] = {
        f"plain loop, {name}": plain_loop(method)
        for name, method in (("darts", "darts"), ("neumann(5)", "neumann"), ("cg(5)", "cg"))
    }
    if find_spec("torchopt"):
        installed["TorchOpt root, cg(5)"] = torchopt_root(5)
    else:
        print("TorchOpt is not installed: skipped (pip install torchopt)")
    if find_spec("betty"):
        installed["Betty darts"] = betty("darts")
        installed["Betty neumann(5)"] = betty("neumann", neumann_iterations=5, neumann_alpha=0.01)
        installed["Betty cg(5)"] = betty("cg", cg_iterations=5)
    else:
        print(
            "Betty is not installed: skipped "
            "(pip install --no-deps --ignore-requires-python betty-ml==0.2.1)"
        )
    return installed


def unit(device: str) -> Callable[[], object]:
    """G: a forward+backward of the lower loss."""
    net, weigher = networks(device)
    (x, y), w = batch(0, device), list(net.parameters())
    return lambda: torch.autograd.grad(weighted_loss(net(x), y, weigher), w)


def errors() -> tuple[dict[str, float], dict[str, float]]:
    """Relative errors on problems A and B."""
    relative = []
    for upper, lower in (logistic.breast_cancer(), hypercleaning.digits()):
        minimize(lower)
        methods = [MEASURED.get(name, method) for name, method in COSTED.items()]
        rows = compare_hypergradients(upper, lower, methods, repeats=1).rows
        relative.append({name: row.relative_error for name, row in zip(COSTED, rows)})
    return relative[0], relative[1]


def main() -> None:
    """Measure, print, and write JSON where asked for."""
    options = arguments("cost and error of every estimator, and of other libraries'")
    device = options.device
    engines = {name: engine(method, device) for name, method in COSTED.items()}
    others = peers() if device == "cpu" else {}
    runs: dict[str, Callable[[], object]] = {"G": unit(device)}
    runs |= {name: lambda e=e: e.run(1) for name, e in engines.items()}
    seconds = interleaved(runs | others, 15 if options.quick else 150, device, warmup=3)
    on_a, on_b = errors()
    rows: list[dict[str, Any]] = []
    for name in seconds:
        peak = peak_memory((runs | others)[name], torch.device(device)) / 2**20
        rows.append(
            {
                "estimator": name,
                "ms": 1e3 * statistics.median(seconds[name]),
                "G": ratio(seconds, name, "G"),
                "peak MB": peak,
                "error on A": on_a.get(name),
                "error on B": on_b.get(name),
            }
        )
    cost = {row["estimator"]: row["G"] for row in rows}
    targets = [
        Target(f"upper iteration on the MLP in G, {name}", cost[name], most)
        for name, most in (("darts:scheme=forward", 2.3), ("neumann(5)", 13.0), ("cg(5)", 15.0))
    ]
    report(options, {"Cost and error": rows}, targets, {"missing peers": _missing(others)})


def _missing(others: dict[str, Any]) -> list[str]:
    return [p for p in ("Betty", "TorchOpt") if not any(name.startswith(p) for name in others)]
