"""The solver for benchopt's bilevel benchmark, where benchopt and JAX are installed."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from hyperopt_peft import compare_hypergradients, hypergradient
from hyperopt_peft.engine import minimize

benchopt = pytest.importorskip("benchopt")
pytest.importorskip("jax")
FOLDER = Path(__file__).parents[2] / "benchmarks/benchopt"


@pytest.fixture(scope="module")
def parts() -> tuple[Any, ...]:
    solver = runpy.run_path(str(FOLDER / "solvers/hyperopt_peft.py"))
    dataset = runpy.run_path(str(FOLDER / "datasets/simulated.py"))["Dataset"]
    return solver, dataset.get_instance().get_data()


def levels(solver: Any, problem: Any) -> tuple[Any, ...]:
    w, u = (
        torch.from_numpy(problem[k].copy()).requires_grad_() for k in ("inner_var0", "outer_var0")
    )

    def level(own: Any, key: Any) -> Any:
        def whole(w: Any, u: Any, start: Any) -> Any:
            return problem[key](w, u)

        return solver["Level"](own, (w, u), whole, data=[0], optimizer=torch.optim.SGD([own], 0.1))

    return level(u, "f_outer_fb"), level(w, "f_inner_fb")


def test_torch_differentiates_jax_twice(parts: Any) -> None:
    solver, data = parts
    upper, lower = levels(solver, data["problem"])
    assert torch.autograd.gradcheck(lambda w, u: lower.function(0, w, u)[0], lower.both)
    assert torch.autograd.gradgradcheck(lambda w, u: lower.function(0, w, u)[0], lower.both)
    minimize(lower)
    (h,) = hypergradient(upper, lower, "exact")
    found = data["metrics"](*(x.detach().numpy() for x in lower.both))
    assert found["inner_distance"] < 1e-14
    assert float(h @ h) == pytest.approx(found["value"], rel=1e-6)
    (row,) = compare_hypergradients(upper, lower, ["cg:product=difference"]).rows
    assert row.relative_error < 1e-4


def test_the_solver_reaches_the_optimum(parts: Any) -> None:
    solver, data = parts
    instance = solver["Solver"].get_instance(
        hypergradient="cg:steps=10", step_size=0.3, outer_ratio=1.0, batch_size="full"
    )
    instance.set_objective(**data["problem"])
    values = []

    def callback() -> Any:
        if len(values) == 0:
            result = data["problem"]["inner_var0"], data["problem"]["outer_var0"]
        else:
            result = instance.get_result().values()
        values.append(data["metrics"](*result)["value"])
        return len(values) < 30

    instance.run(callback)
    assert values[-1] < 1e-10 * values[0]
    assert np.isfinite(values).all()


def test_benchopt_runs_it(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "bilevel")  # benchopt writes its results there
    command = [sys.executable, "-m", "benchopt", "run", "bilevel", "-n", "3", "-r", "1"]
    command += ["-s", "hyperopt_peft[hypergradient=cg]", "--no-plot", "--no-display"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (tmp_path / "bilevel/outputs").glob("*.parquet")
    table = pandas.read_parquet(results)
    values = table.sort_values("stop_val")["objective_value"]
    assert len(values) >= 3
    assert values.iloc[-1] < values.iloc[0] / 10
