"""Checks of two levels, and comparisons of estimators on them."""

from hyperopt_peft.diagnostics.curvature import spectrum
from hyperopt_peft.diagnostics.recommend import recommend

__all__ = ["recommend", "spectrum"]
