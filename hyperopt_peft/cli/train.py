"""hyperopt-peft train: train an adapter with BiDoRA, DoRA or LoRA, evaluate and save it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import Trainer

from hyperopt_peft.cli.options import OutputArguments, parse
from hyperopt_peft.cli.plan import levels, phases, seconds_a_pass, table
from hyperopt_peft.cli.report import Report
from hyperopt_peft.cli.text.setup import SHARED, Setup, prepare
from hyperopt_peft.trainer.logs import TIMINGS
from hyperopt_peft.trainer.trainer import BilevelTrainer

BASE_CONFIG = "base_config"


TYPES = (OutputArguments, *SHARED)


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train, evaluate; write adapter, results and model card to ``output_dir``."""
    (command, model_args, data, args), flags = parse("train", TYPES, argv)
    checkpoint = command.require_output(args, resumes=True)
    setup = prepare(model_args, data)
    trainer = setup.trainer(args)
    works = phases(setup, trainer)
    if command.dry_run:
        print(levels(setup, trainer))
        print(table(works, seconds_a_pass(trainer)))
        return
    if trainer.is_world_process_zero():  # the lines of two phases look alike
        print(", then ".join(f"{work.name}: {work.steps} steps" for work in works), flush=True)
    trainer.train(checkpoint)
    evaluation = {} if setup.evaluation is None else evaluated(trainer)
    save(trainer, evaluation)
    if trainer.is_world_process_zero():
        page = report(trainer, setup, evaluation, flags)
        page.subtitle = f"{', '.join(data.train_file or [data.dataset])} · {model_args.model}"
        print(f"{page.verdict}\nthe adapter is in {args.output_dir}")
        print(f"{page.write(args.output_dir)} has all of it")
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
            trainer.save_metrics(split, values)
    trainer.save_state()


def evaluated(trainer: Trainer) -> dict[str, Any]:
    """The numbers of an evaluation, without the time of preparing a model that is prepared."""
    metrics = trainer.evaluate()
    return {name: x for name, x in metrics.items() if not name.endswith("preparation_time")}


def report(trainer: Any, setup: Setup, evaluation: dict[str, Any], flags: Sequence[str]) -> Report:
    """The page of a run; its verdict says what a guess would reach."""
    histories = {"Losses": trainer.state.log_history}
    if (retrainer := getattr(trainer, "retrainer", None)) is not None:
        # The evaluation of the final model is in the log of the search, which made another one.
        search = trainer.state.log_history[: -1 if evaluation else None]
        histories = {"Search": search, "Retraining": retrainer.state.log_history}
    works = phases(setup, trainer)
    tables: dict[str, list[list[Any]]] = {}
    rows = [[work.name, work.steps, f"{work.passes:.0f}"] for work in works]
    tables["Trainings"] = [["phase", "steps", "passes"], *rows]
    verdict = f"{trainer.args.method}, {sum(work.steps for work in works)} steps"
    if evaluation and setup.evaluation is not None:
        numbers = {k.removeprefix("eval_"): v for k, v in evaluation.items() if _tells(k)}
        tables["Evaluation"] = [[*numbers], [f"{value:.4f}" for value in numbers.values()]]
        metric, size = setup.task.metric, len(setup.evaluation)
        verdict = f"{metric} {numbers[metric]:.4g} on {size} evaluation rows, by {verdict}"
        if metric == "accuracy":
            count = max(Counter[int](setup.evaluation["labels"]).values())
            verdict += f"; always the commonest class has {count / size:.4g}"
    return Report("train", verdict, flags, curves=histories, tables=tables)


def _tells(name: str) -> bool:
    return name.startswith("eval_") and not name.endswith(TIMINGS)


def save_adapter(trainer: Trainer) -> None:
    """Write the adapter, the tokenizer, the base model's configuration and a card."""
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_card(trainer)
        # The configuration has the names of the labels. Transformers would load a folder with an
        # adapter and a configuration as a whole model.
        trainer.model.config.save_pretrained(Path(trainer.args.output_dir) / BASE_CONFIG)


def write_card(trainer: Trainer) -> None:
    """Replace PEFT's card, of 200 empty lines, by one that has what is known."""
    config = trainer.model.peft_config["default"]
    method = getattr(trainer.args, "method", "dora" if config.use_dora else "lora")
    header = {"base_model": config.base_model_name_or_path, "library_name": "peft"}
    text = f"---\n{yaml.safe_dump(header | {'tags': [method, 'hyperopt-peft']})}---\n\n"
    text += f"An adapter (rank {config.r}, alpha {config.lora_alpha}) by {method}.\n"
    if getattr(trainer, "upper", None) is not None:
        text += "\nMagnitudes are learned by hypergradients on rows of their own:\n\n"
        settings = trainer.args.bilevel_settings().items()
        text += "".join(f"- {name}: {x}\n" for name, x in settings if x is not None)
    Path(trainer.args.output_dir or "", "README.md").write_text(text, encoding="utf-8")


def _last_metrics(trainer: BilevelTrainer) -> dict[str, Any]:
    """The numbers that the Trainer logs at the end of training; none if it has not trained."""
    records = [record for record in trainer.state.log_history if "train_runtime" in record]
    return {key: value for key, value in records[-1].items() if key != "step"} if records else {}
