"""Checks of two levels, and comparisons of estimators on them."""

from hyperopt_peft.diagnostics.curvature import spectrum
from hyperopt_peft.diagnostics.recommend import recommend
from hyperopt_peft.diagnostics.retraining import Retraining

__all__ = ["Retraining", "recommend", "spectrum"]
