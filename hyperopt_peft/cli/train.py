"""hyperopt-peft train: train an adapter with BiDoRA, DoRA or LoRA, evaluate and save it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg

from hyperopt_peft.cli.options import parse, require_folder
from hyperopt_peft.cli.plan import plan
from hyperopt_peft.cli.text.setup import TYPES, prepare
from hyperopt_peft.problems.two_phases import TwoPhaseTrainingArguments
from hyperopt_peft.trainer.trainer import BilevelTrainer

BASE_CONFIG = "base_config"


@dataclass
class TrainArguments:
    """Options of the command itself."""

    _argument_group_name = "command"

    dry_run: bool = HfArg(
        default=False,
        help="print owners of parameters, examples, steps and an estimate of memory; train nothing",
    )


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train, evaluate; write adapter, results and model card to ``output_dir``.

    Raises:
        ProblemError: a bad option, model or data set.
        NonFiniteError: as the option ``non_finite`` says.
    """
    own, model_args, data, args = parse("train", (TrainArguments, *TYPES), argv)
    require_folder(args.output_dir)
    setup = prepare(model_args, data)
    model = setup.model(args.seed, dora=args.method != "lora")
    if own.dry_run:
        with tempfile.TemporaryDirectory() as folder:  # the trainer creates its output_dir
            args.output_dir = folder
            trainer = setup.trainer(model, args)
            rows = 0 if setup.evaluation is None else len(setup.evaluation)
            print(plan(trainer, len(setup.train), rows))
            if setup.task.classes:
                print(f"labels: {', '.join(setup.config.id2label.values())}")
        return
    trainer = setup.trainer(model, args)
    trainer.train(resume_from(args))
    save(trainer, {} if setup.evaluation is None else trainer.evaluate())
    names = data.train_file or [data.dataset]
    trainer.create_model_card(dataset=[Path(name).name for name in names])
    if trainer.is_world_process_zero():
        print(f"the adapter is in {args.output_dir}")
    trainer.end_training()


def resume_from(args: TwoPhaseTrainingArguments) -> str | bool | None:
    """A folder, or whether to resume from the last complete checkpoint."""
    given: str | None = args.resume_from_checkpoint
    return {"true": True, "false": None}.get(str(given).lower(), given)


def save(trainer: BilevelTrainer, evaluation: dict[str, Any]) -> None:
    """Write the adapter, the base model's configuration, results and states.

    ``all_results.json`` has the numbers of the search (or of a control) under the names of
    `transformers`, the numbers of the retraining as ``retrain_…``, and the evaluation of the
    final model as ``eval_…``.
    """
    save_adapter(trainer)
    results = {"train": _last_metrics(trainer), "eval": evaluation}
    retrainer = getattr(trainer, "retrainer", None)
    if retrainer is not None:
        again = _last_metrics(retrainer)
        results["retrain"] = {f"retrain_{k.removeprefix('train_')}": v for k, v in again.items()}
        retrainer.save_state()
    for split, values in results.items():
        if values:
            trainer.log_metrics(split, values)
            trainer.save_metrics(split, values)
    trainer.save_state()


def save_adapter(trainer: BilevelTrainer) -> None:
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
