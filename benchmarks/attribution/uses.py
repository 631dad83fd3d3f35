"""What do scores gain, compared with simple uses of the same evaluation rows?

    python benchmarks/attribution uses

Training sentences have the label of one rater, evaluation and test rows the label of many
(`ratings`). Rows are removed by score in three kinds of cells: evaluation rows of the same
domain, of another domain, and a fifth of the training labels made wrong (three data sets). The
alternatives are training on the evaluation rows too, once or five times each; training on these
only; and removal by loss or by suspicion. LoRA, pooler and head are in MiniLM's last two layers,
on the states of the frozen ones. A run is one call of `attribute`, with the settings of the smooth
run in `scores`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pandas
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

from benchmarks.attribution.scores import SMOOTH
from benchmarks.attribution.trainers import States, Task, last_layers
from benchmarks.last_layers import tokens
from benchmarks.measure import show
from benchmarks.methods.tasks import TABLES
from benchmarks.pages import RESULTS
from benchmarks.ratings import one_rater
from benchmarks.store import Row, Store, opened, run_parser
from hyperopt_peft import attribute
from hyperopt_peft.attribution.scores import Trained
from hyperopt_peft.utils.verdict import Verdict

#: Seeds below 100 chose the settings.
SEEDS, LENGTH = (100, 101, 102, 103, 104), 12
#: Numbers of training, evaluation and test rows.
TRAIN, ABOVE, TEST = 300, 60, 400
#: By cell: the domains of the training rows, and the domain of evaluation and test rows.
CELLS = {
    "another domain": (("nyt", "amazon", "tweets"), "movies"),
    "wrong labels: tweets": (("tweets",), "tweets"),
    "wrong labels: TREC": (("trec",), "trec"),
    "wrong labels: SST-2": (("sst2",), "sst2"),
    "same domain": (("movies",), "movies"),
}
#: The prefix of cells with wrong labels, and their share; as many rows are left out there.
WRONG_LABELS, WRONG = "wrong labels", 0.2
REMOVED, FOLDS = 0.1, 5
LORA = LoraConfig(
    task_type="SEQ_CLS",
    r=8,
    lora_alpha=16,
    target_modules=["query", "value"],
    modules_to_save=["pooler", "classifier"],
)


def drawn(cell: str, seed: int) -> pandas.DataFrame:
    """``text`` and ``label`` of the rows of ``seed``: training, evaluation, then test."""
    domains, target = CELLS[cell]
    tables = {name: table_of(name) for name in {*domains, target}}
    order = {name: table.sample(frac=1, random_state=seed) for name, table in tables.items()}
    judged = order[target].iloc[: ABOVE + TEST]
    rest = {name: table.drop(judged.index, errors="ignore") for name, table in order.items()}
    rest[target] = order[target].iloc[ABOVE + TEST :]
    each = TRAIN // len(domains)
    train = pandas.concat([rest[name].iloc[:each] for name in domains])
    if cell.startswith(WRONG_LABELS):
        classes = int(tables[target].clean.max()) + 1
        labels = with_wrong(torch.tensor(train.clean.to_numpy()), classes, seed)
        train = train.assign(noisy=labels.numpy())
    parts = [train.assign(label=train.noisy), judged.assign(label=judged.clean)]
    return pandas.concat(parts, ignore_index=True)[["text", "label"]]


def table_of(name: str) -> pandas.DataFrame:
    """``text``, ``noisy`` and ``clean`` labels by raters; for TREC and SST-2 both are equal."""
    if name not in TABLES:
        return one_rater(name, seed=0)
    table = pandas.concat(TABLES[name]()).drop_duplicates("text")
    return table.assign(noisy=table.label, clean=table.label)


def with_wrong(labels: Tensor, classes: int, seed: int) -> Tensor:
    """``labels`` with a share `WRONG` replaced by another of the ``classes``, drawn by ``seed``."""
    source = torch.Generator().manual_seed(seed)
    out = torch.randperm(len(labels), generator=source)[: round(WRONG * len(labels))]
    moved = torch.randint(1, classes, (len(out),), generator=source)
    return labels.index_copy(0, out, (labels[out] + moved) % classes)


def task(cell: str, seed: int, quick: bool) -> Task:
    """The cell's rows and model."""
    table = drawn(cell, seed)
    inputs, labels = tokens(list(table.text), LENGTH), torch.tensor(table.label.to_numpy())
    classes = max(3, int(labels.max()) + 1)
    base, states = last_layers(AutoModelForSequenceClassification, classes, inputs, seed)
    recipe = replace(SMOOTH, epochs=1.0) if quick else SMOOTH
    return Task("MiniLM", base, LORA, States(states, inputs.attention_mask, labels), TRAIN, recipe)


def numbered(begin: int, end: int) -> Dataset:
    """The rows from ``begin`` to ``end``."""
    return Dataset.from_dict({"row": range(begin, end)})


EVALUATION = numbered(TRAIN, TRAIN + ABOVE)
JUDGES = numbered(TRAIN + ABOVE, TRAIN + ABOVE + TEST)


def kinds(runs: Store, cell: str, seed: int, quick: bool) -> None:
    """Add the test results of each training set."""
    row = runs.entry(part="kinds", cell=cell, seed=seed)
    if "ways" in row:
        return
    job = task(cell, seed, quick)
    trainer, share = job.trainer(seed), WRONG if cell.startswith(WRONG_LABELS) else REMOVED
    options: dict[str, Any] = {"evaluation": EVALUATION, "progress": False}
    on_head = attribute(trainer, model="head", **options)
    result = attribute(trainer, **options)
    run, count = cast(Trained, result.trained).run, round(share * TRAIN)
    doubts = on_head.suspects(FOLDS, seed=seed).confidence
    source, above = torch.Generator().manual_seed(seed), EVALUATION["row"][:]
    random = [torch.randperm(TRAIN, generator=source)[:count].tolist() for _ in range(2)]
    removed = {
        "plain": [[]],
        "without rows by score": [result.ends(count)[0]],
        "without rows of highest loss": [result.losses.topk(count).indices.tolist()],
        "without random rows": random,
        "without rows by the head's score": [on_head.ends(count)[0]],
        "without rows by suspicion, on the head": [doubts.argsort()[:count].tolist()],
    }
    row["ways"] = ways = {}
    for name, sets in removed.items():
        found = list[dict[str, float]]()
        for out in sets:
            with run.without(out):
                found.append(judged(trainer))
        ways[name] = {key: statistics.fmean(one[key] for one in found) for key in found[0]}
    ways |= {
        "evaluation rows too": trained(job, seed, [*range(TRAIN), *above]),
        "evaluation rows too, five times each": trained(job, seed, [*range(TRAIN), *5 * above]),
        "evaluation rows alone": trained(job, seed, above),
        "without rows by the head's score, evaluation rows too": trained(
            job, seed, [*on_head.without(share), *above]
        ),
    }
    runs.save(row)


def trained(job: Task, seed: int, rows: list[int]) -> dict[str, float]:
    """The test results after the recipe's steps on ``rows``."""
    trainer = job.trainer(seed)
    trainer.args.max_steps = round(job.recipe.epochs * math.ceil(TRAIN / job.recipe.batch))
    trainer.train_dataset = Dataset.from_dict({"row": rows})
    trainer.train()
    return judged(trainer)


def judged(trainer: Any) -> dict[str, float]:
    """The test results of the model as it is."""
    found = trainer.predict(JUDGES)
    logits, labels = torch.tensor(found.predictions), torch.tensor(found.label_ids)
    loss, right = cross_entropy(logits, labels), logits.argmax(1) == labels
    return {"accuracy": float(right.double().mean()), "loss": float(loss)}


def gains_table(rows: Sequence[Row]) -> list[Row]:
    """By training set, the accuracy minus plain training's, ± half of a 95 % interval."""
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    table = []
    for way in [way for row in rows[:1] for way in row["ways"] if way != "plain"]:
        line: Row = {"training": way}
        for cell in cells:
            of_cell = [row["ways"] for row in rows if row["cell"] == cell]
            gain = Verdict(one[way]["accuracy"] - one["plain"]["accuracy"] for one in of_cell)
            line[cell] = f"{gain.estimate:+.3f} ± {gain.half:.3f}"
        table.append(line)
    return table


#: The tables of the page, by the marks of their places.
OF_PAGE = {"uses": "The adapter on test rows"}
RUNS = RESULTS / "attribution_uses.jsonl"


def tables_of(runs: Store) -> dict[str, list[Row]]:
    """All tables that have rows."""
    rows = gains_table(runs.of("kinds"))
    return {OF_PAGE["uses"]: rows} if rows else {}


def main() -> None:
    """Run the missing entries of the file, and summarise all."""
    title = __doc__.partition("\n")[0]
    options = run_parser(title, RUNS).parse_args()
    runs = opened(options)
    for cell in CELLS:
        for seed in SEEDS[:1] if options.quick else SEEDS:
            kinds(runs, cell, seed, options.quick)
            print(cell, seed, flush=True)
    show(tables_of(runs))
    runs.finish()
