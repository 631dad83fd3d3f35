"""hyperopt-peft compare: methods at equal passes on the same test rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hyperopt_peft.cli.options import OutputArguments, divided, names_of
from hyperopt_peft.cli.report import Report, as_text
from hyperopt_peft.cli.text import models
from hyperopt_peft.cli.text.setup import SHARED, choose, prepare
from hyperopt_peft.comparison import Choice, Runs, compare_heads, compare_methods
from hyperopt_peft.comparison.choice import RATES, UPPER_RATES
from hyperopt_peft.comparison.find import find_method
from hyperopt_peft.comparison.tables import NOT_PRINTED, rows_of
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.validation import option

METHODS = ["lora", "dora", "bidora"]
#: The options that only adapters read.
OF_ADAPTERS = {"passes", "rates", "upper_rates", "splits", "points", "frozen_dropout"}


@dataclass
class CompareArguments(OutputArguments):
    """The methods, the budget and the seeds."""

    methods: list[str] = option(default_factory=lambda: [*METHODS], help="compared with the first")
    score_model: Literal["adapter", "head"] = option("adapter", help="or a linear head on features")
    folds: int | None = option(None, help="folds of upper_file, which replace eval_file")
    passes: float = option(300.0, help="of a run")
    seeds: list[int] | None = option(None, help="of start, split and order; five, or one a fold")
    rates: list[float] = option(default_factory=lambda: [*RATES], help="learning rates to try")
    upper_rates: list[float] = option(default_factory=lambda: [*UPPER_RATES], help="upper rates")
    splits: int = option(Choice.splits, help="held-out parts of a seed's rows, which choose rates")
    points: int = option(Choice.points, help="where a run may stop: at k/points of its passes")
    frozen_dropout: bool = option(False, help="keep dropout in frozen layers; else computed once")
    jobs: int = option(1, help="processes")
    run: str = option("1/1", help="K/N: the K-th of N parts, of a job array, say")


TYPES = (CompareArguments, *SHARED)


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, compare the methods, write the tables, the picture and the runs."""
    given, flags = divided("compare", argv)
    names = given.get("methods") or METHODS
    besides = names_of(map(find_method, names))
    plain = choose("compare", CompareArguments, argv, "lora", besides)
    chosen = [choose("compare", CompareArguments, argv, name, plain.options) for name in names]
    command, args = plain.command, plain.args
    number, slash, count = command.run.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ProblemError(f"run: must be K/N with 1 ≤ K ≤ N, got {command.run}")
    replaces = command.overwrite_output_dir and int(count) == 1
    command.require_output(args, shared=not replaces)
    names = [each.name.rpartition(":")[2] for each in chosen]
    if len({*names}) < len(names):
        raise ProblemError(f"methods: two of {', '.join(names)} have one name; rename a class")
    data = replace(plain.data, eval_fraction=0.0) if command.folds else plain.data
    setup = prepare(plain.model, data, args, *(each.method for each in chosen))
    option = "upper_file" if command.folds else "eval_file"
    judge = setup.upper_rows if command.folds else setup.evaluation_rows
    if judge is None:
        raise ProblemError(f"{option}: compare needs rows that score the methods; give {option}")
    if known := setup.scored_by(judge):
        raise ProblemError(
            f"{option}: {known} of {len(judge)} rows have scored the training rows, and "
            "cannot test the use of these scores; give other rows, or a train_file without scores"
        )
    output = Path(args.output_dir)
    if replaces and not command.dry_run:
        for path in output.glob("runs*.jsonl"):
            path.unlink()
    base, _ = setup.base()
    methods = {name: each.method for name, each in zip(names, chosen, strict=True)}
    options: dict[str, Any] = {
        "train_dataset": setup.train,
        "upper_dataset": setup.upper,
        "test_dataset": setup.evaluation,
        "folds": command.folds,
        "seeds": command.seeds,
        "metric": "loss" if command.folds else setup.task.metric or "loss",
        "runs": Runs(output, command.jobs, (int(number), int(count)), dry_run=command.dry_run),
        "trainer": setup.trainer_class(),
        **setup.options(base),
    }
    if command.score_model == "head":
        if unread := sorted(OF_ADAPTERS & flags.keys()):
            text = f"{unread[0]}: has no effect on heads, which are solved; leave it out"
            raise ProblemError(text)
        comparison = compare_heads(methods, lambda: setup.base()[0], args, **options)
    else:
        choice = {name: getattr(command, name) for name in names_of([Choice]) & OF_ADAPTERS}
        comparison = compare_methods(
            methods,
            lambda: setup.base()[0],
            models.adapter_config(base, setup.args, setup.task),
            args,
            passes=command.passes,
            choice=Choice(**choice),
            frozen_dropout=command.frozen_dropout,
            **options,
        )
    if command.dry_run:
        return
    comparison.plot(output / "comparison.png")
    comparison.runs().to_csv(output / "runs.csv", index=False)
    heading, tables = comparison.heading(), comparison.tables()
    printed = tables["Scores"].drop(columns=NOT_PRINTED, errors="ignore")
    (output / "comparison.tex").write_text(
        f"% {heading}\n{printed.to_latex(index=False, escape=True)}"
    )
    sentences = comparison.sentences()
    if command.folds:
        sentences.insert(0, comparison.recommendation())
    sections = {heading: rows_of(printed)}
    pictures = {"The comparison": "comparison.png"}
    more = {title: rows_of(table) for title, table in tables.items()}
    page = Report("compare", "\n".join(sentences), plain.options, sections, pictures, details=more)
    shown = {heading: more["Scores"]} if command.details else sections
    print(f"\n{page.verdict}\n\n{as_text(shown)}\n\n{page.write(output)} has a picture")
