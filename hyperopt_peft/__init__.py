"""Bilevel optimisation for parameter-efficient fine-tuning."""

from hyperopt_peft.engine import Engine
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.fit import fit, minimise
from hyperopt_peft.hypergradients import (
    Estimator,
    Solver,
    compare_hypergradients,
    hypergradient,
    register,
)
from hyperopt_peft.problem import Problem

__all__ = [
    "Engine",
    "Estimator",
    "NonFiniteError",
    "Problem",
    "ProblemError",
    "Solver",
    "compare_hypergradients",
    "fit",
    "hypergradient",
    "minimise",
    "register",
]
