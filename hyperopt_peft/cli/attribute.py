"""hyperopt-peft attribute: which training rows help or hurt on the evaluation examples."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers.hf_argparser import HfArg

from hyperopt_peft import attribute, why
from hyperopt_peft.adapters import use_fast_dora
from hyperopt_peft.attribution import Attribution, Reasons
from hyperopt_peft.attribution.estimators import parse_estimator
from hyperopt_peft.attribution.suspects import Suspects
from hyperopt_peft.cli.options import OutputArguments
from hyperopt_peft.cli.plan import Work, plan, whole
from hyperopt_peft.cli.report import Report
from hyperopt_peft.cli.text import SFT
from hyperopt_peft.cli.text.data import (
    EVALUATION,
    ExampleData,
    hold_out,
    read_files,
    require_columns,
)
from hyperopt_peft.cli.text.setup import SHARED, Setup, choose, prepare
from hyperopt_peft.cli.train import save_adapter
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.data import shared
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.plots import row_groups
from hyperopt_peft.utils.tables import aligned

ROW, SLICE, UNROLLED = "row", "slice", "unrolled"
#: The trainings without random rows of `retrain_without`.
DRAWS = 5
#: The rows at each end in tables and picture.
SHOWN = 10


@dataclass
class AttributeArguments(OutputArguments):
    """How rows are scored, and what is done with the scores."""

    score_model: Literal["adapter", "head"] = HfArg(
        default="adapter", help="what is trained, or a linear head on the base model's features"
    )
    estimator: str | None = HfArg(
        default=None,
        help="unrolled (the whole run), an implicit solver such as minres (the end of the run), or "
        "gradient; by default unrolled, and cg of a head",
    )
    check: int = HfArg(default=0, help="retrainings without random rows that check the scores")
    slices: str | None = HfArg(default=None, help="an evaluation column, whose values get scores")
    suspects: int = HfArg(default=0, help="folds of the search for wrong labels, a training each")
    why: list[str] | None = HfArg(
        default=None,
        help="rows of which each prediction has the few training rows behind it shown; those of "
        "text-classification need no label",
    )
    retrain_without: float | None = HfArg(
        default=None, help="the share of the rows to train without, those that hurt most"
    )
    test_file: list[str] | None = HfArg(
        default=None,
        help="judges retrain_without; if not given eval_fraction of the training examples",
    )
    method: str = HfArg(default="lora", help="as the option of train; rows of both levels count")
    escape_formulas: bool = HfArg(
        default=False, help="write texts that begin with = + - @ so that no spreadsheet runs them"
    )
    memory_limit: float = HfArg(default=1.0, help="GiB that the run's checkpoints may take")

    def __post_init__(self) -> None:
        if self.estimator is not None:
            parse_estimator(self.estimator)
        for name, least in (("check", 5), ("suspects", 2)):
            value = getattr(self, name)
            if value and value < least:
                raise ProblemError(f"{name}: must be 0 or at least {least}, got {value}")
        if self.retrain_without is not None and not 0 < self.retrain_without < 1:
            raise ProblemError(f"retrain_without: must be in (0, 1), got {self.retrain_without}")


TYPES = (AttributeArguments, *SHARED)


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train, score; write ``attribution.csv``, a picture and the adapter."""
    chosen = choose("attribute", AttributeArguments, argv)
    command, args, data = chosen.command, chosen.args, chosen.data
    if command.suspects and chosen.model.task != "text-classification":
        raise ProblemError(f"suspects: needs a class label per row; {chosen.model.task} has none")
    if chosen.model.task == SFT and command.retrain_without is not None:
        raise ProblemError("retrain_without: is not of task sft; train without rows by TRL")
    if command.why and not chosen.model.task.endswith("classification"):
        raise ProblemError(f"why: needs classes of rows or tokens; {chosen.model.task} has none")
    command.require_output(args)
    without = replace(data, eval_fraction=0.0)
    setup, test = split(command, prepare(chosen.model, without, args, chosen.method), data)
    explained, shown = rows_to_explain(command.why, setup) if command.why else (None, {})

    def new_trainer() -> Any:
        made = setup.trainer(args, chosen.method)
        if chosen.name == "dora":
            use_fast_dora(made.model)  # with the norm in the graph, as an exact derivative needs
        return made

    trainer = new_trainer()
    if command.dry_run:
        print(planned(command, setup, trainer, len(explained or ())))
        return
    result = attribute(
        trainer,
        model=command.score_model,
        estimator=command.estimator,
        slices=command.slices and SLICE,
        memory_limit=command.memory_limit,
        progress=sys.stderr.isatty(),
    )
    setup.require_sane(max(result.values.values()))
    # TRL leaves rows out whose labels are cut off.
    numbered = trainer.train_dataset if chosen.model.task == SFT else setup.train
    result.numbers = numbered[ROW][:]
    rows = setup.rows.select(result.numbers)
    result.columns = {name: rows[name][:] for name in setup.encoder.columns}
    output, first = Path(args.output_dir), not distributed.rank()
    if command.score_model == "adapter":
        save_adapter(trainer)
        trainer.save_metrics("eval", trainer.evaluate())
    page = Report("attribute", "", chosen.options, curves={"Losses": trainer.state.log_history})
    page.pictures = {"Scores of the training rows": "attribution.png"}
    scored = Scored(result, command, page, output if first else None)

    def reasons() -> Reasons:
        fresh, on_adapter = new_trainer(), command.score_model == "adapter"
        found = why(fresh, explained, adapter=on_adapter, progress=sys.stderr.isatty())
        columns, numbers = result.columns, result.numbers
        return replace(found, columns=columns, numbers=numbers, explained=shown)

    for text in scored.paragraphs(
        test, args.seed, reasons if explained else None, len(explained or ())
    ):
        if first:
            print(f"{text}\n", flush=True)
    if first:
        print(f"attribution.csv and report.md are in {output}")
    trainer.end_training()


def split(
    command: AttributeArguments, setup: Setup, data: ExampleData
) -> tuple[Setup, Dataset | None]:
    """The set-up, whose training rows have their numbers in the files, and the test rows."""
    train, evaluation = setup.train.add_column(ROW, range(len(setup.train))), setup.evaluation
    rows, test = setup.evaluation_rows, None
    judged = command.retrain_without is not None and not command.test_file
    if data.eval_fraction == 0 and (rows is None or judged):
        raise ProblemError(
            "eval_fraction: attribute needs evaluation examples, and for retrain_without test "
            "examples; give eval_file and test_file, or an eval_fraction above 0"
        )
    if evaluation is None or rows is None:
        train, evaluation = hold_out(train, data.eval_fraction)
        rows, evaluation = setup.rows.select(evaluation[ROW]), evaluation.remove_columns(ROW)
    if command.slices:
        require_columns(rows, [command.slices], EVALUATION)
        evaluation = evaluation.add_column(SLICE, [str(value) for value in rows[command.slices]])
    if judged:
        train, test = hold_out(train, data.eval_fraction)
    elif command.retrain_without is not None:
        read = read_files(command.test_file or [], "test_file")
        test = setup.encoder.encode(read, "the test examples")
        for other, name in ((setup.train, "training"), (evaluation, "evaluation")):
            if common := shared(test, other):
                raise ProblemError(
                    f"test_file: {common} of {len(test)} rows are {name} examples too, which the "
                    "scores have seen; remove them"
                )
    return replace(setup, train=train.sort(ROW), evaluation=evaluation), test


def rows_to_explain(files: Sequence[str], setup: Setup) -> tuple[Dataset, dict[str, list[Any]]]:
    """The encoded rows of ``files``, and the columns to show of them.

    Rows without a label column have the first class, which is not shown.
    """
    rows, label = read_files(files, "why"), setup.encoder.columns[-1]
    unlabelled = label not in rows.column_names and setup.args.task == "text-classification"
    if unlabelled:
        rows = rows.add_column(label, [setup.encoder.names[0]] * len(rows))
    encoded = setup.encoder.encode(rows, "the rows of why")
    texts = encoded.remove_columns("labels")
    of_levels = [part for part in (setup.train, setup.upper) if part is not None]
    if common := sum(shared(texts, part) for part in of_levels):
        raise ProblemError(
            f"why: {common} of {len(encoded)} rows are training examples, which would explain "
            "themselves; remove them"
        )
    names = [name for name in setup.encoder.columns if name != label or not unlabelled]
    shown = {name: rows[name][:] for name in names}
    for name, column in shown.items():
        if isinstance(column[0], list):  # of words or tags: those of which the model reads a token
            found = setup.encoder.tokenizer(
                rows[setup.encoder.columns[0]][:], is_split_into_words=True
            )
            kept = [sorted({*found.word_ids(row)} - {None}) for row in range(len(rows))]
            shown[name] = [[x[k] for k in ks] for x, ks in zip(column, kept, strict=True)]
    return encoded, shown


def planned(command: AttributeArguments, setup: Setup, trainer: Any, explained: int = 0) -> str:
    """The trainings in lines, and their time; ``explained`` rows each retrain an adapter."""
    rows, evaluation = len(setup.train), len(setup.evaluation or ())
    line = f"examples: {rows} training, {evaluation} evaluation"
    batches = rows / trainer.args.per_device_train_batch_size
    if command.score_model == "head":
        # A pass forward alone is a third of one with the way back.
        twice = 2 if explained else 1  # the rows to explain have a head of their own
        works = [Work("features", twice, 0, (1 + evaluation / rows) * batches / 3)]
        searches = f", and {explained} predictions explained in some seconds each" * bool(explained)
        return f"{line}; heads are trained in seconds{searches}\n{plan(works, trainer)}"
    training = whole(trainer, "training")
    # Scores by a whole run cost two trainings (docs/attribution.md), else passes over rows.
    unrolled = (command.estimator or UNROLLED).startswith(UNROLLED)
    scores = Work("scores", 1, 0, 2 * (training.passes if unrolled else batches))
    works = [training, scores, *[replace(scores, name="scores again")] * bool(command.check)]
    counts = {
        "check": command.check and command.check + 1,
        "suspects": command.suspects,
        "why": explained and explained + 1,
        "retrain_without": 4 + DRAWS if command.retrain_without else 0,
    }
    works += [replace(training, name=name, trainings=n) for name, n in counts.items() if n]
    return f"{line}\n{plan(works, trainer)}"


@dataclass
class Scored:
    """What is printed of a result, and the files in ``folder``, as soon as a part is known."""

    result: Attribution
    command: AttributeArguments
    page: Report
    folder: Path | None
    columns: dict[str, list[Any]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    verdicts: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def write(self, text: str, verdict: str = "", **parts: Any) -> str:
        """Write the files again, with ``parts`` in the record and ``text`` in the page."""
        self.record |= parts
        self.texts.append(text)
        self.verdicts += [verdict] * bool(verdict)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            escape = self.command.escape_formulas
            path = self.folder / "attribution.csv"
            self.result.to_csv(path, self.columns, escape_formulas=escape)
            self.result.plot(self.folder / "attribution.png", SHOWN)
            record = json.dumps(self.record, indent=1)
            (self.folder / "attribution.json").write_text(f"{record}\n")
            unchecked = [] if self.result.checked else ["the scores are unchecked: give check"]
            self.page.verdict = "; ".join([*self.verdicts, *unchecked])
            self.page.texts = {"Checks": "\n\n".join(self.texts)}
            self.page.write(self.folder)
        return text

    def paragraphs(
        self,
        test: Dataset | None,
        seed: int,
        reasons: Callable[[], Reasons] | None = None,
        explained: int = 0,
    ) -> Iterator[str]:
        """The paragraphs that are printed; all but the first two train again."""
        result, command = self.result, self.command
        of_run: dict[str, Any] = {"settings": result.settings, "evaluation_loss": result.values}
        yield self.write(*self._summary(), **of_run)
        if command.check:
            yield self._cost("check", command.check, "and another attribution")
            check = result.check(command.check, seed=seed)
            by_slice = (f"{name}: {one}" for name, one in check.by_slice.items())
            text = "\n".join([f"check: {check}", *by_slice])
            yield self.write(text, check.verdict.partition(";")[0], check=check.record())
        yield self.write(result.table(SHOWN).partition("\nthese scores are")[0])
        if not command.check:
            yield self._cost("unchecked: --check 20", 20, "and tells whether to rely on the scores")
        if command.suspects:
            yield self._cost("suspects", command.suspects)
            suspects = result.suspects(command.suspects, seed=seed)
            flagged = {*suspects.flagged}
            marks = [int(row in flagged) for row in range(len(result.scores))]
            self.columns = {"suspect": marks, "label_confidence": suspects.confidence.tolist()}
            text = f"suspects: {suspects}\n{self._evidence(suspects)}".rstrip()
            if self.folder is not None and flagged:
                confidence, worst = suspects.confidence, suspects.flagged[:SHOWN]
                doubts = {result.line(row, 70): 1 - float(confidence[row]) for row in worst}
                groups, path = {"the most doubtful labels": doubts}, self.folder / "suspects.png"
                row_groups(groups, path, "1 − confidence in the given label")
                self.page.pictures = {**self.page.pictures, "Doubtful labels": "suspects.png"}
            yield self.write(text, suspects=suspects.record())
        if reasons is not None:
            if command.score_model == "adapter":
                yield self._cost("why", explained + 1)
            found = reasons()
            if self.folder is not None:
                found.to_csv(self.folder / "why.csv", escape_formulas=command.escape_formulas)
                if any(reason.rows for reason in found):
                    found.plot(self.folder / "why.png")
                    pictures = {**self.page.pictures, "Why these predictions": "why.png"}
                    self.page.pictures = pictures
            yield self.write(f"why:\n{found}")
        if test is not None and command.retrain_without is not None:
            yield self._cost("retrain_without", 4 + DRAWS)
            removal = result.removal(command.retrain_without, test, draws=DRAWS, seed=seed)
            text = f"on {len(test)} rows that neither training nor scores saw:\n{removal}"
            record = asdict(removal) | {"verdict": removal.verdict}
            yield self.write(text, removal.verdict, removal=record)

    def _evidence(self, suspects: Suspects) -> str:
        """The most doubtful rows, with the place that each has by suspicion, by loss, by score."""
        result, ranks = self.result, self.result.ranks().tolist()
        by_loss = result.losses.nan_to_num(-1.0).argsort(descending=True).argsort() + 1
        lines: list[list[Any]] = [["the most doubtful rows", "by suspicion", "by loss", "by score"]]
        by_suspicion = suspects.confidence.nan_to_num(torch.inf).argsort().argsort() + 1
        for row in suspects.flagged[:SHOWN]:
            places = int(by_suspicion[row]), int(by_loss[row]), ranks[row]
            lines.append([result.line(row), *places])
        return aligned(lines) if suspects.flagged else ""

    def _cost(self, name: str, trainings: int, more: str = "") -> str:
        minutes = trainings * self.result.settings["seconds"] / 60
        return f"{name}: {trainings} trainings, about {minutes:.1f} minutes {more}".rstrip()

    def _summary(self) -> tuple[str, str]:
        """The paragraph on the run, and its line on the rows that hurt."""
        settings, scores = self.result.settings, self.result.scores
        hurt, unseen = int((scores > 0).sum()), settings["unseen"]
        counts = f"{hurt} of {len(scores) - unseen} training rows hurt (score > 0)"
        counts += f"; {unseen} were never trained on: train for longer" * bool(unseen)
        phi = ", ".join(f"{name} {value:.4f}" for name, value in self.result.values.items())
        trained = f"{settings['steps']} steps"
        if self.command.score_model == "head":
            trained = f"a head at its minimum (λ = {settings['l2']:g})"
        lines = [
            f"{settings['rows']} training rows, {trained}, {settings['variables']:,} parameters; "
            f"scores by {settings['estimator']}",
            f"evaluation loss: {phi}",
            counts,
        ]
        if residuals := settings["residuals"].values():
            lines.append(f"largest relative residual of the solver: {max(residuals):.2g}")
        return "\n".join([*lines, *(f"note: {note}" for note in settings["notes"])]), counts
