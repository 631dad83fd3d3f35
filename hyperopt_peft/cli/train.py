"""hyperopt-peft train: train an adapter with BiDoRA, DoRA or LoRA, evaluate and save it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer
from transformers.hf_argparser import HfArg

from hyperopt_peft.adapters import split_parameters
from hyperopt_peft.cli.options import OutputArguments, parse, resume_from
from hyperopt_peft.cli.text.setup import SHARED, Setup, changed, prepare
from hyperopt_peft.trainer.trainer import BilevelTrainer

BASE_CONFIG = "base_config"


@dataclass
class TrainArguments(OutputArguments):
    """Options of the command itself."""

    dry_run: bool = HfArg(default=False, help="print parameters, examples and steps alone")


TYPES = (TrainArguments, *SHARED)


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train, evaluate; write adapter, results and model card to ``output_dir``."""
    command, model_args, data, args = parse("train", TYPES, argv)
    if not command.dry_run:
        command.require_output(args, resumes=True)
    setup = prepare(model_args, data)
    if command.dry_run:
        with tempfile.TemporaryDirectory() as folder:  # the trainer creates its output_dir
            print(plan(setup, setup.trainer(changed(args, output_dir=folder))))
        return
    trainer = setup.trainer(args)
    trainer.train(resume_from(args))
    save(trainer, {} if setup.evaluation is None else trainer.evaluate())
    names = data.train_file or [data.dataset]
    trainer.create_model_card(dataset=[Path(name).name for name in names])
    if trainer.is_world_process_zero():
        print(f"the adapter is in {args.output_dir}")
    trainer.end_training()


def save(trainer: BilevelTrainer, evaluation: dict[str, Any]) -> None:
    """Write the adapter, the base model's configuration, results and states.

    ``all_results.json`` has the numbers of the search (or of a baseline) under the names of
    `transformers`, the numbers of the retraining as ``retrain_…``, and the evaluation of the
    final model as ``eval_…``.
    """
    save_adapter(trainer)
    results = {"train": _last_metrics(trainer), "eval": evaluation}
    if (retrainer := getattr(trainer, "retrainer", None)) is not None:
        again = _last_metrics(retrainer)
        results["retrain"] = {f"retrain_{k.removeprefix('train_')}": v for k, v in again.items()}
        retrainer.save_state()
    for split, values in results.items():
        if values:
            trainer.log_metrics(split, values)
            trainer.save_metrics(split, values)
    trainer.save_state()


def save_adapter(trainer: Trainer) -> None:
    """Write the adapter, the tokenizer and the base model's configuration."""
    trainer.save_model()
    if trainer.is_world_process_zero():
        # The configuration has the names of the labels. Transformers would load a folder with an
        # adapter and a configuration as a whole model.
        trainer.model.config.save_pretrained(Path(trainer.args.output_dir) / BASE_CONFIG)


def _last_metrics(trainer: BilevelTrainer) -> dict[str, Any]:
    """The numbers that the Trainer logs at the end of training; none if it has not trained."""
    records = [record for record in trainer.state.log_history if "train_runtime" in record]
    return {key: value for key, value in records[-1].items() if key != "step"} if records else {}


def plan(setup: Setup, trainer: Any) -> str:
    """The plan in lines; a run without an upper step is a ProblemError."""
    args, model = trainer.args, trainer.model
    everything, lower = len(setup.train), len(trainer.train_dataset)
    evaluation = 0 if setup.evaluation is None else len(setup.evaluation)
    lines = [f"method: {args.method}"]
    if trainer.upper is None:
        lines += [
            f"one level, all of the adapter: {_count(trainer.lower.variables)}",
            f"examples: {lower} training, {evaluation} evaluation",
            f"steps: {args.steps_of(lower)}",
        ]
    else:
        owners, cost = split_parameters(model), args.estimator().cost()
        search, again = args.phases(lower, everything)
        trainer.require_upper_step(search)
        args.warn_of_short_phases(search, again)
        passes = ""
        if cost is not None:
            passes = f", upper step: {cost.losses} losses, {cost.backward_passes} backward passes"
        lines += [
            f"upper level, magnitudes: {_count(owners.magnitudes.values())}",
            f"lower level, directions: {_count(owners.directions.values())}",
            f"lower level, head: {_count(owners.rest.values())}",
            f"examples: {lower} lower level, {len(trainer.upper_dataset)} upper level, "
            f"{everything if again else 0} retraining, {evaluation} evaluation",
            f"steps: {search} lower in the search, {search // args.lower_steps} upper, "
            f"{again} in the retraining",
            f"estimator: {args.estimator()!r}{passes}",
        ]
    lines.append(f"frozen: {_count(p for p in model.parameters() if not p.requires_grad)}")
    if setup.task.classes:
        lines.append(f"labels: {', '.join(setup.config.id2label.values())}")
    return "\n".join(lines)


def _count(parameters: Iterable[Tensor]) -> str:
    sizes = [parameter.numel() for parameter in parameters]
    return f"{sum(sizes):,} parameters in {len(sizes)} tensors"
