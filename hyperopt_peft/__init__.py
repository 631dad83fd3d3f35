"""Bilevel optimisation for parameter-efficient fine-tuning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.diagnostics.check import check_problem
from hyperopt_peft.diagnostics.compare import compare_hypergradients
from hyperopt_peft.engine.engine import Engine
from hyperopt_peft.engine.fit import fit, minimise, minimize
from hyperopt_peft.engine.nested import Nested
from hyperopt_peft.errors import HypergradientWarning, NonFiniteError, ProblemError
from hyperopt_peft.hypergradients import (
    Estimator,
    Solver,
    hypergradient,
    register,
)

if TYPE_CHECKING:
    from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
    from hyperopt_peft.trainer.data import split_dataset
    from hyperopt_peft.trainer.trainer import BilevelTrainer

# Imported when they are asked for: Trainer and Datasets take longer to import than all the rest.
_LATER = {
    "BilevelTrainer": "trainer.trainer",
    "BilevelTrainingArguments": "trainer.arguments",
    "split_dataset": "trainer.data",
}

__all__ = [
    "BilevelTrainer",
    "BilevelTrainingArguments",
    "Engine",
    "Estimator",
    "HypergradientWarning",
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
    "minimize",
    "register",
    "split_dataset",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"hyperopt_peft.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
