"""`TwoPhaseTrainer`: a search over both levels, then a retraining of the lower one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from hyperopt_peft.engine import checkpoint
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils.distributed import reshard, sharded_like

#: Files of the search: the lower level's initial values, and learned variables outside the model.
INITIAL, LEARNED = "initial.pt", "learned.pt"
#: TRL's name of the adapter with which DPOTrainer and KTOTrainer compare.
REFERENCE = "ref"


@dataclass
class TwoPhaseTrainingArguments(BilevelTrainingArguments):
    """The arguments of `TwoPhaseTrainer`; those of `BilevelTrainingArguments` are for the search.

    Example:
        >>> args = TwoPhaseTrainingArguments("outputs", retrain_steps=9, report_to="none")
        >>> args.for_retraining().max_steps
        9
    """

    retrain: Literal["none", "warm", "scratch"] = HfArg(
        default="warm",
        help="after the search, train the lower level with the upper one frozen on all examples: "
        "not at all, from where the search ended, or from the initial values",
    )
    retrain_learning_rate: float | None = HfArg(
        default=None, help="peak learning rate of the retraining; learning_rate if not given"
    )
    retrain_weight_decay: float | None = HfArg(
        default=None, help="weight decay of the retraining; weight_decay if not given"
    )
    retrain_epochs: float | None = HfArg(
        default=None, help="epochs of the retraining; num_train_epochs if not given"
    )
    retrain_steps: int | None = HfArg(
        default=None, help="steps of the retraining, in place of epochs; max_steps if not given"
    )
    retrain_gradient_accumulation_steps: int | None = HfArg(
        default=None,
        help="micro-batches a step of the retraining; gradient_accumulation_steps if not given",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        rates = ["retrain_learning_rate", "retrain_weight_decay"]
        self._require("not be negative", lambda x: x >= 0, *rates)
        self._require("be positive", lambda x: x > 0, "retrain_epochs", "retrain_steps")
        self._require("be at least 1", lambda n: n >= 1, "retrain_gradient_accumulation_steps")

    def resume_must_match(self) -> dict[str, Any]:
        """As `BilevelTrainingArguments.resume_must_match`; a search may resume without the rest."""
        values = super().resume_must_match()
        return {name: value for name, value in values.items() if not name.startswith("retrain")}

    def for_retraining(self) -> Self:
        """The arguments of the second phase; it writes to the folder ``retrain``."""
        args = copy.copy(self)
        args.output_dir = str(Path(self.output_dir or "") / "retrain")
        args.push_to_hub = False
        if self.retrain_epochs is not None:
            args.num_train_epochs, args.max_steps = self.retrain_epochs, -1
        for name, value in (
            ("max_steps", self.retrain_steps),
            ("learning_rate", self.retrain_learning_rate),
            ("weight_decay", self.retrain_weight_decay),
            ("gradient_accumulation_steps", self.retrain_gradient_accumulation_steps),
        ):
            if value is not None:
                setattr(args, name, value)
        return args


class TwoPhaseTrainer(BilevelTrainer):
    """A search over both levels, then a retraining of the lower one with the upper one frozen.

    The base of `BiDoRATrainer`. The retraining has its own trainer,
    ``retrainer``, with its own ``state.log_history``; a subclass makes it in ``retraining``.

    Args:
        trainer: the arguments of `BilevelTrainer`; ``args`` are `TwoPhaseTrainingArguments`.

    Raises:
        ProblemError: as `BilevelTrainer`.

    Example:
        >>> class Search(TwoPhaseTrainer):
        ...     def retraining(self, args):
        ...         level = {"lower": self.lower, "upper": None}
        ...         data = {"train_dataset": self.train_dataset}
        ...         return self.trainer_of(BilevelTrainer, args, **level, **data)
        >>> Search.retrainer is None  # until `train` has made it
        True
    """

    Arguments = TwoPhaseTrainingArguments
    args: TwoPhaseTrainingArguments
    retrainer: BilevelTrainer | None = None

    def retraining(self, args: Any) -> BilevelTrainer:
        """The trainer of the second phase, with the arguments ``args``; a subclass makes it."""
        raise NotImplementedError

    def trainer_of(self, kind: type[BilevelTrainer], args: Any, **options: Any) -> Any:
        """A further trainer of this one's model, of the class ``kind`` over the same parent.

        Args:
            kind: the class, before it is made over the parent.
            args: the settings.
            options: further arguments of the class, see `options_of_retraining`; data are as this
                trainer was given them.
        """
        made = kind.over(self.parent())
        with as_prepared(self.model):
            return made(self.model, args=args, processing_class=self.processing_class, **options)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Do the search and the retraining; returns the last phase's result.

        ``resume_from_checkpoint`` is a checkpoint's folder, or True for the last complete
        checkpoint of either phase. With ``enable_jit_checkpoint`` a SIGTERM ends either phase.
        """
        arguments = self.args.for_retraining()
        folder = Path(arguments.output_dir or "")
        if self.args.retrain == "none":
            point = checkpoint.to_resume(resume_from_checkpoint, folder.parent)
            return self.search(point, *args, **kwargs)
        point = checkpoint.to_resume(resume_from_checkpoint, folder.parent, folder)
        if point is not None and point[0].resolve().parent == folder.resolve():
            if learned := self._learned():
                _assign(learned, _read(folder.parent / LEARNED, learned))
        else:
            from_scratch = self.args.retrain == "scratch"
            if from_scratch:
                initial = self._initial(resumed=point is not None)
            output = self.search(point, *args, **kwargs)
            if self._callback.signalled:  # the search is unfinished
                return output
            reshard(self.model)
            if from_scratch:
                _assign(dict(zip(self.lower.names, self.lower.variables)), initial)
            learned = {name: variable.detach() for name, variable in self._learned().items()}
            if learned and self.args.should_save:
                checkpoint.write_state(folder.parent / LEARNED, learned)
            point = None
        self.retrainer = self.retraining(arguments)
        return self.retrainer._train_from(point, *args, **kwargs)

    def search(self, point: Any, *args: Any, **kwargs: Any) -> Any:
        """The first phase, from the checkpoint ``point`` with its record, or from the start."""
        return self._train_from(point, *args, **kwargs)

    def release_models(self) -> None:
        """As `BilevelTrainer.release_models`, for both phases."""
        if self.retrainer is not None:
            self.retrainer.release_models()
        super().release_models()

    def passes_of_an_upper_step(self) -> int:
        """Forward+backward passes over a micro-batch from one upper step of the search to the next.

        A hypergradient whose cost is not known counts as two.
        """
        args, cost = self.args, self.estimator.cost()
        of_upper = 2 if cost is None else cost.backward_passes
        of_lower_batch = args.lower_steps - 1 + of_upper - 1
        pieces = 1 if self.upper_batches is None else self.upper_batches.count  # of F
        return int(of_lower_batch * args.gradient_accumulation_steps + pieces)

    def _initial(self, resumed: bool) -> dict[str, Tensor]:
        """The lower level's initial values, which are also in a file for a resumed run."""
        path = Path(self.args.output_dir or "") / INITIAL
        variables = dict(zip(self.lower.names, self.lower.variables, strict=True))
        if resumed:
            return _read(path, variables)
        values = {name: variable.detach().clone() for name, variable in variables.items()}
        if self.args.should_save:
            checkpoint.write_state(path, values)
        return values

    def _learned(self) -> dict[str, Tensor]:
        """The upper variables outside the model, which a checkpoint of the retraining lacks."""
        assert self.upper is not None
        of_model = {id(parameter) for parameter in self.model.parameters()}
        named = zip(self.upper.names, self.upper.variables, strict=True)
        return {name: variable for name, variable in named if id(variable) not in of_model}


def options_of_retraining(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a second trainer, made before the search changes the callbacks' state."""
    made_once = ("peft_config", "quantization_config", "processing_class")
    copies = [copy.copy(callback) for callback in trainer.get("callbacks") or ()]
    rest = {name: value for name, value in trainer.items() if name not in made_once}
    return {**rest, "callbacks": copies, "optimizers": (None, None)}


@contextmanager
def as_prepared(model: Any) -> Iterator[None]:
    """Undo what the constructor of a second trainer, in the body, does to its ``model``.

    TRL's trainers patch ``forward`` of the model for a fused head. Those of preferences copy an
    adapter that they find to another one, `REFERENCE`, with which their loss compares.
    """
    forwards = {m: vars(m)["forward"] for m in model.modules() if "forward" in vars(m)}
    named = [(n, p) for n, p in model.named_parameters() if f".{REFERENCE}." in n]
    values = {name: parameter.detach().clone() for name, parameter in named}
    if values:  # the constructor would refuse a second one
        model.delete_adapter(REFERENCE)
    yield
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
