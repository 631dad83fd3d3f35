"""Do weights that `MixTrainer` learns beat every simple way, and does the verdict name a good way?

    python benchmarks/mix cells

A few trusted rows of a task, and sources whose labels are doubtful: questions with the votes of 68
labelling functions (``--trec`` is the folder of the rows), movie sentences with ratings of single
persons, four domains with labels of single ratings, and two simulated tasks (`tasks`).
`compare_baselines` judges each method of `mix_plans` by cross-validation on the trusted rows. The
part ``head`` fits each method's plan to a head on the frozen MiniLM; ``lora`` trains LoRA in
MiniLM's last layer once by the same plan (`MixTrainer.retrain`). An interrupted benchmark goes on
from its file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import default_data_collator

from benchmarks.measure import show
from benchmarks.mix import tasks
from benchmarks.mix.tables import VERDICT, tables_of
from benchmarks.pages import RESULTS
from benchmarks.store import Row, Store, opened, run_parser
from hyperopt_peft import MixTrainer, MixTrainingArguments, compare_baselines
from hyperopt_peft.problems.features import features_of
from hyperopt_peft.problems.head_mix import SEARCH_STEPS
from hyperopt_peft.problems.mix_plans import LEARNED, plan_of

SEEDS, FOLDS, PARTS = range(5), 5, ("head", "lora")
#: Task and trusted rows; the last three are simulated.
CELLS = [
    *(("trec", trusted) for trusted in (30, 60, 110, 260)),
    *(("raters", trusted) for trusted in (30, 60)),
    *(("domains", trusted) for trusted in (32, 64)),
    *(("copies", trusted) for trusted in (32, 64)),
    ("annotators", 60),
]
#: Steps of 16 rows, and the peak rate, of each training of the adapter.
STEPS, RATE = 300, 3e-3


class Cell:
    """A task with a number of trusted rows, for one seed, and its `MixTrainer`."""

    def __init__(self, key: Row, folder: str, quick: bool) -> None:
        self.task, seed = tasks.draw(key["task"], key["trusted"], key["seed"]), key["seed"]
        self.folds = 2 if quick else FOLDS
        args = MixTrainingArguments(
            folder,
            search="head",
            search_steps=2 if quick else SEARCH_STEPS,
            retrain="none",
            retrain_steps=5 if quick else STEPS,
            learning_rate=RATE,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=100,
            max_grad_norm=1.0,
            seed=seed,
            use_cpu=True,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        self.trainer = MixTrainer(
            self.task.model(seed),
            args,
            sources=self.task.sources,
            trusted=self.task.trusted,
            data_collator=default_data_collator,
        )

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        """The features and the classes of the test rows, standardized as those of the others."""
        model, collate = self.trainer.model, default_data_collator
        rows = features_of(model, self.trainer.train_dataset, collate, batch_size=100)
        test = features_of(model, self.task.test, collate, batch_size=100).standardized(rows)
        return test.x, test.labels

    def head(self) -> Iterator[tuple[str, Row]]:
        """Of each method, and of the one that is named: the accuracy of the head, and its price."""
        mix, (x, labels) = self.trainer.head_mix, self.test
        begin = time.process_time()
        with silent():
            self.trainer.train()
        seconds = {"seconds": time.process_time() - begin, "passes": mix.passes}
        begin = time.process_time()
        comparison = compare_baselines(self.trainer, model="head", folds=self.folds)
        judged = time.process_time() - begin
        rows = {}
        for result in comparison.results:
            head = mix.fit(plan_of(mix, result.method, result.setting))
            right = mix.predicted(head, x) == labels
            row = {"accuracy": float(right.double().mean()), "tests": len(right)}
            rows[result.method] = {**row, "loss": result.loss, "setting": result.setting}
            if result.method == LEARNED:
                rows[result.method]["weights"] = mix.row_weights(mix.learned)
            yield result.method, rows[result.method]
        named = comparison.recommended.method
        yield VERDICT, {**rows[named], "named": named, **seconds, "verdict seconds": judged}

    def lora(self, method: str, setting: float) -> Row:
        """The accuracy of the adapter that a method's plan trains, with the head's setting."""
        mix, model = self.trainer.head_mix, self.trainer.model
        begin = time.process_time()
        with silent():
            self.trainer.retrain(plan_of(mix, method, setting))
        right = torch.cat(list(self._right(model)))
        seconds = time.process_time() - begin
        return {
            "accuracy": float(right.double().mean()),
            "tests": len(right),
            "seconds": seconds,
        }

    @torch.no_grad()
    def _right(self, model: Any) -> Iterator[Tensor]:
        model.eval()
        rows, labels = (torch.tensor(self.task.test[name][:]) for name in ("row", "labels"))
        for row, label in zip(rows.split(100), labels.split(100), strict=True):
            yield model(row=row).logits.argmax(1) == label


@contextmanager
def silent() -> Iterator[None]:
    """Without the summary that a Trainer prints where it draws no bar."""
    with redirect_stdout(StringIO()):
        yield


def measure(runs: Store, key: Row, parts: Sequence[str], quick: bool) -> None:
    """What the file lacks of a cell: the head's rows first, then the adapter's by their names."""

    def entry(part: str, method: str) -> Row:
        return runs.entry(part=part, **key, method=method)

    def save(part: str, method: str, row: Row) -> None:
        runs.save(entry(part, method) | row)
        print(part, *key.values(), f"{row['accuracy']:.3f}", method, flush=True)

    with TemporaryDirectory(prefix="mix-") as folder:
        cell = None
        if "accuracy" not in entry("head", VERDICT):
            cell = Cell(key, folder, quick)
            for method, row in cell.head():
                save("head", method, row)
        if "lora" not in parts:
            return
        of_key = [r for r in runs.of("head") if all(r[name] == x for name, x in key.items())]
        chosen = {row["method"]: row["setting"] for row in of_key if row["method"] != VERDICT}
        for method, setting in chosen.items():
            if "accuracy" not in entry("lora", method):
                cell = cell or Cell(key, folder, quick)
                save("lora", method, cell.lora(method, setting))
        named = entry("head", VERDICT)["named"]
        if "accuracy" not in entry("lora", VERDICT):
            save("lora", VERDICT, {**_figures(entry("lora", named)), "named": named})


def _figures(row: Row) -> Row:
    return {name: row[name] for name in ("accuracy", "tests", "seconds")}


def main() -> None:
    """Run what is missing in the file, and print the tables of all of it."""
    title = __doc__.partition("\n")[0]
    parser = run_parser(title, RESULTS / "mix.jsonl", PARTS)
    names = [f"{name}-{trusted}" for name, trusted in CELLS]
    parser.add_argument("--cells", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--trec", type=Path, help="the folder with train.jsonl and gold.jsonl")
    options = parser.parse_args()
    if options.trec:
        tasks.TREC = options.trec
    runs = opened(options)
    cells = [cell for cell, name in zip(CELLS, names, strict=True) if name in options.cells]
    if options.quick:
        cells, options.seeds = cells[:1], options.seeds[:1]
    for seed in options.seeds:
        for name, trusted in cells:
            key = {"task": name, "trusted": trusted, "seed": seed}
            measure(runs, key, options.parts, options.quick)
    show(tables_of(runs))
    runs.finish()
