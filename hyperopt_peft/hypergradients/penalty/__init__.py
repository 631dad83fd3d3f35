"""Estimators from first-order passes at minima of penalised objectives."""
