"""The objective of benchopt's bilevel benchmark, for its interface to be tested offline."""

from __future__ import annotations

from typing import Any

import numpy as np
from benchopt import BaseObjective


class Objective(BaseObjective):
    """‖dF/du‖² of the value function, and what else the data set's ``metrics`` measure."""

    name = "Bilevel Optimization"
    min_benchopt_version = "1.6"

    def set_data(self, problem: dict[str, Any], metrics: Any) -> None:
        """``problem`` is what solvers are given; ``metrics(inner_var, outer_var)`` judges them."""
        self.problem, self.metrics = problem, metrics

    def get_objective(self) -> dict[str, Any]:
        """The arguments of a solver's ``set_objective``."""
        return self.problem

    def evaluate_result(self, inner_var: Any, outer_var: Any) -> dict[str, float]:
        """The metrics of a solver's result."""
        if not np.isfinite(outer_var).all():
            raise ValueError("the outer variable is not finite")
        result: dict[str, float] = self.metrics(inner_var, outer_var)
        return result

    def get_one_result(self) -> dict[str, Any]:
        """A result of the right shape."""
        return {key: self.problem[f"{key}0"] for key in ("inner_var", "outer_var")}
