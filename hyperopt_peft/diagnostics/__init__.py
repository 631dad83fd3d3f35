"""Checks of two levels, and comparisons of estimators on them."""

from hyperopt_peft.diagnostics.curvature import spectrum

__all__ = ["spectrum"]
