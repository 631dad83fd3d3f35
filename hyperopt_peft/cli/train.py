"""hyperopt-peft train: train an adapter by a method, evaluate and save it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hyperopt_peft.cli.options import OutputArguments
from hyperopt_peft.cli.plan import levels, phases, plan
from hyperopt_peft.cli.report import Report
from hyperopt_peft.cli.text.setup import SHARED, Chosen, Setup, choose, prepare
from hyperopt_peft.trainer.logs import TIMINGS
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils.validation import option

#: More upper variables than these are in the details of the page.
SHOWN = 12


@dataclass
class TrainArguments(OutputArguments):
    """The method."""

    method: str = option(
        "bidora",
        help="lora, dora, bidora, another name of hyperopt_peft.comparison.METHODS or of an entry "
        "point, or my_method.py:MyMethod; the fields of its class are options",
    )


TYPES = (TrainArguments, *SHARED)


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train, evaluate; write adapter, results and report to ``output_dir``."""
    chosen = choose("train", TrainArguments, argv)
    command, args = chosen.command, chosen.args
    checkpoint = command.require_output(args)
    args.details = command.details
    setup = prepare(chosen.model, chosen.data, args, chosen.method)
    trainer = setup.trainer(args, chosen.method)
    works = phases(trainer)
    if command.dry_run:
        print(levels(setup, trainer))
        print(plan(works))
        if warning := too_good(setup):
            print(warning)
        return
    if trainer.is_world_process_zero():  # the lines of two phases look alike
        if setup.changed is not None:
            print(f"{setup.changed} labels corrected by {', '.join(chosen.data.corrections)}")
        print(", then ".join(f"{work.name}: {work.steps} steps" for work in works), flush=True)
    trainer.train(checkpoint)
    evaluation = {} if setup.evaluation is None else trainer.evaluate()
    trained = _last_metrics(trainer.retrainer or trainer)
    setup.require_sane(evaluation.get("eval_loss", trained["train_loss"]))
    save(trainer, evaluation)
    if trainer.is_world_process_zero():
        page = report(trainer, setup, evaluation, chosen)
        page.write(args.output_dir)
        print(f"{page.verdict}\nthe adapter and report.html are in {args.output_dir}")
    trainer.end_training()


def save(trainer: BilevelTrainer, evaluation: dict[str, Any]) -> None:
    """Write the adapter, the base model's configuration, results and states."""
    save_adapter(trainer)
    results = {"train": _last_metrics(trainer), "eval": evaluation}
    if trainer.retrainer is not None:
        again = _last_metrics(trainer.retrainer)
        results["retrain"] = {f"retrain_{k.removeprefix('train_')}": v for k, v in again.items()}
        trainer.retrainer.save_state()
    for split in filter(results.get, results):
        trainer.save_metrics(split, results[split])
    trainer.save_state()


def report(
    trainer: BilevelTrainer, setup: Setup, evaluation: dict[str, Any], chosen: Chosen
) -> Report:
    """The page of a run."""
    histories = {"Losses": trainer.state.log_history}
    if trainer.retrainer is not None:
        # The evaluation of the final model is in the log of the search, which made another one.
        search = trainer.state.log_history[: -1 if evaluation else None]
        histories = {"Search": search, "Retraining": trainer.retrainer.state.log_history}
    works = phases(trainer)
    passes = _last_metrics(trainer.retrainer or trainer)["passes"]
    rows = [[work.name, work.steps] for work in works]
    details = {f"Trainings, {passes:g} passes": [["phase", "steps"], *rows]}
    tables: dict[str, list[list[str]]] = {}
    verdict = f"{chosen.name.rpartition(':')[2]}, {sum(work.steps for work in works)} steps"
    if evaluation and setup.evaluation is not None:
        named = [k for k in evaluation if k.startswith("eval_") and not k.endswith(TIMINGS)]
        numbers: dict[str, float] = {k.removeprefix("eval_"): evaluation[k] for k in named}
        tables["Evaluation"] = [[*numbers], [f"{value:.4f}" for value in numbers.values()]]
        metric, size = setup.task.metric, len(setup.evaluation)
        verdict = f"{metric} {numbers[metric]:.4g} on {size} evaluation rows, by {verdict}"
        if metric == "accuracy":
            count = max(Counter[int](setup.evaluation["labels"]).values())
            verdict += f"; always the commonest class: {count / size:.4g}"
        if warning := too_good(setup):
            verdict += f"; {warning}"
    shares: dict[str, float] = getattr(trainer.method, "shares", dict)()
    if shares:
        tables["Shares of the sources"] = [[*shares], [f"{share:.4f}" for share in shares.values()]]
        verdict += f"; shares {', '.join(f'{name} {share:.3f}' for name, share in shares.items())}"
    if trainer.upper is not None:
        (details if len(trainer.upper.names) > SHOWN else tables)["Upper variables"] = [
            ["variable", "shape", "least", "mean", "largest"],
            *map(_summary, trainer.upper.names, trainer.upper.variables),
        ]
    return Report("train", verdict, chosen.options, tables, curves=histories, details=details)


def too_good(setup: Setup) -> str:
    """A warning if the evaluation rows have scored the training rows; else empty."""
    if not (known := setup.scored_by(setup.evaluation_rows)):
        return ""
    return (
        f"too good: {known} of the {len(setup.evaluation or ())} rows have scored the training "
        "rows, so evaluate on other rows (--eval_file)"
    )


def _summary(name: str, variable: Tensor) -> list[str]:
    """The name, the shape and the range of an upper variable."""
    values = variable.detach().float()
    ends = [f"{float(x):.4g}" for x in (values.min(), values.mean(), values.max())]
    return [name, " × ".join(map(str, values.shape)) or "1", *ends]


def save_adapter(trainer: BilevelTrainer) -> None:
    """Write the adapter, the tokenizer, a card and the base model's configuration."""
    trainer.save_model()
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        # The configuration has the names of the labels. Transformers would load a folder with an
        # adapter and a configuration as a whole model.
        trainer.model.config.save_pretrained(Path(trainer.args.output_dir or "") / "base_config")


def _last_metrics(trainer: Any) -> dict[str, Any]:
    """The numbers that the Trainer logs at the end of training; none if it has not trained."""
    records = [record for record in trainer.state.log_history if "train_runtime" in record]
    return {key: value for key, value in records[-1].items() if key != "step"} if records else {}
