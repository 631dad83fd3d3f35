"""Betty's options, and the estimators that they stand for."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Literal

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.estimator import Estimator, Requirements
from hyperopt_peft.hypergradients.registry import get_estimator
from hyperopt_peft.hypergradients.unrolled.darts import DARTS
from hyperopt_peft.utils.validation import NonNegativeInt, PositiveFloat, PositiveInt, require_types

BF16, PROCESSES = "use precision='bf16'", "use BilevelTrainer under torchrun"
DISPLACED = "it leaves w displaced; add the upper loss to training_step"
#: What to use in place of other values of these options.
REFUSED = {"first_order": 'use hyperopt_peft.Engine with "unrolled:steps=k"'}
REFUSED |= {"precision": BF16, "initial_dynamic_scale": BF16, "scale_factor": BF16}
REFUSED |= {"strategy": PROCESSES, "backend": PROCESSES, "distributed": PROCESSES}
REFUSED |= {"darts_multitask": DISPLACED, "sama_multitask": DISPLACED}
#: Methods of Betty that are not called here.
NOT_CALLED = re.compile(
    r"get_batch\w*|patch_\w+|param_groups|custom_optimizer_step|optimizer_step|epoch_callback|step|"
    r"meta_trainable_parameters|training_step_exec|one_step_descent|step_\w+|get_loss|backward|"
    r"set_\w+|zero_grad|clip_grad|cache_states|recover_states|synchronize_params|initialize|"
    r"parse_\w+|configure_systems|configure_device|check_leaf|find_paths|dfs|cleanup|do_validation"
)


class Scripted:
    """What an engine and a problem have in common."""

    def __init_subclass__(cls) -> None:
        for method in filter(NOT_CALLED.fullmatch, vars(cls)):
            raise ProblemError(
                f"{cls.__name__}: {method} is not called; give batches as train_data_loader, groups"
                " of parameters to the optimizer, and use training_step and the callbacks"
            )

    def is_rank_zero(self) -> bool:
        """True, since there is one process."""
        return True


class AfterStep(DARTS):
    """`DARTS` at the end of the last lower step, as in Betty, and not at its start."""

    @property
    def requirements(self) -> Requirements:
        """No past step."""
        return replace(super().requirements, history=0)


class _Options:
    def __post_init__(self) -> None:
        for option in fields(self):  # type: ignore[arg-type]
            name, value = option.name, getattr(self, option.name)
            if name in REFUSED and value not in (option.default, "bf16", "cpu", "gpu"):
                raise ProblemError(f"{name}={value!r}: is not supported; {REFUSED[name]}")
        require_types(self)


@dataclass
class Config(_Options):
    """Options of an `ImplicitProblem`; see the page "From Betty".

    ``cg_alpha`` cancels in the solution; ``log_local_step`` and ``retain_graph`` have no effect.
    A value that is not supported raises ProblemError, with what to use instead.
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

    def estimator(self, level: Problem) -> Estimator:
        """The estimator of hypergradients through ``level``."""
        product = f"product={'difference' if level.nested else 'exact'}"
        if self.type == "cg":
            return get_estimator(f"cg:steps={self.cg_iterations},tolerance=1e-12,{product}")
        if self.type == "neumann":
            options = f"terms={self.neumann_iterations},step_size={self.neumann_alpha}"
            return get_estimator(f"neumann:{options},{product}")
        if self.type == "darts" or "adam" not in type(level.optimizer).__name__.lower():
            darts = self.type == "darts"
            return AfterStep(epsilon=self.darts_alpha if darts else self.sama_adam_alpha)
        if self.gradient_accumulation > 1:
            raise ProblemError(f"{level.name}: sama cannot accumulate gradients; use darts")
        return get_estimator(f"sama:epsilon={self.sama_adam_alpha}")


@dataclass
class EngineConfig(_Options):
    """Options of an `Engine`; as `Config`. ``logger_type`` has no effect: reports are printed."""

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
