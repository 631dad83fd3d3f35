"""Betty's options, and the estimators that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.validation import NonNegativeInt, PositiveFloat, PositiveInt, require_types

#: What to use in place of other values than the default, "bf16", "cpu" and "gpu".
REFUSED = {"first_order": 'hyperopt_peft.Engine with "unrolled:steps=k"'}
REFUSED |= dict.fromkeys(("precision", "initial_dynamic_scale", "scale_factor"), "bf16")
REFUSED |= dict.fromkeys(("strategy", "backend", "distributed"), "BilevelTrainer under torchrun")
REFUSED |= dict.fromkeys(("darts_multitask", "sama_multitask"), "both losses in training_step")


class _Options:
    def __post_init__(self) -> None:
        for option in fields(self):  # type: ignore[arg-type]
            name, value = option.name, getattr(self, option.name)
            if name in REFUSED and value not in (option.default, "bf16", "cpu", "gpu"):
                raise ProblemError(f"{name}={value!r} is not supported; use {REFUSED[name]}")
        require_types(self)


@dataclass
class Config(_Options):
    """Options of an `ImplicitProblem`, as in Betty; others than the supported are a ProblemError.

    ``cg_alpha`` cancels in the solution; ``log_local_step`` and ``retain_graph`` have no effect.

    Example:
        >>> Config(precision="fp16")
        Traceback (most recent call last):
        hyperopt_peft.errors.ProblemError: precision='fp16' is not supported; use bf16
    """

    type: Literal["darts", "cg", "neumann", "sama"] = "darts"
    unroll_steps: PositiveInt = 1
    first_order: bool = True
    retain_graph: bool = False
    allow_unused: bool = True
    gradient_accumulation: PositiveInt = 1
    gradient_clipping: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    initial_dynamic_scale: float = 4096.0
    scale_factor: float = 2.0
    warmup_steps: NonNegativeInt = 0
    log_step: int = -1
    log_local_step: bool = False
    darts_alpha: PositiveFloat = 0.01
    darts_multitask: bool = False
    sama_adam_alpha: PositiveFloat = 1.0
    sama_multitask: bool = False
    neumann_iterations: NonNegativeInt = 1
    neumann_alpha: PositiveFloat = 1.0
    cg_iterations: PositiveInt = 1
    cg_alpha: PositiveFloat = 1.0

    def estimator(self, level: Problem) -> str:
        """The estimator of hypergradients through ``level``."""
        product = "difference" if level.nested else "exact"
        if self.type == "cg":
            return f"cg:steps={self.cg_iterations},tolerance=1e-12,product={product}"
        if self.type == "neumann":
            terms, step = self.neumann_iterations, self.neumann_alpha
            return f"neumann:terms={terms},step_size={step},product={product}"
        epsilon = self.darts_alpha if self.type == "darts" else self.sama_adam_alpha
        if self.type == "sama" and "adam" in type(level.optimizer).__name__.lower():
            if self.gradient_accumulation > 1:
                raise ProblemError(f"{level.name}: sama cannot accumulate gradients; use darts")
            return f"sama:epsilon={epsilon}"
        # Betty's darts: H⁻¹ = I at the end of the step, where "darts" is at its start.
        return f"neumann:terms=0,step_size=1,product=difference,epsilon={epsilon}"


@dataclass
class EngineConfig(_Options):
    """Options of an `Engine`; as `Config`. Reports are printed: ``logger_type`` has no effect."""

    train_iters: NonNegativeInt = 50000
    valid_step: PositiveInt = 500
    logger_type: str = "none"
    roll_back: bool = False
    backend: str = "nccl"
    strategy: Literal["default", "cpu", "gpu"] = "default"
    early_stopping: bool = False
    early_stopping_mode: Literal["min", "max"] = "min"
    early_stopping_tolerance: PositiveInt = 5
    early_stopping_metric: str = "loss"
    distributed: bool = False
