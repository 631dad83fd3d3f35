"""hyperopt-peft mix: how much should each source of training data count?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from transformers.hf_argparser import HfArg

from hyperopt_peft.cli.config import option
from hyperopt_peft.cli.mix_results import SHARES, Verdict, draw_shares
from hyperopt_peft.cli.mixture_files import write_mixture
from hyperopt_peft.cli.options import OutputArguments, parse
from hyperopt_peft.cli.plan import Work, in_words, seconds_a_pass, table
from hyperopt_peft.cli.text import sft
from hyperopt_peft.cli.text.data import TRAIN, require_columns
from hyperopt_peft.cli.text.models import ModelArguments
from hyperopt_peft.cli.text.setup import Setup, prepare, trainer_errors, warn_of_shared
from hyperopt_peft.cli.text.sources import SourceArguments, Sources
from hyperopt_peft.cli.train import evaluated, save_adapter
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.compare_baselines import (
    BaselineComparison,
    MethodResult,
    compare_baselines,
)
from hyperopt_peft.problems.compare_on_adapter import runs_of, works_of
from hyperopt_peft.problems.mix_arguments import MixTrainingArguments
from hyperopt_peft.problems.mix_baselines import Baselines
from hyperopt_peft.problems.mix_plans import LEARNED, plan_of
from hyperopt_peft.problems.mix_trainer import MixTrainer
from hyperopt_peft.utils.groups import group_rows

#: The upper steps below which weights are not trusted, and the least share by which a loss falls.
FEW_STEPS, LEAST_FALL = 10, 0.05
#: What a comparison on a head takes for each fold, by the time of a search.
SEARCHES_A_FOLD = 6
#: The finished trainings of a comparison of adapters.
RECORD = "folds.jsonl"


@dataclass
class MixArguments(OutputArguments):
    """What is done with the weights."""

    trusted_file: list[str] | None = HfArg(default=None, help="few examples that judge the sources")
    test_file: list[str] | None = HfArg(default=None, help="to evaluate the final adapter alone")
    baseline_folds: int = HfArg(
        default=3,
        help="folds of the trusted examples by which simple methods and the learned weights are "
        "compared: in seconds on a head, of texts in minutes, by a search each on the adapter; 0 "
        "for no comparison",
    )
    equal_passes: bool = HfArg(
        default=True,
        help="whether, on the adapter, simple methods may take the search's passes too",
    )
    save: Literal["recommended", "learned"] = HfArg(
        default="recommended",
        help="the adapter to train and save: by the method that the comparison recommends, or by "
        "the learned weights",
    )

    def __post_init__(self) -> None:
        if not self.trusted_file:
            raise ProblemError("trusted_file: give examples with labels that you trust")


TYPES = (MixArguments, ModelArguments, SourceArguments, MixTrainingArguments)


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, learn the weights, compare, train; write adapter and weights."""
    kind: Any = MixTrainer
    types: tuple[Any, ...] = TYPES
    if is_sft := option("mix", "task", argv) == sft.SFT:
        kind = MixTrainer.over(sft.require_trl().SFTTrainer)
        types = (MixArguments, ModelArguments, Sources, kind.Arguments)
    (command, model_args, data, args), flags = parse("mix", types, argv)
    resumed = command.require_output(args, resumes=True)
    if args.logging_steps == 500:  # the Trainer's default, longer than most runs here
        args.logging_steps = 0.05
    setup = sft.prepare(model_args, data, args) if is_sft else prepare(model_args, data)
    require_columns(setup.rows, [data.column], TRAIN)
    groups = group_rows(setup.rows[data.column])
    sources = {name: setup.train.select(rows) for name, rows in groups.items()}
    examples = held_out(command, setup)
    model = setup.model(args.seed, dora=False)
    with trainer_errors():
        trainer = kind(model, args, sources=sources, **examples, **setup.options(model))
    if command.dry_run:
        print(plan(trainer, command))
        return
    output, first = Path(args.output_dir), trainer.is_world_process_zero()
    before = trusted_losses(trainer)
    seconds = search(trainer, resumed)
    verdict = Verdict.of(trainer, flags)
    verdict.notes = doubts(trainer, verdict.steps)
    if first:
        output.mkdir(parents=True, exist_ok=True)
        verdict.write(output / "weights.json")
        if trajectory := [x[SHARES] for x in trainer.state.log_history if SHARES in x]:
            draw_shares(trajectory, output / "weights.png")
        if data.rows:
            weights = {name: source["row_weight"] for name, source in verdict.sources.items()}
            write_mixture(output / "mixture", data.rows, weights)
    if comparison := compare(trainer, command, seconds):
        verdict.compared(comparison)
    if first:  # the final training takes long
        verdict.write(output / "weights.json")
        print(f"\n{verdict}", flush=True)
    by_comparison = command.save == "recommended" and trainer.args.retrain != "none"
    chosen = comparison.recommended if comparison and by_comparison else None
    train(trainer, chosen, bool(resumed))
    trained = trainer.args.retrain != "none" or not trainer.on_head
    if trained:
        save_adapter(trainer)
        verdict.saved = chosen.method if chosen else LEARNED
        late = hardly_learned(trainer, before, trusted_losses(trainer))
        verdict.notes += late
        if first:
            verdict.write(output / "weights.json")
            lines = [f"the saved adapter: {verdict.saved}", *(f"warning: {note}" for note in late)]
            print("\n" + "\n".join(lines))
    metrics: dict[str, Any] = {}
    if trained and trainer.eval_dataset is not None:
        metrics = evaluated(trainer)
        trainer.save_metrics("eval", metrics)
    if first:
        records = trainer.state.log_history[: -1 if metrics else None]  # without the evaluation
        histories = {} if trainer.on_head else {"Search": records}
        if trainer.retrainer is not None:
            histories["Final training"] = trainer.retrainer.state.log_history
        page = verdict.report(output, metrics, histories)
        print(f"\n{page.write(output)} has all of it")
    trainer.end_training()


def plan(trainer: MixTrainer, command: MixArguments) -> str:
    """The rows and the trainings in lines, and their time."""
    baselines = Baselines(trainer)
    final = baselines.steps * baselines.passes_of_a_step
    if trainer.on_head:
        # A pass forward alone is a third of one with the way back.
        works = [Work("features", 1, 0, trainer.search_passes() / 3)]
    else:
        args = trainer.args
        steps = args.steps_of(len(trainer.train_dataset))
        works = [Work("search", 1, steps, trainer.search_passes())]
        if command.baseline_folds:
            works.append(comparison_work(baselines, command))
    if trainer.args.retrain != "none":
        works.append(Work("final training", 1, baselines.steps, final))
    rows = ", ".join(f"{count} {name}" for name, count in trainer.data.counts.items())
    length = "minutes" if trainer.of_texts else "seconds, or a minute"
    head = f"; search and comparison on a head take {length}" if trainer.on_head else ""
    return f"examples: {rows}{head}\n{table(works, seconds_a_pass(trainer))}"


def comparison_work(baselines: Baselines, command: MixArguments) -> Work:
    """The trainings of a comparison on the adapter."""
    folds, equal = command.baseline_folds, command.equal_passes
    works = works_of(baselines, runs_of(baselines, equal_passes=equal))
    trainings, passes = map(sum, zip(*works, strict=True))
    return Work("comparison", folds * trainings, baselines.steps, passes / trainings)


def held_out(command: MixArguments, setup: Setup) -> dict[str, Dataset | None]:
    """The trusted and the test examples, as arguments of `MixTrainer`."""
    trusted, test = setup.read(command.trusted_file or (), "trusted_file"), None
    folds = command.baseline_folds
    if folds and not 2 <= folds <= len(trusted):
        raise ProblemError(
            f"baseline_folds: must be 0, or from 2 to the {len(trusted)} rows of trusted_file, got "
            f"{folds}"
        )
    if command.test_file:
        test = setup.read(command.test_file, "test_file")
        warn_of_shared(test, "test examples", setup.train, "in a source")
        warn_of_shared(test, "test examples", trusted, "trusted examples")
    return {"trusted": trusted, "eval_dataset": test}


def trusted_losses(trainer: MixTrainer) -> Tensor:
    """The loss of each trusted row by the present model, ``(n,)``."""
    with Baselines(trainer) as baselines:
        return baselines.losses(trainer.data.trusted)


def search(trainer: MixTrainer, checkpoint: str | bool | None) -> float | None:
    """Learn the weights; on the adapter train with them too, and save. Returns the seconds.

    A search on the head is done again where a run is resumed. One on the adapter goes on, and None
    is returned.
    """
    if trainer.on_head:
        _ = trainer.head_mix  # whose features are not of the search's time
        begin = time.perf_counter()
        trainer.search(None)
        return time.perf_counter() - begin
    trainer.add_callback(RecordShares(trainer))
    if trainer.args.retrain != "none":
        announce(trainer, LEARNED)
    begin = time.perf_counter()
    trainer.train(checkpoint)
    seconds = time.perf_counter() - begin
    save_adapter(trainer)  # the comparison takes long
    return None if checkpoint else seconds


def compare(
    trainer: MixTrainer, command: MixArguments, seconds: float | None
) -> BaselineComparison | None:
    """The comparison, if it is wanted; of the adapter it goes on where a killed run has stopped.

    ``seconds`` are those of the search, None where it is not known.
    """
    if not command.baseline_folds:
        return None
    output = Path(trainer.args.output_dir or "")
    if trainer.is_world_process_zero():
        print(f"\n{estimate(trainer, command, seconds)}", flush=True)
    return compare_baselines(
        trainer,
        folds=command.baseline_folds,
        equal_passes=command.equal_passes,
        record=output / RECORD,
    )


def estimate(trainer: MixTrainer, command: MixArguments, seconds: float | None) -> str:
    """What the comparison will take, by the ``seconds`` of the search."""
    if trainer.on_head:
        searches: float = SEARCHES_A_FOLD * command.baseline_folds
        text = f"methods are compared on the head in {command.baseline_folds} folds"
    else:
        baselines = Baselines(trainer)
        work = comparison_work(baselines, command)
        searches = work.trainings * work.passes / baselines.passes
        text = (
            f"the adapter of the learned weights is in {trainer.args.output_dir}; methods are "
            f"compared by {work.trainings} trainings"
        )
    if seconds is not None:
        text += f", in about {in_words(searches * seconds)}"
    if not trainer.on_head and trainer.args.save_strategy != "no":
        text += "; after a kill --resume_from_checkpoint true goes on with it"
    return text


def train(trainer: MixTrainer, chosen: MethodResult | None, resume: bool) -> None:
    """Train the adapter by the method of ``chosen``, by the learned weights with None."""
    method = chosen.method if chosen else LEARNED
    if trainer.args.retrain == "none":
        return
    if trainer.on_head:
        announce(trainer, method)
        plan = plan_of(trainer.head_mix, method, chosen.setting if chosen else None)
        trainer.retrain(plan, resume=resume)
    elif chosen is not None and method != LEARNED:
        steps = int(chosen.setting)
        announce(trainer, method, steps)
        with Baselines(trainer) as baselines:
            baselines.train(method, steps, trainer.data)
            baselines.keep()


def announce(trainer: MixTrainer, method: str, steps: int | None = None) -> None:
    """Say how long the final training is, of ``steps`` or as the arguments say."""
    args, rows = trainer.args.for_retraining(), len(trainer.train_dataset)
    args.max_steps = steps or args.steps_of(rows)
    if trainer.is_world_process_zero():
        print(
            f"\nfinal training, by {method}: {args.epochs_of(rows):.2f} epochs of {rows} rows, "
            f"{args.max_steps} steps",
            flush=True,
        )


def doubts(trainer: MixTrainer, steps: int) -> list[str]:
    """The reasons not to believe the weights after ``steps`` updates."""
    notes, rate = [], trainer.args.upper_learning_rate
    if steps < FEW_STEPS:
        name = "search_steps" if trainer.on_head else "max_steps or num_train_epochs"
        notes.append(f"{steps} updates of the weights are few; raise {name}")
    if rate * steps < 1:
        notes.append(f"upper_learning_rate {rate:g} keeps all weights near 1; its default is 0.6")
    return notes


def hardly_learned(trainer: MixTrainer, before: Tensor, after: Tensor) -> list[str]:
    """A note where the losses of trusted rows, ``(n,)``, have hardly fallen in the training."""
    was, now = float(before.mean()), float(after.mean())
    if now <= (1 - LEAST_FALL) * was:
        return []
    return [
        f"the loss of the trusted examples went from {was:.4f} to {now:.4f} only: the adapter has "
        f"hardly learned; raise learning_rate ({trainer.args.learning_rate:g}) or the number of "
        "steps"
    ]


class RecordShares(TrainerCallback):
    """Logs the sources' shares before the search on an adapter, and at each of its upper steps.

    They are in the Trainer's state, so that the picture of a resumed search has all steps.
    """

    def __init__(self, trainer: MixTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the initial shares."""
        if state.global_step == 0:
            state.log_history.append({"step": 0, SHARES: self.trainer.shares()})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the shares."""
        if state.global_step % args.lower_steps == 0:
            state.log_history.append({"step": state.global_step, SHARES: self.trainer.shares()})
