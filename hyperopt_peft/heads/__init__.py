"""A linear head on a model's frozen features, solved to the minimum of a convex loss.

``features`` computes the features, ``head`` is the head, and ``minimum`` solves it and chooses its
penalty. ``frozen_layers`` lets a model compute its frozen layers once a text.
"""

from hyperopt_peft.heads.features import Features, features_of
from hyperopt_peft.heads.frozen_layers import compute_once
from hyperopt_peft.heads.head import L2, Head, l2_penalty
from hyperopt_peft.heads.minimum import choose_l2, level_of, solve

__all__ = [
    "L2",
    "Features",
    "Head",
    "choose_l2",
    "compute_once",
    "features_of",
    "l2_penalty",
    "level_of",
    "solve",
]
