"""hyperopt-peft attribute: which training rows help or hurt on the evaluation examples."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from hyperopt_peft import attribute, why
from hyperopt_peft.adapters import use_fast_dora
from hyperopt_peft.attribution import Reasons
from hyperopt_peft.attribution.scores import parse_estimator
from hyperopt_peft.cli import train
from hyperopt_peft.cli.answers import Answers
from hyperopt_peft.cli.options import OutputArguments, divided, flags_of, names_of
from hyperopt_peft.cli.plan import Work, phases, plan
from hyperopt_peft.cli.report import Report
from hyperopt_peft.cli.text import attributed
from hyperopt_peft.cli.text.data import read_files
from hyperopt_peft.cli.text.setup import SHARED, Chosen, Setup, choose, prepare
from hyperopt_peft.cli.text.tasks import SFT
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.data import require_unseen
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils.validation import option


@dataclass
class AttributeArguments(OutputArguments):
    """How rows are scored, and what is done with the scores."""

    score_model: Literal["adapter", "head"] = option("adapter", help="or a linear head on features")
    estimator: str | None = option(
        None,
        help="unrolled (the whole run, the default), a solver such as minres (the end of the run; "
        "for a head cg is the default), or gradient",
    )
    check: int = option(0, help="retrainings without random rows that check the scores")
    suspects: int | None = option(None, help="folds of the search for wrong labels; 5 for a head")
    why: list[str] | None = option(None, help="files with rows to explain by training rows")
    method: str = option("lora", help="as the option of train, without upper level")
    escape_formulas: bool = option(False, help="keep a spreadsheet from running texts")
    memory_limit: float = option(1.0, help="GiB that the run's checkpoints may take")

    def __post_init__(self) -> None:
        if self.estimator is not None:
            parse_estimator(self.estimator)
        for name, least in (("check", 5), ("suspects", 2)):
            value = getattr(self, name)
            if value and value < least:
                raise ProblemError(f"{name}: must be 0 or at least {least}, got {value}")


TYPES = (AttributeArguments, *SHARED)


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train, score; write ``attribution.csv``, a picture and the adapter."""
    chosen = choose("attribute", AttributeArguments, argv)
    command, args, data = chosen.command, chosen.args, chosen.data
    if command.suspects and chosen.model.task != "text-classification":
        raise ProblemError(f"suspects: needs a class label per row; {chosen.model.task} has none")
    if command.why and not chosen.model.task.endswith("classification"):
        raise ProblemError(f"why: needs classes of rows or tokens; {chosen.model.task} has none")
    output = Path(args.output_dir)
    folders = [Path(x).resolve().parent for x in chosen.options.get("corrections", ())]
    if output.resolve() in folders:
        raise ProblemError("corrections: this run would replace the file; name another output_dir")
    if command.suspects is None:
        asked = command.score_model == "head" and chosen.model.task == "text-classification"
        command.suspects = 5 if asked else 0  # each fold takes seconds
    command.require_output(args)
    setup = prepare(chosen.model, data, args, chosen.method, numbered=True)
    if setup.evaluation is None:
        raise ProblemError(
            "eval_fraction: attribute needs evaluation rows; give eval_file, or an eval_fraction "
            "above 0"
        )
    setup = replace(setup, train=setup.train.sort(attributed.ROW))
    explained, shown = rows_to_explain(command.why, setup) if command.why else (None, {})

    def new_trainer() -> Any:
        made = setup.trainer(args, chosen.method)
        if chosen.name == "dora":
            use_fast_dora(made.model)  # with the norm in the graph, as an exact derivative needs
        return made

    trainer = new_trainer()
    if command.dry_run:
        print(planned(command, setup, trainer))
        return
    result = attribute(
        trainer,
        model=command.score_model,
        estimator=command.estimator,
        memory_limit=command.memory_limit,
        progress=sys.stderr.isatty(),
    )
    setup.require_sane(result.value)
    # TRL leaves rows out whose labels are cut off.
    numbered = trainer.train_dataset if chosen.model.task == SFT else setup.train
    result.numbers = numbered[attributed.ROW][:]
    rows = setup.rows.select(result.numbers)
    result.columns = {name: rows[name][:] for name in setup.encoder.columns}
    first = trainer.is_world_process_zero()
    if command.score_model == "adapter":
        train.save_adapter(trainer)
        trainer.save_metrics("eval", trainer.evaluate())
    page = Report("attribute", "", chosen.options, curves={"Losses": trainer.state.log_history})
    page.pictures = {"Scores of the training rows": "attribution.png"}
    digests = attributed.digests_of(setup.evaluation_rows, setup.encoder.columns)
    scored_on, same = {*digests, *setup.scored_on}, setup.same_text
    classes = dict[int, Any]()
    if chosen.model.task == "text-classification":
        classes = dict(zip(setup.train["labels"], rows[data.label_column]))
    again = train_again(argv, chosen, output)
    if same:
        text = f"{len(same)} rows; the column {attributed.SAME_TEXT} has the first row of each text"
        page.sections = {"The same text with another label": text}
    answers = Answers(result, command, page, output if first else None, scored_on, classes, again)
    answers.columns[attributed.SAME_TEXT] = [same.get(row, "") for row in result.numbers]

    def reasons() -> Reasons:
        found = why(new_trainer(), explained, progress=sys.stderr.isatty())
        return replace(found, columns=result.columns, numbers=result.numbers, explained=shown)

    for text in answers.paragraphs(args.seed, reasons if explained else None):
        if first:
            print(f"{text}\n", flush=True)
    if first:
        print(f"report.html and attribution.csv, with all rows, are in {output}")
    trainer.end_training()


def train_again(argv: Sequence[str], chosen: Chosen, output: Path) -> str:
    """The command that trains on the same data with corrected labels, into another folder."""
    _, flags = divided("attribute", argv)
    file = [word for word in argv[:1] if not word.startswith("-")]
    names = names_of([*train.TYPES, type(chosen.method)])
    names -= names_of([OutputArguments])
    words = {name: values for name, values in flags.items() if name in names}
    words |= {"method": [chosen.name], "output_dir": [f"{output}-corrected"]}
    words["corrections"] = [*chosen.options.get("corrections", ()), f"{output}/suspects.csv"]
    if "eval_file" in chosen.options:  # other rows than those by which the rows were scored
        words["eval_file"] = ["TEST_ROWS.csv"]
    return shlex.join(["hyperopt-peft", "train", *file, *flags_of(words)])


def rows_to_explain(files: Sequence[str], setup: Setup) -> tuple[Dataset, dict[str, list[Any]]]:
    """The encoded rows of ``files``, and the columns to show of them."""
    rows, label = read_files(files, "why"), setup.encoder.columns[-1]
    unlabelled = label not in rows.column_names and setup.args.task == "text-classification"
    if unlabelled:  # the model needs a label, which is not shown
        rows = rows.add_column(label, [setup.encoder.names[0]] * len(rows))
    encoded = setup.encoder.encode(rows, "the rows of why")
    require_unseen("why", encoded.remove_columns("labels"), training=setup.train, upper=setup.upper)
    names = [name for name in setup.encoder.columns if name != label or not unlabelled]
    shown = {name: rows[name][:] for name in names}
    if setup.args.task == "token-classification":  # words and tags of which the model reads a token
        found = setup.encoder.tokenizer(shown[names[0]], is_split_into_words=True)
        kept = [sorted({*found.word_ids(row)} - {None}) for row in range(len(rows))]
        for name, column in shown.items():
            shown[name] = [[x[k] for k in ks] for x, ks in zip(column, kept, strict=True)]
    return encoded, shown


def planned(command: AttributeArguments, setup: Setup, trainer: BilevelTrainer) -> str:
    """The examples and the trainings in lines."""
    line = f"examples: {len(setup.train)} training, {len(setup.evaluation or ())} evaluation"
    if command.score_model == "head":
        return f"{line}\nheads are trained in seconds"
    steps = sum(work.steps for work in phases(trainer))
    check = command.check + 1 if command.check else 0
    counts = {"training": 1, "check": check, "suspects": command.suspects or 0}
    return f"{line}\n{plan([Work(name, n, steps) for name, n in counts.items() if n])}"
