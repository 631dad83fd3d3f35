"""Which features should a head read, and which rows are behind its predictions?

    python benchmarks/attribution heads

Heads on features of MiniLM before training, for texts and tags, in two parts. ``layers``: heads on
the last layer, on three layers (as `features_of` has them), on all seven, and on the layer with the
least held-out loss. Measured are the accuracy on 600 test rows, the share of wrong labels among the
worst tenth by score, suspicion and loss (with a fifth of the labels wrong), and the LDS. ``why``:
the fewest training rows whose removal changes a prediction, in the order of `why`, of gradient
products, of the nearest rows of the predicted class, and at random; retraining verifies each set.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator, cg
from sklearn.metrics import f1_score
from text_data import load_model
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.attribution.tables import SHARE
from benchmarks.attribution.uses import FOLDS, WRONG, table_of, with_wrong
from benchmarks.last_layers import first_tokens, tagged_tweets, tokens
from benchmarks.measure import show
from benchmarks.pages import RESULTS
from benchmarks.store import Row, Store, opened, run_parser
from hyperopt_peft.attribution import Attribution, ScoreCheck
from hyperopt_peft.attribution.estimators import HEAD_ESTIMATOR, parse_estimator
from hyperopt_peft.attribution.head import (
    HeadTraining,
    batch_of,
    chosen_l2,
    held_out_losses,
)
from hyperopt_peft.attribution.rows import ROW
from hyperopt_peft.attribution.scores import Evaluation, RetrainingSetup, scores
from hyperopt_peft.attribution.why import fewest, margins, reason_for
from hyperopt_peft.core.logits import IGNORED
from hyperopt_peft.problems.features import Features
from hyperopt_peft.problems.head import Head
from hyperopt_peft.utils.restore import perturbed
from hyperopt_peft.utils.statistics import mean_and_half

#: Seeds below 100 were used to choose the layers that a head reads, and the λ of `why`.
SEEDS = {"layers": (0, 1, 2, 3, 4), "why": (100, 101, 102, 103, 104)}
#: Numbers of training and evaluation rows (texts, tags), of pool and test rows, of tokens per row.
TEXTS, TAGS, POOL, TEST, LENGTH = (300, 100), (150, 60), 2000, 600, 24
#: By name, the states, out of seven, that a head reads.
LAYERS = {"last": (6,), "three": (2, 4, 6), "all": tuple(range(7)), "best": ()}
#: The tasks of each part.
PARTS = {
    "layers": ("tweets", "trec", "sst2", "entities"),
    "why": ("tweets", "trec", "sst2"),
}
#: Explained rows per seed, and the range of their margins: neither a toss-up nor out of reach.
EXPLAINED, MARGINS = 15, (0.1, 2.5)


def texts_of(name: str) -> tuple[list[Any], list[Any]]:
    """Texts and classes, or lists of words and their tags."""
    if name == "entities":
        tagged = tagged_tweets()
    else:
        table = table_of(name)
        return table.text.tolist(), table.clean.tolist()
    names = [*sorted({tag for row in tagged for _, tag in row} - {"O"}), "O"]
    words = [[word for word, _ in row] for row in tagged]
    return words, [[names.index(tag) for _, tag in row] for row in tagged]


@cache
@torch.no_grad()
def pool(name: str) -> Features:
    """The states of all layers of up to `POOL` rows, ``(m, 7, 384)``."""
    texts, labels = texts_of(name)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(7))[:POOL].tolist()
    texts, labels = [texts[k] for k in order], [labels[k] for k in order]
    model, inputs, parts = load_model("minilm", ["-"]).eval(), tokens(texts, LENGTH), []
    for rows in torch.arange(len(texts)).split(100):
        ids, mask = inputs.input_ids[rows], inputs.attention_mask[rows]
        output = model.bert(ids, mask, output_hidden_states=True)
        states = torch.stack(output.hidden_states, 2)
        if isinstance(texts[0], str):
            weight = mask[..., None, None].float()
            pooled = (states * weight).sum(1) / weight.sum(1)
            parts.append(Features(pooled, torch.tensor([labels[k] for k in rows]), rows))
            continue
        tags = torch.stack([first_tokens(inputs.word_ids(int(k)), labels[k]) for k in rows])
        row, token = (tags != IGNORED).nonzero(as_tuple=True)
        parts.append(Features(states[row, token], tags[row, token], rows[row]))
    return Features.joined(parts)


def drawn(name: str, seed: int) -> list[Features]:
    """Training, evaluation and test rows of a seed, with all layers and clean labels."""
    whole = pool(name)
    source = torch.Generator().manual_seed(seed)
    order = torch.randperm(int(whole.row.max()) + 1, generator=source)
    train, above = TAGS if name == "entities" else TEXTS
    parts, rest = list[Features](), order[train + above :]
    for part in (order[:train], order[train : train + above], rest[:TEST]):
        place = torch.full((len(order),), -1)
        place[part] = torch.arange(len(part))
        chosen = (place[whole.row] >= 0).nonzero()[:, 0]
        chosen = chosen[place[whole.row[chosen]].argsort(stable=True)]
        parts.append(Features(whole.x[chosen], whole.labels[chosen], place[whole.row[chosen]]))
    return parts


def reading(parts: Sequence[Features], layers: Sequence[int]) -> list[Features]:
    """``parts`` with the states of ``layers`` side by side, standardised by the first part."""
    raw = [replace(x, x=x.x[:, list(layers)].flatten(1).double()) for x in parts]
    return [each.standardized(raw[0]) for each in raw]


def wrong_labels(train: Features, seed: int) -> tuple[Features, Tensor]:
    """A share `WRONG` of the rows with wrong labels, and which rows have one.

    For texts the wrong class is any other one. For tags the entities' tags in these rows are
    permuted, so that some do not change.
    """
    count = int(train.row.max()) + 1
    if len(train.row) == count:
        labels = with_wrong(train.labels, int(train.labels.max()) + 1, seed)
    else:
        source, out = torch.Generator().manual_seed(seed), torch.zeros(count, dtype=torch.bool)
        out[torch.randperm(count, generator=source)[: round(WRONG * count)]] = True
        entity = (out[train.row] & (train.labels != train.labels.max())).nonzero()[:, 0]
        order = torch.randperm(len(entity), generator=source)
        labels = train.labels.index_copy(0, entity, train.labels[entity[order]])
    wrong = torch.zeros(count, dtype=torch.bool)
    wrong[train.row[labels != train.labels]] = True
    return replace(train, labels=labels), wrong


def head_on(train: Features, classes: int, *, largest: bool = True) -> HeadTraining:
    """A head at the minimum of ``train``, as in `attribute`; `why` has ``largest=False`` for λ."""
    head, count = Head(train.x.shape[1], classes, dtype=torch.float64), int(train.row.max()) + 1
    return HeadTraining(head, train, count, chosen_l2(head, train, count, largest=largest))


def accuracy(training: HeadTraining, test: Features) -> float:
    """The accuracy; for tags the micro-averaged F1 without the last tag, O."""
    guess = training.on_rows.of_labels([batch_of(test)]).argmax(1)
    if len(test.row) == int(test.row.max()) + 1:
        return float((guess == test.labels).double().mean())
    named = list(range(training.on_rows.model.bias.numel() - 1))
    return float(f1_score(test.labels, guess, labels=named, average="micro", zero_division=0))


def setup_of(training: HeadTraining, phi: Any) -> RetrainingSetup:
    """A head's training and Φ."""
    batch = batch_of(training.features)
    whole = len(training.features.row) == len(training.weights)
    return RetrainingSetup(
        training,
        Evaluation(training.weights, phi),
        {"all": 1.0},
        training.level,
        lambda: batch,
        probabilities=lambda rows: training.on_rows.probabilities([batch])[rows],
        labels=training.features.labels if whole else None,
    )


def layers(runs: Store, name: str, seed: int) -> None:
    """Measure heads on each choice of layers."""
    row = runs.entry(part="layers", task=name, seed=seed)
    parts, ways = drawn(name, seed), row.setdefault("ways", {})
    classes = int(pool(name).labels.max()) + 1
    noisy, wrong = wrong_labels(parts[0], seed)
    for way, chosen in LAYERS.items():
        if way in ways:
            continue
        begin = time.process_time()
        if way == "best":
            losses = [held_out(reading([noisy], [k])[0], classes) for k in range(7)]
            chosen = (losses.index(min(losses)),)
        train, above, test = reading([noisy, *parts[1:]], chosen)
        training = head_on(train, classes)
        setup = setup_of(training, training.on_rows.mean([batch_of(above)]))
        estimator, count = parse_estimator(HEAD_ESTIMATOR), len(wrong) // 10
        by_slice, _ = scores(setup, estimator)
        seconds, values = time.process_time() - begin, setup.evaluation.values()
        each = by_slice["all"], by_slice, training.losses, values
        result = Attribution(*each, {}, _setup=setup, _estimator=estimator)
        check = result.check(20, share=SHARE, perturbation=None, seed=seed)
        found = {"score": wrong[result.scores.topk(count).indices]}
        found["loss"] = wrong[result.losses.topk(count).indices]
        if setup.labels is not None:
            suspect = result.suspects(FOLDS, seed=seed).confidence.argsort()[:count]
            found["suspicion"] = wrong[suspect]
        ways[way] = {
            "layers": chosen,
            "wrong labels": accuracy(training, test),
            "right labels": accuracy(head_on(reading(parts[:1], chosen)[0], classes), test),
            "found": {by: float(x.double().mean()) for by, x in found.items()},
            "wrong": float(wrong.double().mean()),
            "lds": check.lds,
            "slope": check.slope,
            "newton": newton_slope(training, result, check, seed),
            "seconds": seconds,
            "floats a label": len(chosen) * 384,
        }
        runs.save(row)


def held_out(train: Features, classes: int) -> float:
    """The least held-out loss of a head over λ."""
    head, count = Head(train.x.shape[1], classes, dtype=torch.float64), int(train.row.max()) + 1
    return float(held_out_losses(head, train, count).mean(1).min())


def newton_slope(
    training: HeadTraining, result: Attribution, check: ScoreCheck, seed: int
) -> float:
    """The slope of the check's actual changes on the changes after a Newton step without the rows.

    The step uses the Hessian of the remaining rows, so that it costs about as much as a retraining.
    """
    setup, count, predicted = result._setup, len(training.weights), []
    before, source = setup.evaluation.values()["all"], torch.Generator().manual_seed(seed)
    for _ in check.actual:
        out = torch.randperm(count, generator=source)[: round(SHARE * count)]
        with perturbed((training.weights, *training.variables)):
            with torch.no_grad():
                training.weights[out] = 0.0
            for variable, step in zip(training.variables, newton_step(training), strict=True):
                variable.data += step
            predicted.append(setup.evaluation.values()["all"] - before)
    return replace(check, predicted=torch.tensor(predicted, dtype=torch.float64)).slope


def newton_step(training: HeadTraining) -> list[Tensor]:
    """−H⁻¹∇ of the head's loss with the present weights, by conjugate gradients."""
    batch, head, l2 = batch_of(training.features), training.on_rows.model, training.settings["l2"]
    weights = training.weights.detach()[batch[ROW]]
    losses = cross_entropy(head(batch["features"]).logits, batch["labels"], reduction="none")
    loss = (weights * losses).mean() + l2 / 2 * head.weight.square().sum()
    slopes = torch.autograd.grad(loss, training.variables, create_graph=True)
    flat, sizes = torch.cat([x.flatten() for x in slopes]), [x.numel() for x in slopes]

    def product(x: Any) -> Any:
        vector = torch.from_numpy(x).reshape(-1)
        found = torch.autograd.grad(flat, training.variables, vector, retain_graph=True)
        return torch.cat([each.flatten() for each in found]).numpy()

    operator = LinearOperator((len(flat), len(flat)), matvec=product)
    step, _ = cg(operator, -flat.detach().numpy(), rtol=1e-6, maxiter=500)
    parts = torch.from_numpy(step).split(sizes)
    return [x.reshape(like.shape) for x, like in zip(parts, slopes, strict=True)]


def why(runs: Store, name: str, seed: int) -> None:
    """For each order, the number of rows to remove until a prediction changes."""
    row = runs.entry(part="why", task=name, seed=seed)
    if "sizes" in row:
        return
    train, above, _ = reading(drawn(name, seed), LAYERS["three"])
    training = head_on(train, int(pool(name).labels.max()) + 1, largest=False)
    margin = margins(training.on_rows.of_labels([batch_of(above)]))
    order = torch.randperm(len(margin), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [k for k in order if MARGINS[0] < margin[k] < MARGINS[1]][:EXPLAINED]
    row |= {"l2": training.settings["l2"], "sizes": [], "seconds": []}
    row["limit"] = len(training.weights) // 2
    for place in chosen:
        begin = time.process_time()
        reason = reason_for(training, above, place)
        row["seconds"].append(time.process_time() - begin)
        sizes = {"why": len(reason.rows) or None}
        for by, rows in other_orders(training, above, place, reason.predicted).items():
            found = fewest(training, above.x[place : place + 1], rows)
            sizes[by] = None if found is None else found[0]
        row["sizes"].append(sizes)
    runs.save(row)


def other_orders(
    training: HeadTraining, places: Features, place: int, predicted: int
) -> dict[str, Tensor]:
    """The training rows in the other orders, with which `why` is compared."""
    x, head, train = places.x[place : place + 1], training.on_rows.model, training.features
    here = torch.tensor([predicted])
    setup = setup_of(training, lambda: margins(head(x).logits, here)[0])
    products = scores(setup, parse_estimator("gradient"))[0]["all"]
    of_class = (train.labels == predicted).nonzero()[:, 0]
    near = (normalize(train.x[of_class]) @ normalize(x)[0]).argsort(descending=True)
    source = torch.Generator().manual_seed(place)
    return {
        "products": products.argsort(descending=True)[: int((products > 0).sum())],
        "nearest": of_class[near],
        "random": of_class[torch.randperm(len(of_class), generator=source)],
    }


def layers_table(rows: Sequence[Row]) -> list[Row]:
    """By task and layers: means over the seeds."""
    table, rows = [], [row for row in rows if len(row["ways"]) == len(LAYERS)]
    for task in dict.fromkeys(row["task"] for row in rows):
        for way in LAYERS:
            ways = [row["ways"][way] for row in rows if row["task"] == task]
            line: Row = {"task": task, "layers": way}
            for name in ("wrong", "right labels", "wrong labels"):
                line[name] = statistics.fmean(each[name] for each in ways)
            for by in ("score", "suspicion", "loss"):
                found = [each["found"][by] for each in ways if by in each["found"]]
                line[f"found by {by}"] = statistics.fmean(found) if found else None
            for name in ("lds", "slope", "newton", "seconds", "floats a label"):
                line[name] = statistics.fmean(each[name] for each in ways)
            table.append(line)
    return table


def why_table(rows: Sequence[Row]) -> list[Row]:
    """By task: the rows in a set, and how many times as many each other order needs."""
    table = []
    for task in dict.fromkeys(row["task"] for row in rows):
        chosen = [row for row in rows if row["task"] == task]
        sets = [(each, row["limit"]) for row in chosen for each in row["sizes"] if each["why"]]
        line: Row = {"task": task, "λ": statistics.median(row["l2"] for row in chosen)}
        line["explained"] = f"{len(sets)} of {sum(len(row['sizes']) for row in chosen)}"
        line["rows, median"] = statistics.median(each["why"] for each, _ in sets)
        for by in ("products", "nearest", "random"):
            logs = []  # of each seed; a search that ends without a set counts as its limit
            for row in chosen:
                ratios = [(s[by] or row["limit"]) / s["why"] for s in row["sizes"] if s["why"]]
                logs.append(statistics.fmean(map(math.log, ratios)))
            mean, half = mean_and_half(logs)
            low, high = math.exp(mean - half), math.exp(mean + half)
            line[f"{by} ÷"] = f"{math.exp(mean):.2f} ({low:.2f} to {high:.2f})"
        line["seconds a row"] = statistics.fmean(x for row in chosen for x in row["seconds"])
        table.append(line)
    return table


#: The tables of the page, by the marks of their places.
OF_PAGE = {"layers": "Layers that a head reads", "why": "Rows behind a prediction"}
RUNS = RESULTS / "attribution_heads.jsonl"


def tables_of(runs: Store) -> dict[str, list[Row]]:
    """All tables that have rows."""
    parts = {"layers": layers_table, "why": why_table}
    tables = {OF_PAGE[part]: make(runs.of(part)) for part, make in parts.items()}
    return {title: rows for title, rows in tables.items() if rows}


def main() -> None:
    """Run the missing entries of the file, and summarise all."""
    title = (__doc__ or "").partition("\n")[0]
    options = run_parser(title, RUNS, PARTS).parse_args()
    runs, make = opened(options), {"layers": layers, "why": why}
    for part in options.parts:
        for task in PARTS[part][: 1 if options.quick else None]:
            for seed in SEEDS[part][: 1 if options.quick else None]:
                make[part](runs, task, seed)
                print(part, task, seed, flush=True)
    show(tables_of(runs))
    runs.finish()
