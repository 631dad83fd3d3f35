"""Hypergradient estimators: one a file, a registry, and the products they share."""

from hyperopt_peft.hypergradients.cg import ConjugateGradient
from hyperopt_peft.hypergradients.compare import Comparison, compare_hypergradients
from hyperopt_peft.hypergradients.darts import DARTS
from hyperopt_peft.hypergradients.direct import Direct
from hyperopt_peft.hypergradients.estimate import hypergradient
from hyperopt_peft.hypergradients.estimator import Estimate, Estimator, Matvec, Solution, Solver
from hyperopt_peft.hypergradients.exact import Exact
from hyperopt_peft.hypergradients.f2sa import F2SA
from hyperopt_peft.hypergradients.forward import Forward
from hyperopt_peft.hypergradients.minres import MINRES
from hyperopt_peft.hypergradients.neumann import Neumann
from hyperopt_peft.hypergradients.nystrom import Nystrom
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.penalty import Penalty
from hyperopt_peft.hypergradients.products import Product
from hyperopt_peft.hypergradients.registry import get_estimator, register, registered
from hyperopt_peft.hypergradients.sama import SAMA
from hyperopt_peft.hypergradients.unrolled import Unrolled
from hyperopt_peft.hypergradients.vector import Vector, dot, zeros_like
from hyperopt_peft.hypergradients.warm import WarmStart

__all__ = [
    "DARTS",
    "F2SA",
    "MINRES",
    "SAMA",
    "Comparison",
    "ConjugateGradient",
    "Direct",
    "Estimate",
    "Estimator",
    "Exact",
    "Forward",
    "Matvec",
    "Neumann",
    "Nystrom",
    "Oracle",
    "Penalty",
    "Product",
    "Solution",
    "Solver",
    "Unrolled",
    "Vector",
    "WarmStart",
    "compare_hypergradients",
    "dot",
    "get_estimator",
    "hypergradient",
    "register",
    "registered",
    "zeros_like",
]
