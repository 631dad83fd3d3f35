"""Bilevel optimisation for parameter-efficient fine-tuning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hyperopt_peft.check import check_problem
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
from hyperopt_peft.nested import Nested
from hyperopt_peft.problem import Problem

if TYPE_CHECKING:
    from hyperopt_peft.trainer import BilevelTrainer
    from hyperopt_peft.training_arguments import BilevelTrainingArguments
    from hyperopt_peft.upper_data import split_dataset

# Imported when they are asked for: Trainer and Datasets take longer to import than all the rest.
_LATER = {
    "BilevelTrainer": "trainer",
    "BilevelTrainingArguments": "training_arguments",
    "split_dataset": "upper_data",
}

__all__ = [
    "BilevelTrainer",
    "BilevelTrainingArguments",
    "Engine",
    "Estimator",
    "Nested",
    "NonFiniteError",
    "Problem",
    "ProblemError",
    "Solver",
    "check_problem",
    "compare_hypergradients",
    "fit",
    "hypergradient",
    "minimise",
    "register",
    "split_dataset",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"hyperopt_peft.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
