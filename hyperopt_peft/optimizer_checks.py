"""Whether an optimizer and its schedule are those of a level's variables."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hyperopt_peft.errors import ProblemError


def check_scheduler(scheduler: LRScheduler, optimizer: Optimizer | None, level: str) -> None:
    """Raise ProblemError unless ``scheduler`` is a schedule of ``optimizer``."""
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise ProblemError(
            f"{level}: scheduler must be a learning rate schedule that steps without a "
            f"metric, got {type(scheduler).__name__}"
        )
    if scheduler.optimizer is not optimizer:
        raise ProblemError(f"{level}: the scheduler drives another optimizer")


def check_optimizer(
    optimizer: Optimizer, names: Sequence[str], variables: Sequence[Tensor], level: str
) -> None:
    """Raise ProblemError unless ``optimizer`` holds exactly ``variables``, each once."""
    if not isinstance(optimizer, Optimizer):
        raise ProblemError(
            f"{level}: optimizer must be a torch.optim.Optimizer over the level's "
            f"variables, got {optimizer!r}"
        )
    known = {id(variable): name for name, variable in zip(names, variables, strict=True)}
    held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    foreign = [tuple(tensor.shape) for tensor in held if id(tensor) not in known]
    missing = [name for key, name in known.items() if key not in {id(t) for t in held}]
    if missing or foreign:
        raise ProblemError(
            f"{level}: the optimizer must hold exactly the level's variables; "
            f"it lacks {missing or 'none'} and also holds tensors of shape {foreign or 'none'}"
        )
    if len(held) > len(known):  # torch warns, and moves it twice a step
        twice = sorted({known[id(x)] for x in held if sum(x is y for y in held) > 1})
        raise ProblemError(f"{level}: the optimizer holds {twice} twice; give each once")
