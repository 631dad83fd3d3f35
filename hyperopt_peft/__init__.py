"""Bilevel optimisation for parameter-efficient fine-tuning.

Names are imported on first use: ``import hyperopt_peft`` alone does not load PyTorch, and an
`Engine` with two levels does not load transformers. The methods, `hyperopt_peft.problems`, are in
the folder ``problems/`` of the repository.
"""

import logging
from typing import TYPE_CHECKING

from hyperopt_peft.utils.lazy import lazy

# PEFT imports bitsandbytes, which warns of a kernel for CPUs that is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from hyperopt_peft.attribution.attribute import attribute as attribute
    from hyperopt_peft.attribution.why import why as why
    from hyperopt_peft.comparison.compare import compare_methods as compare_methods
    from hyperopt_peft.core.problem import Problem as Problem
    from hyperopt_peft.diagnostics.check import check_problem as check_problem
    from hyperopt_peft.diagnostics.compare import compare_hypergradients as compare_hypergradients
    from hyperopt_peft.engine.early_stopping import EarlyStopping as EarlyStopping
    from hyperopt_peft.engine.engine import Engine as Engine
    from hyperopt_peft.engine.nested import Nested as Nested
    from hyperopt_peft.errors import HypergradientWarning as HypergradientWarning
    from hyperopt_peft.errors import NonFiniteError as NonFiniteError
    from hyperopt_peft.errors import ProblemError as ProblemError
    from hyperopt_peft.hypergradients import Estimator as Estimator
    from hyperopt_peft.hypergradients import Solver as Solver
    from hyperopt_peft.hypergradients import hypergradient as hypergradient
    from hyperopt_peft.hypergradients import register as register
    from hyperopt_peft.problems.bidora import BiDoRA as BiDoRA
    from hyperopt_peft.trainer.arguments import BilevelTrainingArguments as BilevelTrainingArguments
    from hyperopt_peft.trainer.method import Method as Method
    from hyperopt_peft.trainer.splits import split_dataset as split_dataset
    from hyperopt_peft.trainer.trainer import BilevelTrainer as BilevelTrainer
    from hyperopt_peft.trainer.trainer import bilevel as bilevel
    from hyperopt_peft.utils.versions import __version__ as __version__
    from hyperopt_peft.utils.versions import show_versions as show_versions
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
