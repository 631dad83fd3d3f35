"""Every estimator of a hypergradient, and one of your own, on a problem with a known answer.

    python examples/swap_estimators.py    # half a minute, no network

A regression predicts the course of diabetes from rows of ten clinics, some of which write down
other numbers. With x the ten measures of a patient and g the patient's clinic,

    upper: min over u          mean (x·w* − y)², over patients of a study
    lower: w*(u) = argmin w    mean e^(u_g) (x·w − y)² + ½·λ·‖w‖², over the clinics' patients

H w* = 2/n XᵀVy with H = 2/n XᵀVX + λI and V = diag e^(u_g), so that dF/du has a closed form. At
w*, each estimator by name is compared with it: the error, and the passes forward and backward.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hyperopt_peft import Estimator, Solver, compare_hypergradients, register
from hyperopt_peft.hypergradients import Estimate, Solution, Vector, dot, zeros_like
from hyperopt_peft.method import PositiveInt, TaskLevel, WeightedRows, row_losses
from hyperopt_peft.problems.textbook.ridge import split, standardised
from hyperopt_peft.utils.plots import lines
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn.functional import mse_loss

CLINICS, L2, RATE, BUDGETS = 10, 0.2, 0.1, (1, 2, 4, 8, 16, 32)
#: By the title of a panel, names with options; k is the budget of those that have one.
ESTIMATORS = {
    "error against the closed form, without a linear system": f"""direct darts:xi={RATE}
        fastmix:xi={RATE} sama unrolled:steps={{k}}
        f2sa""",
    "error against the closed form, where H v = ∂F/∂w is solved": """exact warm steepest:steps={k}
        neumann:terms={k} cg:steps={k} minres:steps={k} nystrom:rank=3,steps={k}""",
}


@register("steepest", kind="implicit", tolerance=0.1)
@dataclass(frozen=True)
class SteepestDescent(Solver):
    """An estimator of your own: v ← v + α r with r = b − Hv and α = rᵀr / rᵀHr (Cauchy 1847)."""

    steps: PositiveInt = 20

    def solve(self, matvec: Any, b: Vector) -> Solution:
        """The v with H v ≈ b."""
        v, r = zeros_like(b), b.copy()
        for _ in range(self.steps):
            q = matvec(r)
            length = dot(r, r) / dot(r, q)
            v.add_(r, length)
            r.add_(q, -length)
        return Solution(v, r.norm() / b.norm(), self.steps)


class Regression(nn.Module):
    """x·w, as a model of Transformers has it: two layers, one of which is the output layer."""

    config = SimpleNamespace(num_labels=1, problem_type="regression")

    def __init__(self) -> None:
        super().__init__()
        self.person, self.blood = (nn.Linear(d, 1, bias=False).double() for d in (4, 6))

    def get_output_embeddings(self) -> nn.Module:
        """The layer that ``fastmix`` differentiates."""
        return self.blood

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        """The predictions and, given ``labels``, the mean of their squared errors."""
        logits = self.person(x[:, :4]) + self.blood(x[:, 4:])
        loss = None if labels is None else mse_loss(logits[:, 0], labels)
        return SimpleNamespace(logits=logits, loss=loss)


@dataclass(frozen=True)
class ClosedForm(Estimator):
    """dF/du_g = −e^(u_g) Σ_i in g 2/n (x_i·w − y_i) x_iᵀ H⁻¹ ∂F/∂w: the known answer."""

    u: Tensor

    @torch.no_grad()
    def estimate(self, oracle: Any) -> Estimate:
        """The closed form at the levels' batches."""
        below, above = oracle.lower_batch, oracle.upper_batch
        h, w = solved(self.u, below)
        slope = 2 * above["x"].T @ (above["x"] @ w - above["labels"]) / len(above["x"])
        errors = (below["x"] @ w - below["labels"]) * (below["x"] @ torch.linalg.solve(h, slope))
        of_clinics = torch.zeros_like(self.u).index_add_(0, below["clinic"], errors)
        implicit = Vector([-2 / len(errors) * self.u.exp() * of_clinics])
        return Estimate(zeros_like(implicit), implicit)


def solved(u: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """H and w*."""
    x = 2 * batch["x"].T * u.detach().exp()[batch["clinic"]] / len(batch["x"])
    h = x @ batch["x"] + L2 * torch.eye(len(x), dtype=x.dtype)
    return h, torch.linalg.solve(h, x @ batch["labels"])


def levels() -> tuple[TaskLevel, WeightedRows, Tensor]:
    """Upper and lower level, at the lower one's minimum, and u."""
    torch.manual_seed(0)
    x, study, y, y_study = split(*load_diabetes(return_X_y=True))
    (y, y_study), clinic = standardised(y, y_study), torch.arange(len(x)) % CLINICS
    y = torch.where(clinic < 4, torch.randn_like(y), y)  # four clinics write down other numbers
    below, above = {"x": x, "labels": y, "clinic": clinic}, {"x": study, "labels": y_study}
    u, model = torch.zeros(CLINICS, dtype=x.dtype, requires_grad=True), Regression()
    for layer, part in zip((model.person, model.blood), solved(u, below)[1].split((4, 6))):
        layer.weight.data.copy_(part)
    lower = WeightedRows(
        model,
        lambda batch: u.exp()[batch["clinic"]],
        tags=["clinic"],
        row_losses=row_losses,  # the loss is the mean over labels
        data=[below],
        optimizer=torch.optim.SGD(model.parameters(), RATE),  # unrolled by some estimators
        prior=lambda variables: L2 / 2 * sum(w.square().sum() for w in variables),
    )
    return TaskLevel(model, [u], data=[above]), lower, u


def main() -> None:
    """Print and draw the error of every estimator against its passes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/swap_estimators"))
    output = parser.parse_args().output_dir
    panels = {title: names.split() for title, names in ESTIMATORS.items()}
    upper, lower, u = levels()
    curves: dict[str, dict[str, Any]] = {title: {} for title in panels}
    print(f"{'estimator':40}passes: relative error of dF/du, for k = {BUDGETS}")
    for title, each in ((title, each) for title, panel in panels.items() for each in panel):
        options = dict.fromkeys(each.format(k=k) for k in BUDGETS)
        table = compare_hypergradients(upper, lower, options, ClosedForm(u), 1, progress=False)
        if problems := [row.problem for row in table.rows if row.problem]:
            raise SystemExit(f"{each}: {problems[0]}")
        # A solver that has reached its tolerance does not spend the rest of its budget.
        points = {row.gradients + 2 * row.products: row.relative_error for row in table.rows}
        print(f"{each:40}" + "   ".join(f"{x}: {y:.2g}" for x, y in points.items()))
        curves[title][each.partition(":")[0]] = [*points], [*points.values()]
    output.mkdir(parents=True, exist_ok=True)
    axes: Any = {"xscale": "log", "yscale": "log", "xlim": (0.8, 1e3), "ylim": (1e-17, 1e2)}
    axes |= {"xlabel": "passes, forward and backward", "ylabel": "relative error"}
    lines(curves, output / "estimators.png", **axes)


if __name__ == "__main__":
    main()
