"""Training without a Trainer: two levels, chains of levels, one level; checkpoints."""

from hyperopt_peft.engine.fit import fit, lbfgs, minimize

__all__ = ["fit", "lbfgs", "minimize"]
