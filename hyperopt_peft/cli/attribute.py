"""hyperopt-peft attribute: which training rows help or hurt on the evaluation examples."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers.hf_argparser import HfArg

from hyperopt_peft import attribute
from hyperopt_peft.adapters import use_fast_dora
from hyperopt_peft.attribution import Attribution
from hyperopt_peft.attribution.estimators import parse_estimator
from hyperopt_peft.cli.config import option
from hyperopt_peft.cli.options import OutputArguments, parse
from hyperopt_peft.cli.plan import Work, in_words, seconds_a_pass, table, whole
from hyperopt_peft.cli.report import REPORT, Report
from hyperopt_peft.cli.text import sft
from hyperopt_peft.cli.text.data import (
    EVALUATION,
    DataArguments,
    ExampleData,
    hold_out,
    require_columns,
)
from hyperopt_peft.cli.text.models import ModelArguments
from hyperopt_peft.cli.text.setup import Method as Training
from hyperopt_peft.cli.text.setup import MethodArguments, Setup, changed, prepare
from hyperopt_peft.cli.train import evaluated, save_adapter
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.data import shared
from hyperopt_peft.utils import distributed

ROW, SLICE, UNROLLED = "row", "slice", "unrolled"
#: The trainings without random rows of `retrain_without`.
DRAWS = 5
#: The rows at each end in tables and picture.
SHOWN = 10


@dataclass
class AttributeArguments(OutputArguments):
    """How rows are scored, and what is done with the scores."""

    score_model: Literal["adapter", "head"] = HfArg(
        default="adapter",
        help="what is trained and scored: the adapter, or a linear head on the base model's "
        "features, exactly and in seconds",
    )
    estimator: str | None = HfArg(
        default=None,
        help="with options: unrolled (the whole run), minres, cg, nystrom or another implicit "
        "solver (the end of the run), or gradient; by default unrolled, and cg of a head",
    )
    check: int = HfArg(default=0, help="retrainings without random rows that check the scores")
    slices: str | None = HfArg(default=None, help="an evaluation column, whose values get scores")
    suspects: int = HfArg(default=0, help="folds of the search for wrong labels, a training each")
    retrain_without: float | None = HfArg(
        default=None,
        help="the share of the rows to train without, those that hurt most, judged on test_file",
    )
    test_file: list[str] | None = HfArg(
        default=None,
        help="the examples that judge retrain_without; if not given eval_fraction of the training "
        "examples, which are then neither trained nor evaluated on",
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


@dataclass
class AttributionTrainingArguments(MethodArguments):
    """The arguments of the training that is scored."""

    method: Training = HfArg(
        default="lora",
        help="lora; dora, with the norm in the graph; or bidora, whose rows of both levels are "
        "scored",
    )


TYPES = (AttributeArguments, ModelArguments, DataArguments, AttributionTrainingArguments)


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train, score; write ``attribution.csv``, a picture and the adapter."""
    is_sft = option("attribute", "task", argv) == sft.SFT
    types: Any = TYPES
    if is_sft:
        types = (AttributeArguments, ModelArguments, ExampleData, sft.require_trl().SFTConfig)
    (command, model_args, data, args), flags = parse("attribute", types, argv)
    if command.suspects and model_args.task != "text-classification":
        raise ProblemError(f"suspects: needs a class label per row; {model_args.task} has none")
    if is_sft and command.retrain_without is not None:
        raise ProblemError("retrain_without: is not of task sft; train without rows by TRL")
    if getattr(data, "weight_column", None):
        raise ProblemError("weight_column: attribute weighs all rows alike; leave it out")
    command.require_output(args)
    without = replace(data, eval_fraction=0.0)
    setup = sft.prepare(model_args, without, args) if is_sft else prepare(model_args, without)
    setup, test = split(command, setup, data)
    # The Trainer removes the numbers of the rows, and the slices.
    trainer = setup.trainer(changed(args, remove_unused_columns=True))
    if command.dry_run:
        print(plan(command, setup, trainer))
        return
    if getattr(args, "method", None) == "dora":
        use_fast_dora(trainer.model)
    result = attribute(
        trainer,
        model=command.score_model,
        estimator=command.estimator,
        slices=command.slices and SLICE,
        memory_limit=command.memory_limit,
        progress=sys.stderr.isatty(),
    )
    # TRL leaves rows out whose labels are cut off.
    result.numbers = (trainer.train_dataset if is_sft else setup.train)[ROW][:]
    rows = setup.rows.select(result.numbers)
    result.columns = {name: rows[name][:] for name in setup.encoder.columns}
    output, first = Path(args.output_dir), not distributed.rank()
    if command.score_model == "adapter":
        metrics = evaluated(trainer)
        save_adapter(trainer)
        trainer.save_metrics("eval", metrics)
    scored = Scored(result, command, flags, output if first else None)
    scored.curves = {"Losses": trainer.state.log_history}
    for text in scored.paragraphs(test, args.seed):
        if first:
            print(f"{text}\n", flush=True)
    if first:
        print(f"attribution.csv and {REPORT} are in {output}")
    (trainer.accelerator if is_sft else trainer).end_training()


def split(
    command: AttributeArguments, setup: Setup, data: ExampleData
) -> tuple[Setup, Dataset | None]:
    """The set-up, whose training rows have their numbers in the files, and the test rows."""
    train, evaluation = setup.train.add_column(ROW, range(len(setup.train))), setup.evaluation
    rows = setup.evaluation_rows
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
    test = None
    if command.test_file and command.retrain_without is not None:
        test = setup.read(command.test_file, "test_file")
        for other, name in ((setup.train, "training"), (evaluation, "evaluation")):
            if common := shared(test, other):
                raise ProblemError(
                    f"test_file: {common} of {len(test)} rows are {name} examples too, which the "
                    "scores have seen; remove them"
                )
    elif judged:
        train, test = hold_out(train, data.eval_fraction)
    return replace(setup, train=train.sort(ROW), evaluation=evaluation), test


def plan(command: AttributeArguments, setup: Setup, trainer: Any) -> str:
    """The trainings in lines, and their time."""
    rows, evaluation = len(setup.train), len(setup.evaluation or ())
    line = f"examples: {rows} training, {evaluation} evaluation"
    batches = rows / trainer.args.per_device_train_batch_size
    training, works = whole(setup, trainer, "training"), list[Work]()
    if command.score_model == "head":
        line += "; heads are trained in seconds"
        # A pass forward alone is a third of one with the way back.
        works.append(Work("features", 1, 0, (1 + evaluation / rows) * batches / 3))
    else:
        # Scores by a whole run cost two trainings (docs/attribution.md), else passes over rows.
        unrolled = (command.estimator or UNROLLED).startswith(UNROLLED)
        scores = Work("scores", 1, 0, 2 * (training.passes if unrolled else batches))
        works += [training, scores]
        if command.check:
            works.append(replace(training, name="check", trainings=command.check + 1))
            works.append(replace(scores, name=""))
        if command.suspects:
            works.append(replace(training, name="suspects", trainings=command.suspects))
        if command.retrain_without:
            works.append(replace(training, name="retrain_without", trainings=4 + DRAWS))
    return f"{line}\n{table(works, seconds_a_pass(trainer))}"


class Scored:
    """What is printed of a result, and the files, which have each part as soon as it is known.

    Args:
        result: the scores.
        command: what is done with them.
        flags: the options of the run.
        folder: where ``attribution.csv``, ``.png``, ``.json`` and the page are; None for nowhere.
    """

    def __init__(
        self,
        result: Attribution,
        command: AttributeArguments,
        flags: Sequence[str],
        folder: Path | None,
    ) -> None:
        self.result, self.command, self.flags, self.folder = result, command, flags, folder
        self.curves: dict[str, Any] = {}
        self.columns: dict[str, list[Any]] = {}
        self.record = {"settings": result.settings, "evaluation_loss": result.values}
        self.texts: list[str] = []

    def write(self, text: str, **parts: Any) -> str:
        """Write the files again, with ``parts`` in the record and ``text`` in the page."""
        self.record |= parts
        self.texts.append(text)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.result.to_csv(self.folder / "attribution.csv", self.columns)
            self.result.plot(self.folder / "attribution.png", SHOWN)
            record = json.dumps(self.record, indent=1)
            (self.folder / "attribution.json").write_text(f"{record}\n")
            self._report(self.folder / "attribution.png").write(self.folder)
        return text

    def paragraphs(self, test: Dataset | None, seed: int) -> Iterator[str]:
        """The paragraphs that are printed; all but the first two train again."""
        result, command = self.result, self.command
        yield self.write(self._summary())
        if command.check:
            yield self._cost("check", command.check, "and another attribution")
            check = result.check(command.check, seed=seed)
            by_slice = (f"{name}: {one}" for name, one in check.by_slice.items())
            yield self.write("\n".join([f"check: {check}", *by_slice]), check=check.record())
        yield result.table(SHOWN).partition("\nthese scores are")[0]
        if not command.check:
            yield self._cost("unchecked: --check 20", 20, "and tells whether to rely on the scores")
        if command.suspects:
            yield self._cost("suspects", command.suspects)
            suspects = result.suspects(command.suspects, seed=seed)
            flagged = [int(row in suspects.flagged) for row in range(len(result.scores))]
            self.columns = {"suspect": flagged, "label_confidence": suspects.confidence.tolist()}
            doubtful = [result.line(row) for row in suspects.flagged[:SHOWN]]
            text = "\n".join([f"suspects: {suspects}", *doubtful])
            yield self.write(text, suspects=suspects.record())
        if test is not None and command.retrain_without is not None:
            yield self._cost("retrain_without", 4 + DRAWS)
            removal = result.removal(command.retrain_without, test, draws=DRAWS, seed=seed)
            text = f"on {len(test)} rows that neither training nor scores saw:\n{removal}"
            yield self.write(text, removal=asdict(removal) | {"verdict": removal.verdict})

    def _report(self, picture: Path) -> Report:
        """The page of what is known; written after each part, of which one may take hours."""
        result = self.result
        hurt, seen = int((result.scores > 0).sum()), int((~result.scores.isnan()).sum())
        verdict = f"{hurt} of {seen} training rows hurt on the evaluation examples"
        if check := self.record.get("check"):
            verdict = f"{verdict}; {check['verdict'].partition(';')[0]}"
        if removal := self.record.get("removal"):
            verdict = f"{verdict}; {removal['verdict']}"
        ends = zip(("Rows that hurt most", "Rows that help most"), result.ends(SHOWN))
        return Report(
            "attribute",
            verdict,
            self.flags,
            subtitle=self.texts[0].splitlines()[0],
            warnings=[] if result.checked else ["the scores are unchecked: give check"],
            curves=self.curves,
            pictures={"Scores of the training rows": picture},
            tables={
                title: [["row", "score", "text"], *map(self._cells, rows)]
                for title, rows in ends
                if rows
            },
            texts={"Checks": "\n\n".join(self.texts)},
        )

    def _cells(self, row: int) -> list[str]:
        number, text = self.result.line(row).strip().split("  ", 1)
        return [number, f"{float(self.result.scores[row]):+.2e}", text]

    def _cost(self, name: str, trainings: int, more: str = "") -> str:
        time = in_words(trainings * self.result.settings["seconds"])
        return f"{name}: {trainings} trainings, about {time} {more}".rstrip()

    def _summary(self) -> str:
        result, settings = self.result, self.result.settings
        phi = ", ".join(f"{name} {value:.4f}" for name, value in result.values.items())
        trained = f"{settings['steps']} steps"
        if self.command.score_model == "head":
            trained = f"a head at its minimum (λ = {settings['l2']:g})"
        lines = [
            f"{settings['rows']} training rows, {trained}, {settings['variables']:,} parameters; "
            f"scores by {settings['estimator']}",
            f"evaluation loss: {phi}",
            f"{int((result.scores > 0).sum())} rows hurt (score > 0)",
        ]
        if unseen := settings["unseen"]:
            lines.append(
                f"{unseen} rows were never trained on: their score is NaN; train for longer"
            )
        if settings["residuals"]:
            worst = max(settings["residuals"].values())
            lines.append(f"largest relative residual of the solver: {worst:.2g}")
        return "\n".join([*lines, *(f"note: {note}" for note in settings["notes"])])
