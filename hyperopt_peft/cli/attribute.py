"""hyperopt-peft attribute: which training rows help or hurt on the evaluation examples."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers.hf_argparser import HfArg

from hyperopt_peft import attribute
from hyperopt_peft.adapters import use_fast_dora
from hyperopt_peft.attribution import Attribution
from hyperopt_peft.attribution.estimators import parse_estimator
from hyperopt_peft.attribution.suspects import Suspects
from hyperopt_peft.cli.options import parse, require_folder
from hyperopt_peft.cli.text.data import DataArguments, hold_out, read_files, require_columns
from hyperopt_peft.cli.text.models import ModelArguments
from hyperopt_peft.cli.text.setup import MethodArguments, Setup, prepare
from hyperopt_peft.cli.train import save_adapter
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.data import shared
from hyperopt_peft.utils import distributed

ROW, SLICE = "row", "slice"


@dataclass
class AttributeArguments:
    """How rows are scored, and what is done with the scores."""

    _argument_group_name = "command"

    attribution_method: str = HfArg(
        default="unrolled",
        help="an estimator with options: unrolled (the whole run), minres, cg, nystrom or another "
        "implicit solver (the end of the run), or gradient",
    )
    check: int = HfArg(
        default=0, help="retrainings without random rows that check the scores; 0 for none"
    )
    slices: str | None = HfArg(
        default=None, help="a column of the evaluation examples; each of its values gets scores"
    )
    suspects: int = HfArg(
        default=0, help="folds of the search for wrong labels, a training each; 0 for none"
    )
    retrain_without: float | None = HfArg(
        default=None,
        help="the share of the rows to train without, those that hurt most, judged on test_file",
    )
    test_file: list[str] | None = HfArg(
        default=None,
        help="the examples that judge retrain_without; if not given eval_fraction of the training "
        "examples, which are then neither trained nor evaluated on",
    )
    memory_limit: float = HfArg(
        default=1.0, help="GiB of memory that the checkpoints of the run may take"
    )
    show: int = HfArg(default=10, help="rows at each end, in table and picture")

    def __post_init__(self) -> None:
        parse_estimator(self.attribution_method)
        for name, least in (("check", 5), ("suspects", 2)):
            value = getattr(self, name)
            if value and value < least:
                raise ProblemError(f"{name}: must be 0 or at least {least}, got {value}")
        if self.retrain_without is not None and not 0 < self.retrain_without < 1:
            raise ProblemError(f"retrain_without: must be in (0, 1), got {self.retrain_without}")
        if self.test_file and self.retrain_without is None:
            raise ProblemError("test_file: is of retrain_without; give both, or leave it out")


@dataclass
class AttributionTrainingArguments(MethodArguments):
    """The arguments of the training that is scored."""

    method: Literal["bidora", "dora", "lora"] = HfArg(
        default="lora",
        help="lora; dora, with the norm in the graph; or bidora, whose rows of both levels are "
        "scored",
    )


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train, score; write ``attribution.csv``, a picture and the adapter.

    Raises:
        ProblemError: a bad option, model or data set; an optimizer that cannot be differentiated;
            more memory than the limit.
        NonFiniteError: a loss, a gradient or a score is NaN or infinite.
    """
    kinds = (AttributeArguments, ModelArguments, DataArguments, AttributionTrainingArguments)
    own, model_args, data, args = parse("attribute", kinds, argv)
    require_folder(args.output_dir)
    if own.suspects and model_args.task != "text-classification":
        raise ProblemError(f"suspects: needs a class a row, which {model_args.task} has not")
    if data.weight_column:
        raise ProblemError("weight_column: attribute weighs all rows alike; leave it out")
    setup, test = parts(own, model_args, data)
    trainer = trainer_of(setup, args)
    result = attribute(
        trainer,
        estimator=own.attribution_method,
        slices=own.slices and SLICE,
        memory_limit=own.memory_limit,
        progress=sys.stderr.isatty(),
    )
    result.numbers = setup.train[ROW][:]
    read = setup.source[0].select(result.numbers)
    result.columns = {name: read[name][:] for name in data.columns(model_args.task)}
    suspects = result.suspects(own.suspects, seed=args.seed) if own.suspects else None
    metrics = trainer.evaluate()
    save_adapter(trainer)
    output = Path(args.output_dir)
    if not distributed.rank():
        result.to_csv(output / "attribution.csv", columns_of(suspects))
        result.plot(output / "attribution.png", own.show)
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    for text in summary(result, own, suspects, test, args.seed):
        if not distributed.rank():
            print(f"{text}\n", flush=True)
    if not distributed.rank():
        print(f"attribution.csv, attribution.png and the adapter are in {output}")
    trainer.end_training()


def parts(
    own: AttributeArguments, model_args: ModelArguments, data: DataArguments
) -> tuple[Setup, Dataset | None]:
    """The set-up, whose training rows have their numbers in the file, and the test rows.

    Raises:
        ProblemError: invalid data, or no evaluation or test rows.
    """
    setup = prepare(model_args, replace(data, eval_fraction=0.0))
    source, read = setup.source
    train, evaluation = setup.train.add_column(ROW, range(len(source))), setup.evaluation
    if evaluation is None or read is None:
        _require_fraction(data, "attribute needs evaluation examples; give eval_file, eval_split")
        train, evaluation = hold_out(train, data.eval_fraction)
        read, evaluation = source.select(evaluation[ROW]), evaluation.remove_columns(ROW)
    if own.slices:
        require_columns(read, [own.slices], "the evaluation examples")
        evaluation = evaluation.add_column(SLICE, [str(value) for value in read[own.slices]])
    test = None
    if own.test_file:
        rows = read_files(own.test_file, "test_file")
        require_columns(rows, data.columns(model_args.task), "the test examples")
        test = setup.encoder.encode(rows, "the test examples")
        for other, name in ((setup.train, "training"), (evaluation, "evaluation")):
            if common := shared(test, other):
                raise ProblemError(
                    f"test_file: {common} of {len(test)} rows are {name} examples too, which the "
                    "scores have seen; remove them"
                )
    elif own.retrain_without is not None:
        _require_fraction(data, "retrain_without needs test examples; give test_file")
        train, test = hold_out(train, data.eval_fraction)
    return replace(setup, train=train.sort(ROW), evaluation=evaluation), test


def _require_fraction(data: DataArguments, need: str) -> None:
    if data.eval_fraction == 0:
        raise ProblemError(f"eval_fraction: {need} or an eval_fraction above 0")


def trainer_of(setup: Setup, args: MethodArguments) -> Any:
    """The trainer, of an adapter whose gradient is that of its loss."""
    args.remove_unused_columns = True  # the numbers of rows, and slices
    trainer = setup.trainer(setup.model(args.seed, dora=args.method != "lora"), args)
    if args.method == "dora":
        use_fast_dora(trainer.model)
    return trainer


def columns_of(suspects: Suspects | None) -> dict[str, list[Any]]:
    """The columns of ``suspects`` in the file."""
    if suspects is None:
        return {}
    flagged, confidence = set(suspects.flagged), suspects.confidence.tolist()
    return {
        "suspect": [int(row in flagged) for row in range(len(confidence))],
        "label_confidence": confidence,
    }


def summary(
    result: Attribution,
    own: AttributeArguments,
    suspects: Suspects | None,
    test: Dataset | None,
    seed: int,
) -> Iterator[str]:
    """The parts of what is printed, each when it is known: the last two train again."""
    settings = result.settings
    phi = ", ".join(f"{name} {value:.4f}" for name, value in result.values.items())
    lines = [
        f"{settings['rows']} training rows, {settings['steps']} steps, "
        f"{settings['variables']:,} parameters; scores by {settings['estimator']}",
        f"evaluation loss: {phi}",
        f"{int((result.scores > 0).sum())} rows hurt (score > 0)",
    ]
    if settings["unseen"]:
        lines.append(
            f"{settings['unseen']} rows were never trained on: their score is NaN; train for longer"
        )
    if settings["residuals"]:
        worst = max(settings["residuals"].values())
        lines.append(f"largest relative residual of the solver: {worst:.2g}")
    yield "\n".join([*lines, *(f"note: {note}" for note in settings["notes"])])
    yield result.table(own.show)
    if suspects is not None:
        doubtful = [result.line(row) for row in suspects.flagged[: own.show]]
        title = f"{len(suspects.flagged)} labels may be wrong, the most doubtful first:"
        yield "\n".join([title, *doubtful])
    if own.check:
        found = result.check(own.check, seed=seed)
        each = (f"{name}: {one}" for name, one in found.by_slice.items())
        yield "\n".join([f"check: {found}", *each])
    if own.retrain_without is not None:
        judged = result.removal(own.retrain_without, test, seed=seed)
        size = 0 if test is None else len(test)
        yield f"on {size} rows that neither training nor scores saw:\n{judged}"
