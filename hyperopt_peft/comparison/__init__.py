"""Whether a method is better than others, at equal price."""

from hyperopt_peft.comparison.compare import compare_methods
from hyperopt_peft.comparison.frozen_layers import compute_once
from hyperopt_peft.comparison.result import Comparison
from hyperopt_peft.comparison.tasks import AcrossTasks

__all__ = ["AcrossTasks", "Comparison", "compare_methods", "compute_once"]
