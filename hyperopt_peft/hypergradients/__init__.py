"""Hypergradient estimators, their registry, and second-derivative products."""

from hyperopt_peft.hypergradients import contrib
from hyperopt_peft.hypergradients.estimate import hypergradient, open_oracle
from hyperopt_peft.hypergradients.estimator import Estimator, Requirements
from hyperopt_peft.hypergradients.implicit.cg import ConjugateGradient
from hyperopt_peft.hypergradients.implicit.exact import Exact
from hyperopt_peft.hypergradients.implicit.function import FunctionSolver
from hyperopt_peft.hypergradients.implicit.minres import MINRES
from hyperopt_peft.hypergradients.implicit.neumann import Neumann
from hyperopt_peft.hypergradients.implicit.nystrom import Nystrom
from hyperopt_peft.hypergradients.implicit.solver import Matvec, Solution, Solver
from hyperopt_peft.hypergradients.implicit.warm import WarmStart
from hyperopt_peft.hypergradients.kernel import implicit_gradient
from hyperopt_peft.hypergradients.oracle import Estimate, Oracle
from hyperopt_peft.hypergradients.products import Product
from hyperopt_peft.hypergradients.registry import get_estimator, register, registered
from hyperopt_peft.hypergradients.unrolled.darts import DARTS
from hyperopt_peft.hypergradients.unrolled.direct import Direct
from hyperopt_peft.hypergradients.unrolled.reverse import Unrolled
from hyperopt_peft.utils.validation import Bound, option
from hyperopt_peft.utils.vector import Vector, dot, inner, zeros_like

__all__ = [
    "DARTS",
    "MINRES",
    "Bound",
    "ConjugateGradient",
    "Direct",
    "Estimate",
    "Estimator",
    "Exact",
    "FunctionSolver",
    "Matvec",
    "Neumann",
    "Nystrom",
    "Oracle",
    "Product",
    "Requirements",
    "Solution",
    "Solver",
    "Unrolled",
    "Vector",
    "WarmStart",
    "contrib",
    "dot",
    "get_estimator",
    "hypergradient",
    "implicit_gradient",
    "inner",
    "open_oracle",
    "option",
    "register",
    "registered",
    "zeros_like",
]
