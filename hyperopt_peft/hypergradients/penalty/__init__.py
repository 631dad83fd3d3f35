"""Estimators from first-order passes at perturbed minima."""
