"""Hypergradient estimators, their registry, and second-derivative products."""

from hyperopt_peft.hypergradients.estimate import hypergradient, open_oracle
from hyperopt_peft.hypergradients.estimator import Cost, Estimate, Estimator, Requirements
from hyperopt_peft.hypergradients.implicit.cg import ConjugateGradient
from hyperopt_peft.hypergradients.implicit.exact import Exact
from hyperopt_peft.hypergradients.implicit.function import FunctionSolver
from hyperopt_peft.hypergradients.implicit.kfac import KFAC
from hyperopt_peft.hypergradients.implicit.minres import MINRES
from hyperopt_peft.hypergradients.implicit.neumann import Neumann
from hyperopt_peft.hypergradients.implicit.nystrom import Nystrom
from hyperopt_peft.hypergradients.implicit.solver import Matvec, Solution, Solver
from hyperopt_peft.hypergradients.implicit.warm import WarmStart
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.penalty.f2sa import F2SA
from hyperopt_peft.hypergradients.penalty.penalty import Penalty
from hyperopt_peft.hypergradients.products import Product
from hyperopt_peft.hypergradients.registry import get_estimator, register, registered
from hyperopt_peft.hypergradients.unrolled.darts import DARTS
from hyperopt_peft.hypergradients.unrolled.direct import Direct
from hyperopt_peft.hypergradients.unrolled.fastmix import FastMix
from hyperopt_peft.hypergradients.unrolled.forward import Forward
from hyperopt_peft.hypergradients.unrolled.reverse import Unrolled
from hyperopt_peft.hypergradients.unrolled.sama import SAMA
from hyperopt_peft.utils.validation import Bound
from hyperopt_peft.utils.vector import Vector, dot, inner, zeros_like

__all__ = [
    "DARTS",
    "F2SA",
    "KFAC",
    "MINRES",
    "SAMA",
    "Bound",
    "ConjugateGradient",
    "Cost",
    "Direct",
    "Estimate",
    "Estimator",
    "Exact",
    "FastMix",
    "Forward",
    "FunctionSolver",
    "Matvec",
    "Neumann",
    "Nystrom",
    "Oracle",
    "Penalty",
    "Product",
    "Requirements",
    "Solution",
    "Solver",
    "Unrolled",
    "Vector",
    "WarmStart",
    "dot",
    "get_estimator",
    "hypergradient",
    "inner",
    "open_oracle",
    "register",
    "registered",
    "zeros_like",
]
