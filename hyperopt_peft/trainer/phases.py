"""The two phases of a method: a search over both levels, then a training of the lower one.

The trainer of the second phase is a new one of the first one's class, without upper level, on the
method's plain model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import has_length

from hyperopt_peft.core.labels import RowLosses
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.engine import checkpoint
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer import checks
from hyperopt_peft.trainer.data import collating
from hyperopt_peft.trainer.fingerprint import options_of, settings_of
from hyperopt_peft.trainer.method import Method, defaults_of, has_upper_level
from hyperopt_peft.trainer.passes import PassCounter
from hyperopt_peft.trainer.tags import INDEX, numbered
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.distributed import gather, reshard, sharded_like
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.validation import require_settings

#: Files of the search: the lower level's initial values, and both levels' values at its end.
INITIAL, LEARNED = "initial.pt", "learned.pt"
#: TRL's name of the adapter with which DPOTrainer and KTOTrainer compare.
REFERENCE = "ref"


@dataclass(frozen=True)
class Phase:
    """What a trainer trains; it takes one as ``method``, with the rows of the levels."""

    method: Method | None  # None if the user gave levels
    lower: Any  # the level, or a function of the trainer that makes it
    upper: Any  # likewise, or None
    rows: tuple[Any, Any]  # of both levels, as `Method.rows` returned them
    tags: tuple[str, ...] = ()  # columns of a batch that a level reads and the model does not
    passes: PassCounter = field(default_factory=PassCounter)  # of both phases
    row_losses: RowLosses | None = None  # the user's rule for the losses of rows
    search: Mapping[str, Any] | None = None  # the settings of the search before this phase
    options: Mapping[str, Any] = field(default_factory=dict)  # of the method, before its hooks

    @property
    def rows_of_levels(self) -> tuple[Any, Any]:
        """The rows to train on; a baseline has one level on all rows."""
        if self.method is None or self.upper is not None:
            return self.rows
        return self.method.all_rows(*self.rows), None

    @property
    def reads_trainer(self) -> bool:
        """Whether the levels are functions of the trainer, so that they may read its loss."""
        return is_function(self.lower)


def first_phase(
    method: Method | None,
    lower: Any,
    upper: Any,
    rows: tuple[Any, Any],
    args: Any,
    options: dict[str, Any],
    rule: RowLosses | None,
) -> tuple[Phase, Any]:
    """The first, or only, phase on the user's rows, and ``args`` with the method's defaults.

    The method may change the PEFT config among ``options`` of the trainer.
    """
    if lower is not None and method is None:
        return Phase(None, lower, upper, rows, row_losses=rule), args
    if lower is not None or upper is not None:
        raise ProblemError("method: give a method, or the levels lower and upper, and not both")
    method = method or Method()
    settings = options_of(method)
    if options.get("peft_config") is not None:
        options["peft_config"] = method.adapter(copy.deepcopy(options["peft_config"]))
    rows = method.rows(*(numbered(*rows) if INDEX in method.tags else rows))
    upper = upper_of if has_upper_level(method) else None
    known: dict[str, Any] = {"row_losses": rule, "options": settings}
    phase = Phase(method, prepared_lower_of, upper, rows, method.tags, **known)
    return phase, args.with_defaults(defaults_of(method, rule))


def is_function(level: Any) -> bool:
    """Whether ``level`` is a function that makes one."""
    return callable(level) and not isinstance(level, Problem | nn.Module | type)


def level_of(trainer: Any, level: Any) -> Any:
    """A level of ``trainer``: ``level``, or what the function ``level`` makes."""
    return level(trainer) if is_function(level) else level


def lower_of(trainer: Any) -> Problem:
    """The lower level of the method of ``trainer``."""
    level: Problem = trainer.method.lower(trainer.model, trainer.task_loss)
    return level


def prepared_lower_of(trainer: Any) -> Problem:
    """As `lower_of`, after the method has prepared the model."""
    # Methods and levels copy initial values, which must be equal on all processes.
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    distributed.broadcast(parameters, trainer.args.device)
    trainer.method.prepare(trainer.model)
    return lower_of(trainer)


def upper_of(trainer: Any) -> Problem:
    """The upper level of the method of ``trainer``."""
    level: Problem = trainer.method.upper(trainer.model, trainer.task_loss)
    return level


def run(trainer: Any, resume: str | bool | None, *args: Any, **kwargs: Any) -> Any:
    """Train ``trainer``, and with a method that of its second phase; see `BilevelTrainer.train`."""
    two = trainer.has_second_phase
    folder, arguments = Path(trainer.args.output_dir or ""), trainer.args.for_retraining()
    later = Path(arguments.output_dir)
    point = checkpoint.to_resume(resume, folder, *([later] if two else []))
    retrain = {n: x for n, x in trainer.args.bilevel_settings().items() if "retrain" in n}
    settings = settings_of(trainer)
    search = {**settings, **retrain}
    if two and point is not None and point[0].resolve().parent == later.resolve():
        saved = point[1].get("settings", {}).get("search", {})
        require_settings(str(point[0]), saved, "this run", search)
        variables = dict(trainer.named_tensors())
        _assign(variables, _read(folder / LEARNED, variables))
    else:
        initial = None
        if two and trainer.args.retrain == "scratch":
            initial = _initial(trainer, resumed=point is not None)
        if two and hasattr(trainer.model, "peft_config"):
            rows = trainer.train_dataset, trainer.upper_dataset
            lower, upper = (len(x) if has_length(x) else 0 for x in rows)
            checks.warn_of_short_phase("search", trainer.args, lower)
            checks.warn_of_short_phase("retraining", arguments, lower + upper)
        output = trainer.train_phase(point, settings, *args, **kwargs)
        if trainer.method is None or trainer.callback.signalled:
            return output
        if trainer.upper is not None:
            _end_search(trainer, folder, initial)
        point = None
    _continue_with(trainer.method.finish(trainer.model), trainer)
    if not two:
        _export(trainer)
        return output
    trainer.retrainer = second = trainer.retraining(arguments, search)
    output = second.train_phase(point, settings_of(second), *args, **kwargs)
    if not second.callback.signalled:
        _export(second, trainer)
    return output


def show_rows(trainer: Any) -> None:
    """Let the method of ``trainer`` read the lower level's rows, without unused columns."""
    method = trainer.method
    if method is None or type(method).read_rows is Method.read_rows:
        return
    model = None if trainer.is_fsdp_enabled else trainer.model  # FSDP2 may load parameters later
    rows = checks.read_rows(trainer)
    collate = collating("train_dataset")(trainer.data_collator)
    try:
        with replay(RandomState.capture()), trainer.compute_loss_context_manager():
            method.read_rows(model, rows, collate)
    except KeyError as error:
        text = f"read_rows: reads {error}, which rows or batches lack; name the column in tags"
        raise ProblemError(f"{type(method).__name__}.{text}") from error


def _continue_with(model: Any, *trainers: Any) -> None:
    for trainer in trainers:
        if model is not trainer.model:
            trainer.model = trainer.model_wrapped = model


def _export(last: Any, *earlier: Any) -> None:
    """Let the method fold what is left, after the last phase; `saved` then checks the adapter."""
    _continue_with(last.method.export(last.model), last, *earlier)
    for trainer in (last, *earlier):
        trainer.trained = True


@torch.no_grad()
def _end_search(trainer: Any, folder: Path, initial: Mapping[str, Tensor] | None) -> None:
    """Let the method change its variables, give the lower level ``initial``, and save both.

    A resumed run calls ``finish`` again, which reads them.
    """
    reshard(trainer.model)
    trainer.method.after_search(trainer.model)
    if initial is not None:
        _assign(dict(zip(trainer.lower.names, trainer.lower.variables)), initial)
    values = {name: gather(x.detach()) for name, x in trainer.named_tensors()}
    if trainer.args.should_save:
        checkpoint.write_state(folder / LEARNED, values)


def _initial(trainer: Any, resumed: bool) -> dict[str, Tensor]:
    """The lower level's initial values; a resumed run reads them from their file."""
    path = Path(trainer.args.output_dir or "") / INITIAL
    variables = dict(zip(trainer.lower.names, trainer.lower.variables, strict=True))
    if resumed:
        return _read(path, variables)
    values = {name: variable.detach().clone() for name, variable in variables.items()}
    if trainer.args.should_save:
        checkpoint.write_state(path, values)
    return values


def options_again(options: Mapping[str, Any]) -> dict[str, Any]:
    """The second trainer's ``options``; the callbacks are copied before the search changes them."""
    made_once = ("peft_config", "quantization_config", "processing_class")
    copies = [copy.copy(callback) for callback in options.get("callbacks") or ()]
    rest = {name: value for name, value in options.items() if name not in made_once}
    return rest | ({"callbacks": copies} if copies else {}) | {"optimizers": (None, None)}


@contextmanager
def as_prepared(model: Any) -> Iterator[None]:
    """Undo the changes that the constructor of a second trainer, in the body, makes to ``model``.

    TRL's trainers patch ``forward`` of the model for a fused head. DPOTrainer and KTOTrainer copy
    an existing adapter to another one, `REFERENCE`, with which their loss compares.
    """
    forwards = {m: vars(m)["forward"] for m in model.modules() if "forward" in vars(m)}
    named = [(n, p) for n, p in model.named_parameters() if f".{REFERENCE}." in n]
    values = {name: parameter.detach().clone() for name, parameter in named}
    if values:  # the constructor would refuse a second one
        model.delete_adapter(REFERENCE)
    try:
        yield
    finally:
        for module, forward in forwards.items():
            module.forward = forward
        if values:
            with torch.no_grad():
                for name, value in values.items():
                    model.get_parameter(name).copy_(value)
        elif REFERENCE in getattr(model, "peft_config", ()):
            model.delete_adapter(REFERENCE)


@torch.no_grad()
def _assign(variables: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, variable in variables.items():
        variable.copy_(sharded_like(values[name], variable))


def _read(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file ``path``, with the names and shapes of ``like``."""
    values: dict[str, Tensor] = checkpoint.read_state(path)
    if {n: v.shape for n, v in values.items()} != {n: v.shape for n, v in like.items()}:
        raise ProblemError(f"{path}: the values are of another model; start a new run")
    return values
