"""An estimator and a solver as a user writes them."""

from dataclasses import dataclass

from hyperopt_peft import Estimator, Solver, register
from hyperopt_peft.hypergradients import (
    Bound,
    Estimate,
    Matvec,
    Oracle,
    Requirements,
    Solution,
    Vector,
    get_estimator,
    option,
)


@register("one_step", kind="identity")
@dataclass(frozen=True)
class OneStep(Estimator):
    """∂F/∂u − ξ·∂²f/∂u∂w·∂F/∂w."""

    xi: float = option(1.0, help="ξ")

    @property
    def requirements(self) -> Requirements:
        return Requirements(history=1)

    def estimate(self, oracle: Oracle) -> Estimate:
        gradient = oracle.upper_gradient
        with oracle.product("exact") as product:
            return Estimate(gradient.direct, -self.xi * product.mixed(gradient.b))


@register("damped", kind="implicit", tolerance=1.0)
@dataclass(frozen=True)
class Damped(Solver):
    """v = b/damping."""

    damping: float = option(1.0, help="the only curvature")

    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        return Solution(1 / self.damping * b, None, 0)


bound = Bound(">", 0)
estimator: Estimator = get_estimator("one_step:xi=0.5")
