"""`TwoPhaseTrainer`: a search over both levels, then a retraining of the lower one."""

from __future__ import annotations

import copy
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

#: The lower level's initial values, and what the search has learnt outside the model.
INITIAL, LEARNT = "initial.pt", "learnt.pt"


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

    def for_retraining(self) -> Self:
        """The arguments of the second phase; it writes to the folder ``retrain``."""
        args = copy.copy(self)
        args.output_dir = str(Path(self.output_dir or "") / "retrain")
        args.push_to_hub = False
        if self.retrain_learning_rate is not None:
            args.learning_rate = self.retrain_learning_rate
        if self.retrain_weight_decay is not None:
            args.weight_decay = self.retrain_weight_decay
        if self.retrain_epochs is not None:
            args.num_train_epochs, args.max_steps = self.retrain_epochs, -1
        if self.retrain_steps is not None:
            args.max_steps = self.retrain_steps
        if self.retrain_gradient_accumulation_steps is not None:
            args.gradient_accumulation_steps = self.retrain_gradient_accumulation_steps
        return args


class TwoPhaseTrainer(BilevelTrainer):
    """A search over both levels, then a retraining of the lower one with the upper one frozen.

    The retraining has its own trainer, ``retrainer``, with its own ``state.log_history``. A
    subclass makes it in ``retraining``. Without an upper level there is one phase.
    """

    args: TwoPhaseTrainingArguments
    retrainer: BilevelTrainer | None = None

    def retraining(self, args: Any) -> BilevelTrainer:
        """The trainer of the second phase, with the arguments ``args``."""
        raise NotImplementedError

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Do the search and the retraining; returns the last phase's result.

        ``resume_from_checkpoint`` is a checkpoint's folder, or True for the last complete
        checkpoint of either phase. With ``enable_jit_checkpoint`` a SIGTERM ends either phase.
        """
        if self.upper is None or self.args.retrain == "none":
            return super().train(resume_from_checkpoint, *args, **kwargs)
        arguments = self.args.for_retraining()
        folder = Path(arguments.output_dir or "")
        found = checkpoint.to_resume(resume_from_checkpoint, folder.parent, folder)
        if found is None or found[0].resolve().parent != folder.resolve():
            if self.args.retrain == "scratch":
                self._keep_start(found is not None)
            output = self._train_from(found, *args, **kwargs)
            if self.signalled:  # the search is unfinished
                return output
            reshard(self.model)
            if self.args.retrain == "scratch":
                self._return_to_start()
            self._keep_learnt()
            found = None
        else:
            self._return_to_learnt()
        self.retrainer = self.retraining(arguments)
        return self.retrainer._train_from(found, *args, **kwargs)

    def release_models(self) -> None:
        """As `BilevelTrainer.release_models`, for both phases."""
        if self.retrainer is not None:
            self.retrainer.release_models()
        super().release_models()

    def _keep_start(self, resumed: bool) -> None:
        """Keep the initial values, also in a file; a resumed run has those of the file."""
        self._start = [variable.detach().clone() for variable in self.lower.variables]
        path = Path(self.args.output_dir or "") / INITIAL
        values = dict(zip(self.lower.names, self._start, strict=True))
        if resumed:
            kept = _read(path, values)
            self._start = [kept[name] for name in self.lower.names]
        elif self.args.should_save:
            checkpoint.write_state(path, values)

    def passes_of_an_upper_step(self) -> int:
        """Forward+backward passes over a micro-batch from one upper step of the search to the next.

        A hypergradient whose cost is not known counts as two.
        """
        args, cost = self.args, self.estimator.cost()
        of_upper = 2 if cost is None else cost.backward_passes
        of_lower_batch = args.lower_steps - 1 + of_upper - 1
        pieces = 1 if self.upper_batches is None else self.upper_batches.count  # of F
        passes: int = of_lower_batch * args.gradient_accumulation_steps + pieces
        return passes

    def _learnt(self) -> dict[str, Tensor]:
        """The upper variables outside the model, which a checkpoint of the retraining lacks."""
        assert self.upper is not None
        of_model = {id(parameter) for parameter in self.model.parameters()}
        named = zip(self.upper.names, self.upper.variables, strict=True)
        return {name: variable for name, variable in named if id(variable) not in of_model}

    def _keep_learnt(self) -> None:
        learnt = {name: variable.detach() for name, variable in self._learnt().items()}
        if learnt and self.args.should_save:
            checkpoint.write_state(Path(self.args.output_dir or "") / LEARNT, learnt)

    @torch.no_grad()
    def _return_to_learnt(self) -> None:
        if learnt := self._learnt():
            kept = _read(Path(self.args.output_dir or "") / LEARNT, learnt)
            for name, variable in learnt.items():
                variable.copy_(kept[name])

    @torch.no_grad()
    def _return_to_start(self) -> None:
        for variable, value in zip(self.lower.variables, self._start, strict=True):
            variable.copy_(sharded_like(value, variable))


def _read(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file ``path``, with the names and shapes of ``like``."""
    kept: dict[str, Tensor] = checkpoint.read_state(path)
    if {n: v.shape for n, v in kept.items()} != {n: v.shape for n, v in like.items()}:
        raise ProblemError(f"{path}: the values are of another model; start a new run")
    return kept
