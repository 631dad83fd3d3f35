"""Are equal methods called different, and different ones found? On many small nets.

Each draw has new rows, and methods that are equal: given the rows, since they differ in nothing but
the starts and the orders of their runs; or on average over rows, since each reads one of two views
of the features. The plan, the choice of rates, the store and the verdicts are those of
`compare_methods`; the runs are trainings of a net with one hidden layer, many at once. In the last
cell `compare_methods` trains them itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.pages import RESULTS
from benchmarks.store import Store as Results
from hyperopt_peft import BilevelTrainingArguments, Method
from hyperopt_peft.comparison import Choice, Comparison, Runs, compare_methods
from hyperopt_peft.comparison.choice import Plan
from hyperopt_peft.comparison.influence import PARTS
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import Run
from hyperopt_peft.problems import LoRA, RowWeights
from hyperopt_peft.utils.verdict import Verdict

FEATURES, HIDDEN, BATCH, TEST, SEEDS = 20, 16, 8, 500, 20
#: The budget of a run in steps, which are passes.
STEPS = 60
#: Draws that are trained together.
TOGETHER = 10
FILE = RESULTS / "calibration.jsonl"
#: The best rate is inside the grid.
CHOICE = Choice(rates=(2e-3, 6e-3, 2e-2, 6e-2, 2e-1), upper_rates=(2e-3, 6e-3, 2e-2, 6e-2, 2e-1))
#: Features and classes.
Made = tuple[Tensor, Tensor]
#: Known differences, which are added to the scores of B.
SHIFTS = (0.01, 0.02, 0.03, 0.05)


@dataclass(frozen=True)
class Setting:
    """What the seeds choose.

    Attributes:
        choice: the grids.
        method: whether a method has an upper rate, here the rate of the first layer.
        cliff: above this rate, in the middle, a training ends at chance.
        methods: the names of equal methods.
        power: whether differences are sought too, and families of three comparisons.
        rows: of `GENERATORS`.
        views: whether A and B each read one half of the features.
        own: whether each seed draws training rows of its own.
    """

    choice: Choice = CHOICE
    method: Method = field(default_factory=LoRA)
    cliff: float = float("inf")
    methods: str = "AB"
    power: bool = False
    rows: str = "one shift"
    views: bool = False
    own: bool = False


def shifted(size: tuple[int, int], generator: torch.Generator, *begins: int) -> Made:
    """Features, four of which from each begin have a mean of ±0.45 by the class; and classes."""
    classes = torch.randint(0, 2, size, generator=generator).float()
    features = torch.randn(*size, FEATURES, generator=generator)
    for begin in begins:
        features[..., begin : begin + 4] += 0.45 * (2 * classes[..., None] - 1)
    return features, classes


def one_shift(size: tuple[int, int], generator: torch.Generator) -> Made:
    """Rows of which the first half of the features tells the class."""
    return shifted(size, generator, 0)


def two_shifts(size: tuple[int, int], generator: torch.Generator) -> Made:
    """Rows of which each half of the features tells the class, independently."""
    return shifted(size, generator, 0, FEATURES // 2)


def noisy_copies(size: tuple[int, int], generator: torch.Generator) -> Made:
    """Two noisy copies of ten hidden features, of which the first three decide the class."""
    hidden = torch.randn(*size, FEATURES // 2, generator=generator)
    both = torch.cat([hidden, hidden], -1)
    features = both + 0.7 * torch.randn(*size, FEATURES, generator=generator)
    odds = 2 * hidden[..., :3].sum(-1)
    return features, torch.rand(*size, generator=generator).lt(odds.sigmoid()).float()


def easy_by_one(size: tuple[int, int], generator: torch.Generator) -> Made:
    """Rows that are easy by one half, of heavy tails, and noise by the other half."""
    classes = torch.randint(0, 2, size, generator=generator).float()
    features = torch.randn(*size, FEATURES, generator=generator)
    scale = torch.rand(*size, 1, generator=generator).clamp(0.05) ** -0.5
    first = torch.rand(*size, 1, generator=generator) < 0.5
    sides = 1.2 * (2 * classes[..., None] - 1)
    features[..., :3] += first * sides
    features[..., FEATURES // 2 : FEATURES // 2 + 3] += ~first * sides
    return features * scale, classes


def words(size: tuple[int, int], generator: torch.Generator) -> Made:
    """Binary features, some frequent in one of two unequal classes; a tenth of labels is wrong."""
    classes = torch.rand(*size, generator=generator).lt(0.3).float()
    odds = torch.full((*size, FEATURES), 0.15)
    for half in (0, FEATURES // 2):
        odds[..., half : half + 3] += 0.4 * classes[..., None]
        odds[..., half + 3 : half + 6] += 0.25 * (1 - classes[..., None])
    features = torch.rand(odds.shape, generator=generator).lt(odds).float()
    wrong = torch.rand(*size, generator=generator).lt(0.1).float()
    return 2 * features - 0.5, (classes - wrong).abs()


#: The last two were written before any interval was tried on them, and run last.
GENERATORS = {
    "one shift": one_shift,
    "two shifts": two_shifts,
    "noisy copies": noisy_copies,
    "easy by one": easy_by_one,
    "words": words,
}
SETTINGS = {
    "rate": Setting(methods="ABCD", power=True),
    "rate and upper rate": Setting(method=RowWeights()),
    "rate, beside a cliff": Setting(cliff=0.035),
    "rate and stopping point": Setting(replace(CHOICE, points=4)),
}
VIEWS = {
    f"{rows}, {'own draws' if own else 'same rows'}": Setting(rows=rows, views=True, own=own)
    for rows in [*GENERATORS][1:]
    for own in (False, True)
}


class Draws:
    """The rows of several draws, and trainings on them.

    Args:
        count: the training rows of each method.
        held_out: the share of them in a held-out part.
        generator: of all random numbers.
        setting: the rows, and where a training ends at chance.
    """

    def __init__(
        self, count: Mapping[str, int], generator: torch.Generator, setting: Setting
    ) -> None:
        self.count, self.generator, self.setting = count, generator, setting
        self.held_out, self.cliff = setting.choice.held_out, setting.cliff
        rows, every = GENERATORS[setting.rows], SEEDS if setting.own else 1
        self.train = rows((TOGETHER * every, max(count.values())), generator)
        self.test = rows((TOGETHER, TEST), generator)
        #: The order of the rows by which a seed, with every method, holds parts out.
        self.order = {n: self.permuted((TOGETHER, SEEDS), n) for n in {*count.values()}}

    def permuted(self, shape: tuple[int, ...], count: int) -> Tensor:
        """Permutations of ``count`` numbers."""
        return torch.rand(*shape, count, generator=self.generator).argsort(-1)

    def do(self, stage: Sequence[Sequence[Run]], stores: Sequence[Store]) -> None:
        """Add the missing runs of a stage of each draw to its store."""
        every = [(k, x) for k, runs in enumerate(stage) for x in stores[k].missing(runs)]
        for name in self.count:
            if mine := [each for each in every if each[1].method == name]:
                for (k, run), curve in zip(mine, self.curves(mine), strict=True):
                    scored = [(point, curve[round(point)][0]) for point in run.points]
                    end = round(run.stop or STEPS)
                    metrics, moved = curve[end]
                    line = {"metrics": metrics, "influence": moved, "curve": scored}
                    stores[k].add({**asdict(run), **line, "spent": {"lower steps": end}})

    @torch.no_grad()
    def curves(self, every: Sequence[tuple[int, Run]]) -> list[dict[int, tuple[Any, Any]]]:
        """The metrics of runs of one method and one stage, with the influence of parts, by step."""
        draw, runs = torch.tensor([k for k, _ in every]), [run for _, run in every]
        if self.setting.own:
            train = torch.tensor([k * SEEDS + run.seed for k, run in every])
        else:
            train = draw
        count = self.count[runs[0].method]
        order, part = self.order[count], round(self.held_out * count)
        if runs[0].split is None:
            rows = torch.arange(count).expand(len(runs), -1)
            features, classes = self.test[0][draw], self.test[1][draw]
        else:
            orders = [order[k, x.seed].roll(-part * (x.split or 0)) for k, x in every]
            held, rows = torch.stack(orders).split((part, count - part), 1)
            features, classes = (each[train[:, None], held] for each in self.train)
        view = torch.ones(FEATURES)
        if self.setting.views:
            half = FEATURES // 2
            view[half:] = 0
            view = view.roll(half * "AB".index(runs[0].method))
        passes = -(-STEPS * BATCH // rows.shape[1])
        rows = rows.gather(1, self.permuted((len(runs), passes), rows.shape[1]).flatten(1))
        rates = torch.tensor([[run.upper_rate or run.rate, run.rate] for run in runs])
        noise = torch.randn(len(runs), generator=self.generator)
        alive = rates.amax(1) < self.cliff * torch.exp(0.2 * noise)
        found: list[dict[int, tuple[Any, Any]]] = [{} for _ in runs]
        ends = {round(point) for run in runs for point in (*run.points, run.stop or STEPS)}
        for step, net in enumerate(self.nets(train, rows, rates, view), 1):
            if step not in ends:
                continue
            logits = net_of(net, features * view)[1][..., 0] * alive[:, None]
            scores = {
                "eval_accuracy": ((logits > 0) == classes.bool()).double(),
                "eval_loss": softplus((1 - 2 * classes) * logits).double(),
            }
            means = {name: each.mean(1).tolist() for name, each in scores.items()}
            moved: dict[str, Any] = dict.fromkeys(scores, [None] * len(runs))
            if runs[0].split is None:  # scored on the test rows
                for name, each in scores.items():
                    of_parts = each.unflatten(1, (PARTS, -1)).mean(2)
                    moved[name] = (of_parts - each.mean(1, True)).tolist()
            for k, curve in enumerate(found):
                one, other = ({n: x[k] for n, x in y.items()} for y in (means, moved))
                curve[step] = one, other
        return found

    def nets(
        self, draw: Tensor, rows: Tensor, rates: Tensor, view: Tensor
    ) -> Iterator[list[Tensor]]:
        """The weights of all nets after each step of Adam, at rates that decay to 0.

        Args:
            draw: (nets,), of the training rows.
            rows: (nets, at least STEPS · BATCH), the row numbers of all steps.
            rates: (nets, 2), of the first layer and of the second.
            view: (FEATURES,), 0 for features that are not read.
        """
        shapes, g = ((FEATURES, HIDDEN), (1, HIDDEN), (HIDDEN, 1), (1, 1)), self.generator
        net = [torch.randn(len(draw), *shape, generator=g) / shape[0] ** 0.5 for shape in shapes]
        net[1], net[3] = 0 * net[1], 0 * net[3]
        means, squares = ([torch.zeros_like(x) for x in net] for _ in range(2))
        scale = rates[:, [0, 0, 1, 1], None, None].unbind(1)
        for step in range(STEPS):
            batch = rows[:, step * BATCH : (step + 1) * BATCH]
            x, y = (each[draw[:, None], batch] for each in self.train)
            x = x * view
            hidden, logits = net_of(net, x)
            error = (logits.sigmoid() - y[..., None]) / BATCH
            back = error @ net[2].mT * (1 - hidden**2)
            slopes = x.mT @ back, back.sum(1, True), hidden.mT @ error, error.sum(1, True)
            decay, first, second = 1 - step / STEPS, 1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)
            for weight, slope, mean, square, rate in zip(net, slopes, means, squares, scale):
                mean.lerp_(slope, 0.1)
                square.mul_(0.999).addcmul_(slope, slope, value=0.001)
                weight -= decay * rate * (mean / first) / ((square / second).sqrt() + 1e-8)
            yield net


def net_of(net: Sequence[Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden layer and the logits of all nets."""
    hidden = torch.baddbmm(net[1], features, net[0]).tanh()
    return hidden, torch.baddbmm(net[3], hidden, net[2])


class Net(nn.Module):
    """The net of `Draws`, for a Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2))

    def forward(self, x: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        """The loss and the logits."""
        logits = self.layers(x)
        return SequenceClassifierOutput(cross_entropy(logits, labels), logits)


def comparisons(
    setting: Setting, count: Mapping[str, int], draws: int, seed: int
) -> Iterator[dict[tuple[str, int], Comparison]]:
    """For each draw the comparisons by metric and number of seeds, whose runs are shared."""
    generator = torch.Generator().manual_seed(seed)
    methods = dict.fromkeys(count, setting.method)
    plans = {
        (metric, seeds): Plan(
            methods, setting.choice, range(seeds), metric, metric == "loss", STEPS, ablations={}
        )
        for metric in ("accuracy", "loss")
        for seeds in (SEEDS, 5)
    }
    for _ in range(-(-draws // TOGETHER)):
        here = Draws(count, generator, setting)
        stores = [Store(None, {}) for _ in range(TOGETHER)]
        for plan in plans.values():
            for stage in zip(*map(plan.stages, stores), strict=True):
                here.do(stage, stores)
        for store in stores:
            yield {key: Comparison(plan, store) for key, plan in plans.items()}


def gap(comparison: Comparison) -> Verdict:
    """The score of B minus that of A, where they stop if that is chosen."""
    scores, pair = comparison.scores(stopped=True), (("B", "method"), ("A", "method"))
    one, other = (comparison.influence(each, stopped=True) for each in pair)  # type: ignore[arg-type]
    return Verdict(scores["B"] - scores["A"], influence=one - other)


def with_gain(verdict: Verdict, shift: float) -> Verdict:
    """``verdict`` with a known difference added to each value."""
    return Verdict((x + shift for x in verdict.values), influence=verdict.influence)


def found_again(verdict: Verdict) -> float:
    """How often five seeds find the minimum detectable difference that five others print."""
    groups = [
        Verdict(verdict.values[k : k + 5], influence=verdict.influence[k : k + 5])
        for k in range(0, SEEDS, 5)
    ]
    pairs = [(one, other) for one in groups for other in groups if one is not other]
    return fmean(with_gain(x, other.detectable).is_significant for x, other in pairs)


def measured(name: str, rows: int, draws: int) -> Iterator[dict[str, Any]]:
    """The cells of a setting: for each metric and number of seeds, how often pairs differ."""
    setting = {**SETTINGS, **VIEWS}[name]
    cells: dict[tuple[str, int], list[dict[str, float]]] = {}
    equal = comparisons(setting, dict.fromkeys(setting.methods, rows), draws, seed=rows)
    unequal = comparisons(setting, {"A": rows, "B": 2 * rows}, draws, seed=rows + 1)
    random = np.random.RandomState(rows)
    for one in equal:
        two = next(unequal) if setting.power else {}
        for key, comparison in one.items():
            sign, verdict = -1 if key[0] == "loss" else 1, gap(comparison)
            found = {
                "different": float(verdict.is_significant),
                "over seeds": float(Verdict(verdict.values).is_significant),
                "half width": verdict.half,
                "score": fmean(comparison.scores()["A"]),
            }
            if setting.power:
                family = [comparison.verdicts[(x, "method"), ("A", "method")] for x in "BCD"]
                found["any of three"] = float(any(x.is_significant for x in family))
                for shift in SHIFTS:
                    moved = with_gain(verdict, sign * shift)
                    found[f"shifted by {shift:g}"] = float(moved.is_significant)
                if len(verdict.values) == SEEDS:
                    found["minimum detectable found"] = found_again(verdict)
                more = gap(two[key])
                found["gain"] = sign * more.estimate
                found["gain found"] = float(more.is_significant)
                found["gain where found"] = sign * more.estimate * more.is_significant
                found |= collapsed(comparison, random)
            cells.setdefault(key, []).append(found)
    for (metric, seeds), every in cells.items():
        means = {head: round(fmean(x[head] for x in every if head in x), 4) for head in every[-1]}
        yield {"metric": metric, "seeds": seeds, "pairs": len(every), **means}


def collapsed(comparison: Comparison, random: Any) -> dict[str, float]:
    """Whether methods of one mean differ, of which B is at chance in one seed of ten."""
    scores, metric = comparison.scores(), comparison.plan.metric
    chance = 0.5 if metric == "accuracy" else float(np.log(2))
    fallen = random.rand(len(scores)) < 0.1
    lost = 0.1 * (chance - scores["A"].mean())
    values = np.where(fallen, chance, scores["B"]) - scores["A"] - lost
    different = Verdict(values).is_significant
    return {"collapsed different": float(different)}


class Another(LoRA):
    """Equal to LoRA but for its start and its order of rows."""

    def prepare(self, model: Any) -> None:
        """Start anew, by other random numbers than the seed's."""
        torch.manual_seed(torch.initial_seed() + 1000)
        for layer in model.layers[::2]:
            layer.reset_parameters()


def right(outputs: Any) -> dict[str, float]:
    """The accuracy."""
    return {"accuracy": float((outputs.predictions.argmax(1) == outputs.label_ids).mean())}


def trained(draws: int, rows: int = 120) -> dict[str, Any]:
    """One cell by `compare_methods` and its Trainer: accuracy, five seeds, a choice of the rate."""
    generator = torch.Generator().manual_seed(0)
    found: list[Verdict] = []
    for _ in range(draws):
        here = Draws({"A": rows}, generator, Setting())
        train, test = (
            Dataset.from_dict({"x": x[0].tolist(), "labels": y[0].long().tolist()})
            for x, y in (here.train, here.test)
        )
        comparison = compare_methods(
            {"A": LoRA(), "B": Another()},
            Net,
            None,
            BilevelTrainingArguments("unused", use_cpu=True, report_to="none"),
            train_dataset=train,
            test_dataset=test,
            passes=STEPS,
            seeds=range(5),
            metric="accuracy",
            choice=CHOICE,
            runs=Runs(progress=False),
            compute_metrics=right,
        )
        found.append(gap(comparison))
        print(len(found), found[-1], flush=True)
    different = fmean(each.is_significant for each in found)
    means = {"different": different, "half width": round(fmean(each.half for each in found), 4)}
    return {"metric": "accuracy", "seeds": 5, "pairs": draws, **means}


def calibration(*, quick: bool, draws: int = 240, through: int = 40) -> None:
    """Measure the cells that the results lack, and print all as JSON."""
    torch.set_num_threads(1)
    results = Results(None if quick else FILE)
    cells = [*product(SETTINGS, (120, 300)), *((name, 120) for name in VIEWS)]
    if quick:
        draws, through, cells = TOGETHER, 1, cells[:1]
    for name, rows in cells:
        if any((x["setting"], x["rows"]) == (name, rows) for x in results.of("nets")):
            continue
        for cell in measured(name, rows, draws):
            keys = {key: cell.pop(key) for key in ("metric", "seeds")}
            results.save(results.entry(part="nets", setting=name, rows=rows, **keys) | cell)
    if not results.of("trainer"):
        cell = trained(through)
        results.save(results.entry(part="trainer", setting="rate", rows=120) | cell)
    results.finish()
    print(json.dumps(results.rows, indent=1))


def tables() -> dict[str, list[dict[str, str]]]:
    """The shares of equal pairs that are called different, and of different ones that are found."""
    every, power = Results(FILE), []
    equal: dict[tuple[str, int], dict[str, str]] = {}
    views: dict[str, dict[str, str]] = {}
    for cell in [*every.of("nets"), *every.of("trainer")]:
        place = f"{cell['metric']}, {cell['seeds']} seeds"
        error = 1.96 * (cell["different"] * (1 - cell["different"]) / cell["pairs"]) ** 0.5
        text = f"{100 * cell['different']:.1f} ± {100 * error:.1f} %"
        if cell["setting"] in VIEWS:
            rows, _, training = cell["setting"].partition(", ")
            row = views.setdefault(cell["setting"], {"rows": rows, "training rows": training})
            row[place] = f"{text} ({100 * cell['over seeds']:.0f} %)"
            continue
        by = ", by `compare_methods`" if cell["part"] == "trainer" else ""
        name, count = f"{cell['setting']}{by}", cell["rows"]
        row = equal.setdefault((name, count), {"chosen": name, "rows": str(count)})
        row["pairs"] = str(cell["pairs"])
        row[place] = f"{text} ({cell['half width']:.3f})"
        if "gain" in cell:
            found = {f"+{x:g}": f"{100 * cell[f'shifted by {x:g}']:.0f} %" for x in SHIFTS}
            found["twice the rows"] = f"{100 * cell['gain found']:.0f} % (+{cell['gain']:.3f})"
            larger = cell["gain where found"] / cell["gain found"] / cell["gain"]
            found["gain where found"] = f"{larger:.1f} times"
            again = cell.get("minimum detectable found")
            found["detectable"] = "–" if again is None else f"{100 * again:.0f} %"
            found["a false one of three"] = f"{100 * cell['any of three']:.1f} %"
            found["one collapses"] = f"{100 * cell['collapsed different']:.0f} %"
            where = {"score": cell["metric"], "rows": str(count), "seeds": str(cell["seeds"])}
            power.append(where | found)
    places = [f"{metric}, {seeds} seeds" for metric in ("accuracy", "loss") for seeds in (5, SEEDS)]
    whole = {
        "calibration": (["chosen", "rows", "pairs"], equal),
        "views": (["rows", "training rows"], views),
    }
    made = {
        name: [{head: row.get(head, "–") for head in [*heads, *places]} for row in rows.values()]
        for name, (heads, rows) in whole.items()
    }
    return {**made, "power": power}
