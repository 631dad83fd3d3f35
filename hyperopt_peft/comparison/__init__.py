"""Whether a method is better than others, at equal price."""

from hyperopt_peft.comparison.compare import compare_methods
from hyperopt_peft.comparison.result import Comparison

__all__ = ["Comparison", "compare_methods"]
