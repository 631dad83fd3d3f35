"""Betty's interface (betty-ml 0.2.1); ``python -m hyperopt_peft.betty`` runs its scripts."""

from hyperopt_peft.betty.configs import Config, EngineConfig
from hyperopt_peft.betty.engine import Engine, ImplicitProblem

__all__ = ["Config", "Engine", "EngineConfig", "ImplicitProblem"]
