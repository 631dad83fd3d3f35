"""The two phases of a method: a search over both levels, then a training of the lower one."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import has_length

from hyperopt_peft.adapters.layers import adapter_settings
from hyperopt_peft.engine import checkpoint
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer import checks
from hyperopt_peft.trainer.data import collating
from hyperopt_peft.trainer.levels import TwoLevelTrainer
from hyperopt_peft.trainer.method import Method, has_upper_level
from hyperopt_peft.trainer.tags import INDEX, numbered
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.distributed import gather, reshard, sharded_like
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.validation import require_settings

#: Files of the search: the lower level's initial values, and both levels' values at its end.
INITIAL, LEARNED = "initial.pt", "learned.pt"
#: TRL's name of the adapter with which DPOTrainer and KTOTrainer compare.
REFERENCE = "ref"


class PhasesTrainer(TwoLevelTrainer):
    """A Trainer of one phase, or of the two phases of a method."""

    #: The method that makes the levels; None if the user gave levels.
    method: Method | None = None
    #: The trainer of the second phase; None before that begins.
    retrainer: Any = None
    _search: dict[str, Any] | None = None  # settings of the search, in the second phase too
    _rows: tuple[Any, Any]  # of the method, before the upper level's are split off

    def _set_up_method(
        self, model: Any, args: Any, method: Method, train: Any, upper: Any, trainer: dict[str, Any]
    ) -> None:
        """Initialise the trainer for the first, or only, phase of ``method``."""
        self.method, bilevel = method, has_upper_level(method)
        args = args.with_defaults(method.defaults)
        if trainer.get("peft_config") is not None:
            trainer["peft_config"] = method.adapter(copy.deepcopy(trainer["peft_config"]))
        self._options = options_of_retraining(trainer)
        self.tags = method.tags
        if INDEX in method.tags:
            train, upper = numbered(train, upper)
        self._rows = train, upper = method.rows(train, upper)
        if not bilevel:
            train, upper = method.all_rows(train, upper), None
        levels = {"lower": prepared_lower_of, "upper": upper_of if bilevel else None}
        data = {"train_dataset": train, "upper_dataset": upper}
        self._set_up(model, args, **levels, **data, **trainer)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As `transformers.Trainer.train`; ``True`` resumes from the last complete checkpoint.

        With a method, this runs the search and the second phase, and returns the result of the
        last phase. ``True`` finds the last checkpoint of either phase. A resumed run equals the
        uninterrupted run bit for bit, with the exceptions in docs/distributed.md.

        Raises:
            ProblemError: there is no complete checkpoint, or it is damaged or has other settings or
                data; the run has fewer steps than ``lower_steps``; the collator cannot batch the
                examples; at a level's first step the loss is no scalar or ignores a variable.
            NonFiniteError: a loss, gradient or curvature is not finite, and ``args.non_finite`` is
                ``"raise"``. The message names step and batch.
        """
        folder = Path(self.args.output_dir or "")
        self.passes.begin()
        if not self.has_second_phase:
            point = checkpoint.to_resume(resume_from_checkpoint, folder)
            output = self.train_phase(point, *args, **kwargs)
            if self.method is not None and not self._callback.signalled:
                if self.upper is not None:
                    self._end_search(folder)
                self._finish()
            return output
        arguments = self.args.for_retraining()
        again = Path(arguments.output_dir or "")
        point = checkpoint.to_resume(resume_from_checkpoint, folder, again)
        retrain = {n: x for n, x in self.args.bilevel_settings().items() if "retrain" in n}
        self._search = {**self.settings(), **retrain}
        if point is not None and point[0].resolve().parent == again.resolve():
            saved = point[1].get("settings", {}).get("search", {})
            require_settings(str(point[0]), saved, "this run", self._search)
            variables = self._level_values()
            _assign(variables, _read(folder / LEARNED, variables))
        else:
            initial = None
            if self.args.retrain == "scratch":
                initial = self._initial(resumed=point is not None)
            if hasattr(self.model, "peft_config"):
                rows = self.train_dataset, self.upper_dataset
                lower, upper = (len(x) if has_length(x) else 0 for x in rows)
                checks.warn_of_short_phase("search", self.args, lower)
                checks.warn_of_short_phase("retraining", arguments, lower + upper)
            output = self.train_phase(point, *args, **kwargs)
            if self._callback.signalled:  # the search is unfinished
                return output
            self._end_search(folder, initial)
            point = None
        self._finish()
        self.retrainer = self.retraining(arguments)
        return self.retrainer.train_phase(point, *args, **kwargs)

    @property
    def has_second_phase(self) -> bool:
        """Whether a second phase, training of the lower level alone, follows the search."""
        return self.method is not None and self.upper is not None and self.args.retrain != "none"

    def train_phase(
        self, resumed: tuple[Path, Mapping[str, Any]] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run this trainer's phase from the checkpoint ``resumed`` (folder, record), or anew."""
        self.skipped = 0
        try:
            with self._callback.run(resumed):
                distributed.broadcast([x for _, x in self.named_tensors()], self.args.device)
                folder = None if resumed is None else str(resumed[0])
                return super().train(folder, *args, **kwargs)
        finally:
            self.passes.end()
            if self.upper_batches is not None:
                self.upper_batches.close()

    def all_rows(self) -> Any:
        """The rows of the second phase, as the method makes them from both levels' rows."""
        assert self.method is not None
        return self.method.all_rows(*self._rows)

    def retraining(self, args: Any) -> Any:
        """The trainer of the second phase: a copy of this one, without upper level, on all rows."""
        trainer = copy.copy(self)  # keeps a subclass's attributes, which its loss may read
        trainer.__dict__.pop("_data_fingerprints", None)
        with as_prepared(self.model):
            given = {"train_dataset": self.all_rows(), "processing_class": self.processing_class}
            trainer._set_up(self.model, args, lower=lower_of, upper=None, **given, **self._options)
        return trainer

    def _show_rows(self) -> None:
        """Show the lower level's rows to the method, without unused columns."""
        if self.method is None or type(self.method).read_rows is Method.read_rows:
            return
        model = None if self.is_fsdp_enabled else self.model  # FSDP2 may load parameters later
        rows = checks.read_rows(self)
        collate = collating("train_dataset")(self.data_collator)
        try:
            with replay(RandomState.capture()), self.compute_loss_context_manager():
                self.method.read_rows(model, rows, collate)
        except KeyError as error:
            text = f"read_rows: reads {error}, which rows or batches lack; name the column in tags"
            raise ProblemError(f"{type(self.method).__name__}.{text}") from error

    def settings(self) -> dict[str, Any]:
        """As `TwoLevelTrainer.settings`, with the options of method and adapter."""
        method, settings = self.method, super().settings()
        if method is None:
            return settings
        options: Any = fields(method) if is_dataclass(method) else ()
        more = adapter_settings(self.model) if hasattr(self.model, "peft_config") else {}
        more["method"] = type(method).__name__
        more |= {f"{more['method']}.{x.name}": getattr(method, x.name) for x in options}
        if self._search is not None and self.upper is None:
            more["search"] = self._search
        return {**json.loads(json.dumps(more, default=str)), **settings}

    def release_models(self) -> None:
        """Delete accelerate's wrapper of the model, in both phases."""
        if self.retrainer is not None:
            self.retrainer.release_models()
        self.model_wrapped = self.model
        self.accelerator.free_memory()

    def _finish(self) -> None:
        """Replace ``model`` by the method's plain model."""
        model = self.model if self.method is None else self.method.finish(self.model)
        if model is not self.model:
            self.model = self.model_wrapped = model

    @torch.no_grad()
    def _end_search(self, folder: Path, initial: Mapping[str, Tensor] | None = None) -> None:
        """Let the method change its variables, give the lower level ``initial``, and save both.

        A resumed run calls ``finish`` again, which reads them.
        """
        assert self.method is not None
        reshard(self.model)
        self.method.after_search(self.model)
        if initial is not None:
            _assign(dict(zip(self.lower.names, self.lower.variables)), initial)
        values = {name: gather(x.detach()) for name, x in self._level_values().items()}
        if self.args.should_save:
            checkpoint.write_state(folder / LEARNED, values)

    def _initial(self, resumed: bool) -> dict[str, Tensor]:
        """The lower level's initial values; a resumed run reads them from their file."""
        path = Path(self.args.output_dir or "") / INITIAL
        variables = dict(zip(self.lower.names, self.lower.variables, strict=True))
        if resumed:
            return _read(path, variables)
        values = {name: variable.detach().clone() for name, variable in variables.items()}
        if self.args.should_save:
            checkpoint.write_state(path, values)
        return values

    def _level_values(self) -> dict[str, Tensor]:
        """The variables of both levels by name; the lower level's names begin with ``lower.``."""
        lower, *upper = self.levels
        named = {f"lower.{name}": x for name, x in zip(lower.names, lower.variables)}
        return named | {n: x for each in upper for n, x in zip(each.names, each.variables)}


def lower_of(trainer: Any) -> Any:
    """The lower level of the method of ``trainer``."""
    return trainer.method.lower(trainer.model, trainer.task_loss)


def prepared_lower_of(trainer: Any) -> Any:
    """As `lower_of`, after the method has prepared the model."""
    # Methods and levels copy initial values, which must be equal on all processes.
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    distributed.broadcast(parameters, trainer.args.device)
    trainer.method.prepare(trainer.model)
    return lower_of(trainer)


def upper_of(trainer: Any) -> Any:
    """The upper level of the method of ``trainer``."""
    return trainer.method.upper(trainer.model, trainer.task_loss)


def options_of_retraining(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The second trainer's arguments; the callbacks are copied before the search changes them."""
    made_once = ("peft_config", "quantization_config", "processing_class")
    copies = [copy.copy(callback) for callback in trainer.get("callbacks") or ()]
    rest = {name: value for name, value in trainer.items() if name not in made_once}
    return {**rest, "callbacks": copies, "optimizers": (None, None)}


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
