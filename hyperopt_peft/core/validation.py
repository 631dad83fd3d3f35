"""Checks of a level's variables, loss, gradient, optimizer, scheduler and saved state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from inspect import signature
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.autograd import HALF, graph_nodes
from hyperopt_peft.utils.distributed import to_local, world_size
from hyperopt_peft.utils.validation import require_settings

if TYPE_CHECKING:
    from hyperopt_peft.core.problem import Problem

NO_WRITES = "compute a new tensor, or write after the optimizer's step"
Variables = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]


def named_variables(variables: Variables, level: str) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """The names and tensors of ``variables``, checked; a tensor without a name gets a number."""
    if isinstance(variables, Tensor) or not isinstance(variables, Iterable):
        raise ProblemError(
            f"{level}: variables must be tensors or (name, tensor) pairs, such as [w] or "
            f"model.named_parameters(), got {type(variables).__name__}"
        )
    if isinstance(variables, Mapping):
        variables = variables.items()
    pairs: list[tuple[str, Tensor]] = []
    for index, item in enumerate(variables):
        pair = item if isinstance(item, tuple) else (f"variable {index}", item)
        if len(pair) != 2 or not isinstance(pair[1], Tensor):
            raise ProblemError(
                f"{level}: variable {index} must be a tensor or a (name, tensor) pair, got {pair}"
            )
        name, tensor = str(pair[0]), pair[1]
        if not tensor.requires_grad:
            raise ProblemError(f"{level}: {name} requires no gradient; call requires_grad_() on it")
        if not tensor.is_leaf:
            raise ProblemError(
                f"{level}: {name} is computed from other tensors; give the leaf it is computed from"
            )
        if not _stretch(tensor):
            raise ProblemError(
                f"{level}: several entries of {name} share memory; give a clone() of it"
            )
        if tensor.is_complex():
            raise ProblemError(f"{level}: {name} is complex; give its real and imaginary parts")
        pairs.append((name, tensor))
    if not pairs:
        raise ProblemError(f"{level}: the level has no variables; give at least one tensor")
    names, tensors = zip(*pairs, strict=True)
    for name, count in Counter(names).items():
        if count > 1:
            raise ProblemError(f"{level}: two variables are called {name!r}; give unique names")
    if twice := shared_memory(pairs):
        raise ProblemError(
            f"{level}: {twice[0]} and {twice[1]} share memory; give one of them, or a clone()"
        )
    return names, tensors


def shared_memory(named: Iterable[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """The names of two entries that are one tensor or share memory, or None."""
    seen: dict[int, str] = {}
    stretches: list[tuple[str, int, int, str]] = []
    for name, tensor in named:
        if id(tensor) in seen:
            return seen[id(tensor)], name
        seen[id(tensor)] = name
        (here,) = to_local([tensor])
        if start := here.data_ptr():  # 0 if the tensor has no entries or no memory
            end = start + _stretch(here) * here.element_size()
            stretches.append((str(here.device), start, end, name))
    # Once the stretches are sorted by their starts, two neighbours overlap if any two do.
    for (device, _, end, name), (place, start, _, other) in pairwise(sorted(stretches)):
        if device == place and start < end:
            return name, other
    return None


def _stretch(tensor: Tensor) -> int:
    """The span in memory from the first entry to the last; 0 if entries may share memory."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return 0
        reach += max(size - 1, 0) * stride
    return reach


def loss_and_metrics(result: object, level: str) -> tuple[Tensor, dict[str, float]]:
    """The loss in ``result``, a scalar with a gradient (or ProblemError), and the other numbers."""
    metrics: dict[str, float] = {}
    if isinstance(result, Mapping):
        if "loss" not in result:
            raise ProblemError(
                f'{level}: loss returned a mapping with {list(result)}; put the scalar under "loss"'
            )
        numbers = {k: v for k, v in result.items() if k != "loss" and is_number(v)}
        metrics = {k: float(v.detach() if isinstance(v, Tensor) else v) for k, v in numbers.items()}
        result = result["loss"]
    if not isinstance(result, Tensor) or result.numel() != 1:
        shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ProblemError(
            f"{level}: loss must be a scalar tensor, got {shape}; return a mean or a sum"
        )
    if not result.requires_grad:
        raise ProblemError(
            f"{level}: the loss depends on no tensor that requires a gradient; look for "
            "detach(), .item(), torch.no_grad() or frozen variables"
        )
    return result.reshape(()), metrics


def runs_in_half(loss: Tensor, level: str) -> bool | None:
    """Whether a part of the autograd graph of ``loss`` is in half precision; None if it is hidden.

    A compiled function hides a part. Reentrant gradient checkpointing, a ProblemError, hides all.
    """
    nodes = list(graph_nodes([loss]))
    names = " ".join(node.name() for node in nodes)
    if "CheckpointFunction" in names:
        raise ProblemError(
            f"{level}: reentrant gradient checkpointing hides variables from the "
            'loss; enable checkpointing with gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
    outputs = (output for node in nodes for output in getattr(node, "_input_metadata", ()))
    half = any(output.dtype in HALF for output in outputs)
    return half or (None if "CompiledFunction" in names else False)


@contextmanager
def unwritten(*levels: Problem) -> Iterator[None]:
    """Check that the body, an evaluation of a loss, does not write to a variable of ``levels``.

    The check compares tensor versions, so that it misses a write through ``.data``. A variable
    keeps a written value. A level with lower levels moves variables itself, and checks its own
    evaluations. In a run of several processes DDP registers post-accumulate hooks.
    """
    if any(len(level.levels) > 1 for level in levels):
        levels = ()
    owned = [(level.name, n, x) for level in levels for n, x in zip(level.names, level.variables)]
    versions = [x._version for _, _, x in owned]
    for level, name, x in owned if world_size() == 1 else ():
        if x._post_accumulate_grad_hooks:
            raise ProblemError(
                f"{level}: {name} has a post-accumulate hook, which may change or remove its "
                "gradient; remove the hook, and let the level's optimizer do the steps"
            )
    try:
        yield
    finally:
        for (level, name, x), version in zip(owned, versions):
            if x._version != version:
                raise ProblemError(f"a loss writes to {level}'s {name}; {NO_WRITES}")


def rewritten(levels: Sequence[Problem], before: Sequence[Tensor]) -> list[str]:
    """The names of the variables of ``levels`` whose values differ from ``before``."""
    owned = [
        (f"{level.name}'s {n}", x) for level in levels for n, x in zip(level.names, level.variables)
    ]
    names, variables = zip(*owned)
    values = zip(names, to_local(variables), to_local(before))
    return [name for name, now, x in values if not torch.allclose(now, x, 0, 0, equal_nan=True)]


def missing_input_hint(batch: object, error: Exception, columns: Mapping[str, str]) -> str:
    """A hint if ``error`` of a loss comes from a missing input; else an empty string."""
    if batch is None and "NoneType" in str(error):
        return f"the loss got no batch ({error}); give the level data, or pass a batch"
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    if not isinstance(key, str) or not isinstance(batch, Mapping) or key in batch:
        return ""
    if key in columns:
        return f"reads the tag {key!r}, a column that {columns[key]} lacks; add it"
    return (
        f"the loss reads {key!r}, and the batch has only {', '.join(map(str, batch))}; "
        "add the column, and if the Trainer removes it, name it in the method's tags or set "
        "remove_unused_columns=False"
    )


def require_read(
    level: Problem, gradient: Sequence[Tensor | None], besides: Set[str] | None = None
) -> None:
    """Raise ProblemError if an entry of ``gradient``, one for each variable, is None.

    A variable that only the prior reads counts as None. ``besides`` has the names of the variables
    to check, which no other loss reads; None checks all variables.
    """
    for name, slope in zip(level.names, gradient, strict=True):
        unread = slope is None or name in level.evaluated.unread
        if unread and (besides is None or name in besides):
            raise ProblemError(
                f"{level.name}: no gradient reaches variable {name!r} at the first step; use the "
                "variable in the loss, or do not give it to the level"
            )


def is_number(value: object) -> bool:
    """Whether ``value`` is one real number: an int, a float or a tensor of one entry."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_level_state(level: Problem, state: object, stateful: Mapping[str, Any]) -> None:
    """Raise ProblemError if ``state`` does not fit ``level`` with the objects ``stateful``."""
    expected = {"variables", *stateful}
    if not isinstance(state, Mapping) or set(state) != expected:
        entries = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise ProblemError(
            f"{level.name}: the state must have {sorted(expected)}, got {entries}; use a state of "
            "this level"
        )
    for key in ("optimizer", "scheduler"):
        if key in stateful and _form(state[key]) != _form(stateful[key].state_dict()):
            raise ProblemError(
                f"{level.name}: the {key}'s state does not fit {type(stateful[key]).__name__} or "
                f"its parameter groups; create the level with the {key} of the saved run"
            )
    saved, current = (
        {f"{level.name}: variable {name!r}": tuple(v.shape) for name, v in named}
        for named in (state["variables"].items(), zip(level.names, level.variables, strict=True))
    )
    require_settings("the state", saved, "the level", current)


def _form(state: Mapping[str, Any]) -> Any:
    """The entries and the form of the parameter groups, equal for states of one class."""
    groups = state.get("param_groups", [])
    return set(state), [(len(group["params"]), set(group) - {"params"}) for group in groups]


def check_scheduler(scheduler: LRScheduler, optimizer: Optimizer | None, level: str) -> None:
    """Raise ProblemError unless ``scheduler`` is a schedule of ``optimizer``."""
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise ProblemError(
            f"{level}: scheduler must be a learning rate schedule that steps without a "
            f"metric, got {type(scheduler).__name__}"
        )
    if scheduler.optimizer is not optimizer:
        raise ProblemError(
            f"{level}: scheduler drives another optimizer; create it with the level's optimizer"
        )


def check_optimizer(optimizer: object, named: Iterable[tuple[str, Tensor]], owner: str) -> None:
    """Raise ProblemError unless ``optimizer`` holds exactly the variables ``named``."""
    if not isinstance(optimizer, Optimizer):
        raise ProblemError(
            f"{owner}: optimizer must be a torch.optim.Optimizer over the "
            f"variables to train, got {optimizer!r}"
        )
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ProblemError(
            f"{owner}: {type(optimizer).__name__} evaluates the loss within its step; choose "
            'another optimizer, or none and lower_steps="minimum", by which the Engine runs L-BFGS'
        )
    params = {id(x): x for group in optimizer.param_groups for x in group["params"]}
    owned = {id(variable): name for name, variable in named}
    foreign = [tuple(tensor.shape) for key, tensor in params.items() if key not in owned]
    missing = [name for key, name in owned.items() if key not in params]
    if missing or foreign:
        raise ProblemError(
            f"{owner}: optimizer must hold exactly the variables to train; add "
            f"{missing or 'none'}, and remove tensors of shape {foreign or 'none'}"
        )
