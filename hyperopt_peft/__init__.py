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
from hyperopt_peft.trainer import BilevelTrainer
from hyperopt_peft.training_arguments import BilevelTrainingArguments
from hyperopt_peft.upper_data import split_dataset

__all__ = [
    "BilevelTrainer",
    "BilevelTrainingArguments",
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
    "split_dataset",
]
