"""hyperopt-peft mix: how much should each source of training data count?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from transformers.hf_argparser import HfArg

from hyperopt_peft.cli.mix_files import picture, snippets, write_weights
from hyperopt_peft.cli.options import parse, require_folder
from hyperopt_peft.cli.text.data import DataArguments, read_files, require_columns
from hyperopt_peft.cli.text.models import ModelArguments
from hyperopt_peft.cli.text.setup import Setup, prepare, warn_of_shared
from hyperopt_peft.cli.train import resume_from, save_adapter
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.compare_baselines import compare_baselines
from hyperopt_peft.problems.mix_trainer import MixTrainer, MixTrainingArguments


@dataclass
class MixArguments:
    """What is done with the weights."""

    _argument_group_name = "command"

    trusted_file: list[str] | None = HfArg(
        default=None, help="the few examples that the sources are judged by: files"
    )
    test_file: list[str] | None = HfArg(
        default=None, help="examples that the final adapter is evaluated on, and nothing else"
    )
    verdict: int = HfArg(
        default=3,
        help="folds of the trusted examples by which simple baselines and the learnt weights are "
        "compared, a search each; 0 for none",
    )
    equal_passes: bool = HfArg(
        default=True, help="whether baselines may take as many passes as the search, too"
    )

    def __post_init__(self) -> None:
        if not self.trusted_file:
            raise ProblemError("trusted_file: give examples with labels that you trust")
        if self.verdict and self.verdict < 2:
            raise ProblemError(f"verdict: must be 0 or at least 2 folds, got {self.verdict}")


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
                instead = "learns them" if name == "weight_column" else "has test_file instead"
                raise ProblemError(f"{name}: not an option of mix, which {instead}")
        self.files = _files(self.sources) if self.sources else {}
        files = [path for paths in self.files.values() for path in paths]
        other = self.dataset or self.source_column or self.train_file not in (None, files)
        if self.files and other:
            raise ProblemError(
                "sources: give the files as sources, or train_file with source_column, not both"
            )
        if not self.files and not self.source_column:
            raise ProblemError("sources: give the files of each source, or a source_column")
        if self.files:
            self.train_file = files
        super().__post_init__()


def _files(text: str) -> dict[str, list[str]]:
    """The files of each source in the mapping ``text``, as YAML or JSON."""
    try:
        given = yaml.safe_load(text)
        return {str(k): [v] if isinstance(v, str) else [*map(str, v)] for k, v in given.items()}
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise ProblemError(
            f"sources: must map names to files, as in {{wiki: a.jsonl}}, got {text!r}"
        ) from error


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, learn the weights, train with them; write adapter, weights and picture.

    Raises:
        ProblemError: a bad option, model or data set.
        NonFiniteError: as the option ``non_finite`` says.
    """
    kinds = (MixArguments, ModelArguments, SourceArguments, MixTrainingArguments)
    own, model_args, data, args = parse("mix", kinds, argv)
    require_folder(args.output_dir)
    setup = prepare(model_args, data)
    trusted = _encoded(setup, data, own.trusted_file, "the trusted examples")
    test = _encoded(setup, data, own.test_file, "the test examples") if own.test_file else None
    if test is not None:
        warn_of_shared(test, "test examples", setup.train, "in a source")
        warn_of_shared(test, "test examples", trusted, "trusted examples")
    model = setup.model(args.seed, dora=False)
    trainer = MixTrainer(
        model,
        args,
        sources=sources_of(setup, data),
        trusted=trusted,
        eval_dataset=test,
        processing_class=setup.tokenizer,
        data_collator=setup.collator(model),
        compute_metrics=setup.task.metrics,
        preprocess_logits_for_metrics=setup.task.reduce,
    )
    first = trainer.shares()
    trainer.train(resume_from(args))
    save_adapter(trainer)
    output = Path(args.output_dir)
    if trainer.is_world_process_zero():
        write_weights(trainer, output / "weights.json")
        picture(first, trainer.state.log_history, trainer, output / "weights.png")
        print(table(trainer))
    if data.files and trainer.is_world_process_zero():
        text = snippets(trainer.row_weights(), trainer.shares(), data.files)
        (output / "mixture.yaml").write_text(text)
    if test is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if own.verdict:
        found = compare_baselines(trainer, folds=own.verdict, equal_passes=own.equal_passes)
        if trainer.is_world_process_zero():
            print(f"\nby {own.verdict} folds of {len(trusted)} trusted examples:\n{found}")
    if trainer.is_world_process_zero():
        print(f"\nthe adapter, weights.json and weights.png are in {output}")
    trainer.end_training()


def sources_of(setup: Setup, data: SourceArguments) -> dict[str, Dataset]:
    """The encoded examples of each source, by name."""
    if data.source_column is not None:
        require_columns(setup.source[0], [data.source_column], "the training examples")
        of_row = [str(name) for name in setup.source[0][data.source_column]]
    else:
        of_row = [
            name
            for name, paths in data.files.items()
            for _ in range(len(read_files(paths, "sources")))
        ]
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(of_row):
        rows.setdefault(name, []).append(row)
    return {name: setup.train.select(numbers) for name, numbers in rows.items()}


def _encoded(setup: Setup, data: DataArguments, paths: Sequence[str], what: str) -> Dataset:
    rows = read_files(paths, what)
    require_columns(rows, data.columns(setup.args.task), what)
    return setup.encoder.encode(rows, what)


def table(trainer: MixTrainer) -> str:
    """Rows, share and weight of each source, the largest weight first."""
    shares, weights = trainer.shares(), trainer.row_weights()
    counts: Mapping[str, Any] = trainer.data.counts
    lines = [f"{'source':30}{'rows':>8}{'share':>9}{'row weight':>12}"]
    for name in sorted(weights, key=lambda each: -weights[each]):
        lines.append(f"{name[:29]:30}{counts[name]:8}{shares[name]:9.3f}{weights[name]:12.3f}")
    return "\n".join(lines)
