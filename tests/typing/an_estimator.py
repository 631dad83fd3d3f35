from dataclasses import dataclass

from hyperopt_peft import Estimator, Solver, register
from hyperopt_peft.hypergradients import Estimate, Matvec, Oracle, Solution, Vector, get_estimator


@register("one_step", kind="identity")
@dataclass(frozen=True)
class OneStep(Estimator):
    xi: float = 1.0

    def estimate(self, oracle: Oracle) -> Estimate:
        gradient = oracle.upper_gradient
        with oracle.product("exact") as product:
            return Estimate(gradient.direct, -self.xi * product.mixed(gradient.b))


@register("damped", kind="implicit", tolerance=1.0)
@dataclass(frozen=True)
class Damped(Solver):
    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        return Solution(0.5 * b, None, 0)


estimator: Estimator = get_estimator("one_step:xi=0.5")
