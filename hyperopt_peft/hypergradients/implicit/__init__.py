"""Estimators that solve a linear system with the lower Hessian H."""
