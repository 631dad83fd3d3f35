"""Checks of a pair of levels, and comparisons of estimators on it."""
