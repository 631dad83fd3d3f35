"""`TwoLevelTrainer`: one optimizer for both levels, and their part of a checkpoint."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hyperopt_peft.core.prior import GaussianPrior
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.engine import checkpoint
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients import Estimator
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.fingerprint import data_fingerprint, frozen_fingerprint
from hyperopt_peft.trainer.optimizer import (
    check_optimizers,
    new_optimizer,
    parameter_groups,
    params_of,
)
from hyperopt_peft.trainer.task_loss import TaskLossTrainer
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.distributed import reshard

SETTINGS = "bilevel_settings.json"


class TwoLevelTrainer(TaskLossTrainer):
    """A Trainer that optimizes, saves and restores the variables of its levels."""

    args: BilevelTrainingArguments
    lower: Problem
    upper: Problem | None
    estimator: Estimator
    train_dataset: Any
    optimizer_cls_and_kwargs: Any

    @property
    def levels(self) -> list[Problem]:
        """The lower level, then the upper level if there is one."""
        return [self.lower] if self.upper is None else [self.lower, self.upper]

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """The levels' variables and the centres of their priors, by level and name."""
        named: list[tuple[str, Tensor]] = []
        for key, level in zip(("lower", "upper"), self.levels):
            named += [(f"{key}.{n}", x) for n, x in zip(level.names, level.variables)]
            if isinstance(level.prior, GaussianPrior):
                named += [(f"{key} prior.{n}", x) for n, x in zip(level.names, level.prior.start)]
        return named

    def settings(self) -> dict[str, Any]:
        """The settings, as JSON, in which a checkpoint and the run that resumes must agree."""
        settings = {
            **self.args.resume_must_match(),
            "hypergradient": repr(self.estimator) if self.upper is not None else None,
            "processes": distributed.world_size(),
            **self._data_fingerprints,
            **{name: list(tensor.shape) for name, tensor in self.named_tensors()},
            # Under FSDP2 processes have shards, and some get weights from process 0 in training.
            "frozen weights of the model": (
                None if self.is_fsdp_enabled else frozen_fingerprint(self.model, self.levels)
            ),
        }
        plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        return plain

    @cached_property
    def _data_fingerprints(self) -> dict[str, Any]:
        data = {"train_dataset": self.train_dataset, "upper_dataset": self.upper_dataset}
        return {name: data_fingerprint(rows) for name, rows in data.items()}

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The optimizer ``args.optim`` over both levels, each in parameter groups of its own."""
        if self.is_fsdp_enabled:  # an evaluation replaces the shards by full parameters
            reshard(self.model)
        if self.optimizer is None:
            # The parent constructs its optimizer class; a stand-in class returns the levels' one.
            made, (kind, options) = self._new_optimizer(), (given := self._optimizer_kind())
            named = type(str(kind), (Optimizer,), {"__new__": lambda *_, **__: made})
            self.optimizer_cls_and_kwargs = named, {**options}
            super().create_optimizer()
            self.optimizer_cls_and_kwargs = given
            check_optimizers("create_optimizer", self.optimizer, None, self.levels)
        self._replicated = []
        if self.is_fsdp_enabled:  # FSDP2 needs a shard for each tensor of the optimizer
            of_model = {id(parameter) for parameter in self.model.parameters()}
            groups = self.optimizer.param_groups
            self._replicated = [g for g in groups if id(g["params"][0]) not in of_model]
            groups[:] = [g for g in groups if id(g["params"][0]) in of_model]
        replicated = [x for group in self._replicated for x in group["params"]]
        self._unprepared = params_of(self.optimizer) + replicated
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `transformers.Trainer.create_scheduler`; refuses a run without an upper step.

        Under FSDP2 tensors outside the model are replicated; their groups join the prepared
        optimizer here.
        """
        self.require_upper_step(num_training_steps)
        while self._replicated:
            self.optimizer.add_param_group(self._replicated.pop(0))
        return super().create_scheduler(num_training_steps, optimizer)

    def require_upper_step(self, steps: int) -> None:
        """Raise ProblemError if a run of ``steps`` lower steps has no upper step."""
        if self.upper is not None and steps < self.args.lower_steps:
            raise ProblemError(
                f"lower_steps: {self.args.lower_steps} leaves no upper step in a run of "
                f"{steps} steps of {self.args.gradient_accumulation_steps} micro-batches; train "
                "for longer, or lower lower_steps or gradient_accumulation_steps"
            )

    def _optimizer_kind(self) -> Any:
        given = self.optimizer_cls_and_kwargs
        return given or self.get_optimizer_cls_and_kwargs(self.args, self.model)

    def _new_optimizer(self) -> Any:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        decayed = {id(named[name]) for name in self.get_decay_parameter_names(self.model)}
        plain = {id(parameter) for parameter in named.values()} - decayed
        groups = parameter_groups(self.lower, self.upper, self.args, plain)
        return new_optimizer(self._optimizer_kind(), groups)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As `transformers.Trainer.save_model`, with the settings; a checkpoint has the levels."""
        folder = Path(output_dir or self.args.output_dir)
        name = f"{checkpoint.PREFIX}{self.state.global_step}"
        if self.is_in_train and folder == Path(self.args.output_dir or "") / name:
            self._callback.write(folder)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SETTINGS).write_text(json.dumps(self.args.bilevel_settings(), indent=1))
        super().save_model(output_dir, *args, **kwargs)
        if self._callback.writing is not None:  # delete no older checkpoint before this is complete
            self.args.save_total_limit = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As `transformers.Trainer.create_model_card`, with the bilevel settings."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            settings = {"levels": [level.name for level in self.levels]}
            settings |= self.args.bilevel_settings()
            lines = "".join(f"- {key}: {value}\n" for key, value in settings.items())
            with (Path(self.args.output_dir) / "README.md").open("a") as card:
                card.write(f"\n\n## Bilevel training\n\nTrained with hyperopt-peft.\n\n{lines}")
