"""Estimators that differentiate steps of the lower optimizer."""
