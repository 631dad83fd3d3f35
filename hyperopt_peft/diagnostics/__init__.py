"""Whether a pair of levels is sound, and which estimator suits it."""
