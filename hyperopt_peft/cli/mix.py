"""hyperopt-peft mix: how much should each source of training data count?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from transformers import TrainerCallback
from transformers.hf_argparser import HfArg

from hyperopt_peft.cli.mixture_files import write_mixture
from hyperopt_peft.cli.options import OutputArguments, parse, resume_from
from hyperopt_peft.cli.text.data import TRAIN, DataArguments, join, read_files, require_columns
from hyperopt_peft.cli.text.models import ModelArguments
from hyperopt_peft.cli.text.setup import prepare, warn_of_shared
from hyperopt_peft.cli.train import save_adapter
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.compare_baselines import compare_baselines
from hyperopt_peft.problems.mix_trainer import MixTrainer, MixTrainingArguments
from hyperopt_peft.utils.groups import group_rows
from hyperopt_peft.utils.plots import COLOURS, drawing

#: The column with the name of each training example's source file.
ORIGIN = "mix_source"
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


@dataclass
class SourceArguments(DataArguments):
    """The examples of the sources, and their columns."""

    sources: str | None = HfArg(
        default=None,
        help="the files of each source, by name, as a mapping: {wiki: a.jsonl, code: [b.jsonl]}",
    )
    source_column: str | None = HfArg(
        default=None, help="the column of train_file or dataset that names each example's source"
    )
    eval_fraction: float = HfArg(default=0.0, help="must stay 0 here: mix has test_file")

    def __post_init__(self) -> None:
        for name in ("eval_file", "eval_split", "eval_fraction", "weight_column"):
            if getattr(self, name):
                raise ProblemError(f"{name}: mix has test_file and learns weights; leave it out")
        if bool(self.sources) == bool(self.source_column):
            raise ProblemError("sources: give either the files of each source, or a source_column")
        self.files: dict[str, list[str]] = {}
        #: The number of rows of each file, by source, once they are read.
        self.rows: dict[str, dict[str, int]] = {}
        if not self.sources:
            super().__post_init__()
            return
        if self.train_file or self.dataset:
            raise ProblemError("sources: have the training files; leave train_file and dataset out")
        try:
            files = yaml.safe_load(self.sources)
            self.files = {
                str(k): [v] if isinstance(v, str) else [*map(str, v)] for k, v in files.items()
            }
        except (yaml.YAMLError, TypeError, AttributeError) as error:
            raise ProblemError(
                f"sources: must map names to files, as in {{wiki: a.jsonl}}, got {self.sources!r}"
            ) from error

    def read(self) -> tuple[Dataset, None]:
        """The examples of all sources; those of ``sources`` have the source's name in `ORIGIN`."""
        if not self.files:
            return super().read()[0], None
        tables = {
            (name, path): read_files([path], "sources")
            for name, paths in self.files.items()
            for path in paths
        }
        names = [name for (name, _), table in tables.items() for _ in range(len(table))]
        for (name, path), table in tables.items():
            self.rows.setdefault(name, {})[path] = len(table)
        return join(tables.values(), "sources").add_column(ORIGIN, names), None


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, learn the weights, train with them; write adapter and weights."""
    kinds = (MixArguments, ModelArguments, SourceArguments, MixTrainingArguments)
    command, model_args, data, args = parse("mix", kinds, argv)
    command.require_output(args, resumes=True)
    setup = prepare(model_args, data)
    trusted = setup.read(command.trusted_file, "trusted_file")
    folds = command.baseline_folds
    if folds and not 2 <= folds <= len(trusted):
        raise ProblemError(
            f"baseline_folds: must be 0, or from 2 to the {len(trusted)} rows of trusted_file, got "
            f"{folds}"
        )
    test = None
    if command.test_file:
        test = setup.read(command.test_file, "test_file")
        warn_of_shared(test, "test examples", setup.train, "in a source")
        warn_of_shared(test, "test examples", trusted, "trusted examples")
    column = data.source_column or ORIGIN
    require_columns(setup.rows, [column], TRAIN)
    groups = group_rows(setup.rows[column])
    sources = {name: setup.train.select(rows) for name, rows in groups.items()}
    model = setup.model(args.seed, dora=False)
    options = {"trusted": trusted, "eval_dataset": test, **setup.options(model)}
    trainer = MixTrainer(model, args, sources=sources, **options)
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
    if test is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if folds:
        comparison = compare_baselines(trainer, folds=folds, equal_passes=command.equal_passes)
        if first:
            print(f"\nby {folds} folds of {len(trusted)} trusted examples:\n{comparison}")
    if first:
        print(f"\nthe adapter, weights.json and weights.png are in {output}")
    trainer.end_training()


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
