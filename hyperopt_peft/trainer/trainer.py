"""`BilevelTrainer`: two levels driven by `transformers.Trainer`."""

from __future__ import annotations

import gc
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import has_length

from hyperopt_peft.core.problem import Problem, devices_of
from hyperopt_peft.engine import checkpoint
from hyperopt_peft.engine.step import BilevelStep
from hyperopt_peft.errors import NON_FINITE_ADVICE, NonFiniteError, ProblemError
from hyperopt_peft.trainer import checks
from hyperopt_peft.trainer.accumulation import ITEMS, WEIGHT, Accumulated
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.callback import BilevelCallback, model_card
from hyperopt_peft.trainer.data import Endless, collating, data_of_levels, fingerprint
from hyperopt_peft.trainer.optimizer import check_optimizer, held, new_optimizer
from hyperopt_peft.trainer.step import OptimizerStep, StepLog
from hyperopt_peft.trainer.upper_batches import loader_of, upper_batches
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.distributed import reshard

SETTINGS = "bilevel_settings.json"
#: A level, or a function that makes one for a finished trainer and reads its ``task_loss``.
Level = Problem | Callable[["BilevelTrainer"], Problem]


class BilevelTrainer(Trainer):
    """`transformers.Trainer` for a lower and an upper level over one model.

    Every optimizer step is one of the lower level; each ``lower_steps``-th moves the upper
    level too, by the hypergradient at the same point, on the step's own lower batch (all of its
    micro-batches and processes) and the upper level's next batch. One optimizer holds both, a
    group or more each, so schedules, checkpoints and resuming are the Trainer's own.

    The loss that is trained is the levels'; what is evaluated is the model's own. A level that is
    given as a function of the trainer can read ``trainer.task_loss``, the loss that the Trainer
    itself would train: `compute_loss` with ``compute_loss_func``, label smoothing and a mean over
    all labels of a step. Other losses are averaged over the micro-batches of a step.

    Several processes that share each batch train as one with all of it does: with DDP for every
    estimator, with accelerate's FSDP2 for those with first-order products, in float32. Under
    FSDP2 a loss must read its variables through the model.

    Args:
        model: what the Trainer saves, evaluates and moves to its device.
        lower: the lower level, without data and optimizer: the Trainer has them.
        upper: the upper level, likewise; None trains the lower level alone, as a baseline.
        args: the settings.
        train_dataset: the lower level's examples, or those of both levels, to be split by
            ``args.upper_fraction``.
        upper_dataset: the upper level's examples. Never ``eval_dataset``.
        callbacks: as for `transformers.Trainer`.
        trainer: what else `transformers.Trainer` takes.

    Logged beside the Trainer's own ``loss``, ``grad_norm``, ``learning_rate`` (the lower
    level's): ``lower_grad_norm`` and ``upper_grad_norm`` (of the gradient and the hypergradient
    before clipping), ``upper_learning_rate``, ``upper_loss``, ``implicit_ratio``
    (‖implicit‖/‖direct‖), ``residual``, ``solver_steps``, ``skipped``, and the numbers that the
    levels' losses return, as ``upper_…`` and ``lower_…``; means over the steps since the last log.

    Raises:
        ProblemError: levels that share a tensor or have data or an optimizer of their own, data
            sets that overlap, an optimizer that does not hold exactly the levels' variables, or
            a setting under which hypergradients would be wrong (fp16, DeepSpeed, FSDP1, FSDP2
            with second-order products, threads of ``DataParallel``) or that the levels would
            ignore (a loss function, a ``compute_loss`` of one's own, label smoothing, compilation).

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 1)
        >>> class Fit(Problem):
        ...     def loss(self, batch):
        ...         return (model(batch["x"]) - batch["x"]).square().mean()
        >>> levels = {"lower": Fit([model.weight]), "upper": Fit([model.bias], name="Bias")}
        >>> args = BilevelTrainingArguments("outputs", use_cpu=True, remove_unused_columns=False)
        >>> rows = [{"x": torch.ones(1) * k} for k in range(4)]
        >>> data = {"train_dataset": rows[:3], "upper_dataset": rows[3:]}
        >>> [level.name for level in BilevelTrainer(model, **levels, args=args, **data).levels]
        ['Fit', 'Bias']
    """

    args: BilevelTrainingArguments
    optimizer: Any
    current_flos: float

    def __init__(
        self,
        model: nn.Module,
        *,
        lower: Level,
        upper: Level | None,
        args: BilevelTrainingArguments,
        train_dataset: Any,
        upper_dataset: Any = None,
        callbacks: Sequence[Any] | None = None,
        **trainer: Any,
    ) -> None:
        self.trainer_loss = _is_function(lower)
        self.own_loss = type(self).compute_loss is not BilevelTrainer.compute_loss
        checks.check_arguments(
            args, model, trainer, trainer_loss=self.trainer_loss, own_loss=self.own_loss
        )
        if self.trainer_loss:
            for data in (train_dataset, upper_dataset):
                checks.check_labels(model, data, trainer)
        train_dataset, self.upper_dataset = data_of_levels(
            train_dataset,
            upper_dataset,
            trainer.get("eval_dataset"),
            args,
            bilevel=upper is not None,
        )
        checks.check_batches(args, train_dataset)
        if not has_length(train_dataset):
            train_dataset = Endless(train_dataset)
        self.skipped = 0
        self._callback = BilevelCallback(self)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            callbacks=[self._callback, *(callbacks or ())],
            **trainer,
        )
        self.lower: Problem = _made(lower, self)
        self.upper: Problem | None = _made(upper, self)
        checks.check_levels(self.levels)
        self.estimator = args.estimator()
        checks.check_accelerator(self)
        check_optimizer(self.optimizer, self.lr_scheduler, self.levels)
        self._take_levels(self.optimizer or new_optimizer(self))
        loader_of(self, self.train_dataset, "train_dataset")
        self.upper_batches = None if self.upper is None else upper_batches(self)

    @property
    def levels(self) -> list[Problem]:
        """The lower level, and the upper one where there is one."""
        return [self.lower] if self.upper is None else [self.lower, self.upper]

    def named_variables(self) -> list[tuple[str, Tensor]]:
        """All variables, by level and name."""
        return [
            (f"{key}.{name}", variable)
            for key, level in zip(("lower", "upper"), self.levels)
            for name, variable in zip(level.names, level.variables, strict=True)
        ]

    @property
    def signalled(self) -> bool:
        """Whether SIGTERM ended the last run, after its checkpoint (``enable_jit_checkpoint``)."""
        return self._callback.signalled

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the run that resumes from it, as JSON has it."""
        settings = {
            **self.args.decisive_settings(),
            "hypergradient": repr(self.estimator) if self.upper is not None else None,
            "processes": distributed.world_size(),
            **self._fingerprints,
            **{name: list(variable.shape) for name, variable in self.named_variables()},
        }
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain

    @cached_property
    def _fingerprints(self) -> dict[str, Any]:
        data = {"train_dataset": self.train_dataset, "upper_dataset": self.upper_dataset}
        return {name: fingerprint(rows) for name, rows in data.items()}

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As `transformers.Trainer.train`; ``True`` resumes from the last complete checkpoint.

        A resumed run has bit by bit the variables, optimizer, schedule, order of the data, random
        numbers, estimator's state and counters of one that was not interrupted. The numbers of a
        log whose steps lie on both sides of the checkpoint are means over those after it. Not
        bit by bit resume: a ``data_collator`` or data set that draws random numbers, such as
        masks; ``dataloader_persistent_workers``; an epoch that a callback ended early; and a log
        or evaluation at the end of an epoch whose last step wrote the checkpoint.

        Raises:
            ProblemError: no complete checkpoint, a damaged one, or one of other settings or data;
                fewer steps than ``lower_steps``; examples of which no batch can be made; a loss
                that is no scalar, or a variable that no loss reads, at the level's first step.
            NonFiniteError: see ``args.non_finite``; names step and batch.
        """
        found = checkpoint.to_resume(resume_from_checkpoint, Path(self.args.output_dir))
        return self._train_from(found, *args, **kwargs)

    def _train_from(
        self, found: tuple[Path, Mapping[str, Any]] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """``found``: the checkpoint to resume from, with its record."""
        self.step_log = StepLog()
        self.skipped = 0
        self._callback.begin(found)
        distributed.broadcast([v for _, v in self.named_variables()], self.args.device)
        limits = self.args.max_grad_norm, self.args.save_total_limit
        self.save_total_limit = self.args.save_total_limit
        try:
            return super().train(None if found is None else str(found[0]), *args, **kwargs)
        except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            if self._callback.writing is not None:
                raise checkpoint.failed(self._callback.writing, error) from error
            if isinstance(error, SafetensorError | pickle.UnpicklingError):
                raise ProblemError(
                    f"the checkpoint: a file is damaged or asks to run code ({error}); nothing of "
                    "it was executed, use an earlier checkpoint"
                ) from error
            raise
        finally:
            self.args.max_grad_norm, self.args.save_total_limit = limits
            if self.upper_batches is not None:
                self.upper_batches.close()

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """``args.optim`` over both levels, with groups of their own."""
        if self.is_fsdp_enabled:  # an evaluation leaves whole parameters in the place of shards
            reshard(self.model)
        if self.optimizer is None:
            self.optimizer = new_optimizer(self)
        self._held = held(self.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `transformers.Trainer.create_scheduler`, for a run in which the upper level moves."""
        self.require_upper_step(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def require_upper_step(self, steps: int) -> None:
        """Raise ProblemError where a run of ``steps`` lower steps has no upper one."""
        if self.upper is not None and steps < self.args.lower_steps:
            raise ProblemError(
                f"lower_steps: {self.args.lower_steps} leaves no upper step in a run of "
                f"{steps} steps; train for longer or lower lower_steps"
            )

    def take_over(self) -> None:
        """Take the variables' identities from the optimizer, and clipping from the Trainer.

        Called when the Trainer has prepared model and optimizer: FSDP2 puts shards in the place of
        the parameters, in the optimizer's groups too.
        """
        now = dict(zip(map(id, self._held), held(self.optimizer), strict=True))
        for level in self.levels:
            level.variables = tuple(now[id(variable)] for variable in level.variables)
        self._take_levels(self.optimizer)
        self.args.max_grad_norm, self.args.save_total_limit = 0.0, None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """A step's micro-batches; none where the run has ended."""
        if self.control.should_training_stop:
            return [], None
        with collating("train_dataset"):
            batches = list(islice(epoch_iterator, num_batches))
        self._step = OptimizerStep(self, batches)
        return batches, None

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; after a step's last one each ``.grad`` is what the variable moves by."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        loss = self._step.evaluate(inputs)
        self.accelerator.backward(loss)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        if self._step.whole:
            try:
                self._step.set_gradients()
            except NonFiniteError as error:
                self._non_finite(error)
        return loss.detach()

    def task_loss(self, batch: Any) -> Tensor:
        """The loss that the Trainer trains: the mean over the labels of ``batch``, weighted.

        The weight makes the mean over the micro-batches and processes of a step one over all of
        its labels.

        Raises:
            ProblemError: the model has no loss for the batch.
        """
        inputs = dict(batch)
        items, weight = inputs.pop(ITEMS, None), inputs.pop(WEIGHT, None)
        try:
            loss: Tensor = self.compute_loss(self.model, inputs, num_items_in_batch=items)
        except (TypeError, ValueError, IndexError) as error:
            raise ProblemError(
                f"the model has no loss for a batch of {sorted(batch)}: {error}; the data must "
                "have the columns that its forward takes, labels that it knows among them"
            ) from error
        return loss if weight is None else loss * weight.to(loss.dtype)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As `transformers.Trainer.compute_loss`, right in an evaluation by several processes.

        The Trainer multiplies a loss by the number of processes where it counts labels, also that
        of a model whose loss is a mean over its own rows, whatever the count.
        """
        if not (checks.shifts_labels(self.model) or self.compute_loss_func):
            num_items_in_batch = None
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _non_finite(self, error: NonFiniteError) -> None:
        """Skip the step and count it, or write a checkpoint of where it began and stop."""
        self._step.clear_gradients()
        if self.args.non_finite == "skip":
            self.skipped += 1
            return
        step = self.state.global_step + 1
        micro = self._step.micro
        where = f"step {step} (epoch {self.state.epoch or 0:.2f}, {len(micro)} micro-batches)"
        self.current_flos, self.state.num_input_tokens_seen = self._step.begun
        written = self._callback.save_before(micro[0].random_state)
        raise NonFiniteError(f"{where}: {error}; {NON_FINITE_ADVICE}; {written}") from error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `transformers.Trainer.log`, with the levels' own numbers beside the loss."""
        if "loss" in logs:
            means, last = self.step_log.read()
            logs |= {key: value for key, value in means.items() if key not in logs} | last
            if self.skipped:
                logs["skipped"] = self.skipped
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `transformers.Trainer.save_model`, with the settings; levels too in a checkpoint."""
        folder = Path(output_dir or self.args.output_dir)
        if _internal_call and folder.name.startswith(checkpoint.PREFIX):
            self._callback.write(folder)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SETTINGS).write_text(json.dumps(self.args.bilevel_settings(), indent=1))
        super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As `transformers.Trainer.create_model_card`, with the bilevel settings and results."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / "README.md"
            path.write_text(model_card(path.read_text(), self))

    def end_training(self) -> None:
        """Leave the other processes, after all else: the last line of a script.

        A process that exits while threads of gloo hold its tensors is aborted; they end with the
        process group. DDP goes first: where it is the last to hold the group, Python waits for
        those threads, and they for Python.
        """
        self.release_models()
        gc.collect()
        self.accelerator.end_training()

    def release_models(self) -> None:
        """Let go of what `accelerate` wrapped the model in."""
        self.model_wrapped = self.model
        self.accelerator.free_memory()

    def _take_levels(self, optimizer: Any) -> None:
        """Make the step of the levels as they are now.

        Raises:
            ProblemError: the estimator does not go with the levels or the optimizer.
        """
        self.max_grad_norm = self.args.max_grad_norm
        self.bilevel_step: BilevelStep | None = None
        if self.upper is not None:
            lower = Accumulated(self.lower, optimizer, self.max_grad_norm or None)
            self.bilevel_step = BilevelStep(self.upper, lower, self.estimator, seed=self.args.seed)
        self.devices = devices_of(*self.levels)


def _is_function(level: Any) -> bool:
    return callable(level) and not isinstance(level, Problem | nn.Module | type)


def _made(level: Any, trainer: BilevelTrainer) -> Any:
    return level(trainer) if _is_function(level) else level
