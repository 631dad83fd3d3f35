"""Further estimators, available by name like the others, each with tests of its own."""

from hyperopt_peft.hypergradients.contrib.f2sa import F2SA
from hyperopt_peft.hypergradients.contrib.fastmix import FastMix
from hyperopt_peft.hypergradients.contrib.sama import SAMA

__all__ = ["F2SA", "SAMA", "FastMix"]
