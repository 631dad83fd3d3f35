"""Training without a Trainer: two levels, chains of levels, one level; checkpoints."""

from hyperopt_peft.engine.fit import fit, minimize

__all__ = ["fit", "minimize"]
