"""hyperopt-peft mix: how much should each source of training data count?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from transformers.hf_argparser import HfArg

from hyperopt_peft.cli.mixture_files import write_mixture
from hyperopt_peft.cli.options import OutputArguments, option, parse, resume_from
from hyperopt_peft.cli.text import sft
from hyperopt_peft.cli.text.data import TRAIN, require_columns
from hyperopt_peft.cli.text.models import ModelArguments
from hyperopt_peft.cli.text.setup import Setup, prepare, trainer_errors, warn_of_shared
from hyperopt_peft.cli.text.sources import SourceArguments, Sources
from hyperopt_peft.cli.train import save_adapter
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.compare_baselines import compare_baselines
from hyperopt_peft.problems.mix_trainer import MixTrainer
from hyperopt_peft.utils.groups import group_rows
from hyperopt_peft.utils.plots import COLOURS, drawing

#: The sources' shares in a record of the Trainer's log.
SHARES = "shares"
#: A source has a colour and a marker of its own.
MARKERS = "os^Dvx"


@dataclass
class MixArguments(OutputArguments):
    """What is done with the weights."""

    trusted_file: list[str] | None = HfArg(default=None, help="few examples that judge the sources")
    test_file: list[str] | None = HfArg(default=None, help="to evaluate the final adapter alone")
    baseline_folds: int = HfArg(
        default=3,
        help="folds of the trusted examples by which simple baselines and the learned weights are "
        "compared, a search each; 0 for no comparison",
    )
    equal_passes: bool = HfArg(default=True, help="whether baselines may take the search's passes")

    def __post_init__(self) -> None:
        if not self.trusted_file:
            raise ProblemError("trusted_file: give examples with labels that you trust")


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, learn the weights, train with them; write adapter and weights."""
    kind: Any = MixTrainer
    if is_sft := option("task", argv) == sft.SFT:
        kind = MixTrainer.over(sft.require_trl().SFTTrainer)
    data_kind = Sources if is_sft else SourceArguments
    kinds = (MixArguments, ModelArguments, data_kind, kind.Arguments)
    command, model_args, data, args = parse("mix", kinds, argv)
    command.require_output(args, resumes=True)
    setup = sft.prepare(model_args, data, args) if is_sft else prepare(model_args, data)
    require_columns(setup.rows, [data.column], TRAIN)
    groups = group_rows(setup.rows[data.column])
    sources = {name: setup.train.select(rows) for name, rows in groups.items()}
    examples = held_out(command, setup)
    model = setup.model(args.seed, dora=False)
    with trainer_errors():
        trainer = kind(model, args, sources=sources, **examples, **setup.options(model))
    output, first = Path(args.output_dir), trainer.is_world_process_zero()
    trainer.add_callback(RecordShares(trainer, output / "weights.png"))
    trainer.train(resume_from(args))
    save_adapter(trainer)
    shares, weights, counts = trainer.shares(), trainer.row_weights(), trainer.data.counts
    if first:
        record = {
            name: {"rows": counts[name], "share": shares[name], "row_weight": weights[name]}
            for name in weights
        }
        (output / "weights.json").write_text(json.dumps({"sources": record}, indent=1) + "\n")
        if data.rows:
            write_mixture(output / "mixture", data.rows, weights)
        print(f"{'source':30}{'rows':>8}{'share':>9}{'row weight':>12}")
        for name in sorted(weights, key=lambda each: -weights[each]):
            print(f"{name[:29]:30}{counts[name]:8}{shares[name]:9.3f}{weights[name]:12.3f}")
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if folds := command.baseline_folds:
        comparison = compare_baselines(trainer, folds=folds, equal_passes=command.equal_passes)
        if first:
            print(f"\nby {folds} folds of the trusted examples:\n{comparison}")
    if first:
        print(f"\nthe adapter, weights.json and weights.png are in {output}")
    trainer.end_training()


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


class RecordShares(TrainerCallback):
    """Logs the sources' shares at each upper step of the search, and draws them at its end.

    They are in the Trainer's state, so that the picture of a resumed search has all steps.
    """

    def __init__(self, trainer: MixTrainer, path: Path) -> None:
        self.trainer, self.path, self.initial = trainer, path, trainer.shares()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the shares."""
        if state.global_step % args.lower_steps == 0:
            state.log_history.append({"step": state.global_step, SHARES: self.trainer.shares()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the shares."""
        if state.is_world_process_zero:
            logged = {x["step"]: x[SHARES] for x in state.log_history if SHARES in x}
            draw_shares({0: self.initial, **logged}, self.path)


def draw_shares(shares: Mapping[int, Mapping[str, float]], path: Path) -> None:
    """The share of each source over the steps of the search, a colour and marker for each."""
    with drawing(path, 8, 4.5) as (_, axes):
        for number, name in enumerate(shares[0]):
            axes.plot(
                list(shares),
                [at_step[name] for at_step in shares.values()],
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number // len(COLOURS) % len(MARKERS)],
                markersize=4,
                label=name,
            )
        axes.set_xlabel("lower step of the search")
        axes.set_ylabel("share in the training loss")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        legend = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        for text in legend.get_texts():
            text.set_parse_math(False)  # a name may have a $
