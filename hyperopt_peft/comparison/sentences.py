"""A comparison in words: its heading, a sentence for each method, and remarks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from scipy.stats import t

from hyperopt_peft.comparison.store import OF_SEED
from hyperopt_peft.comparison.task import ABLATIONS, Kind
from hyperopt_peft.trainer.method import has_upper_level

if TYPE_CHECKING:
    from hyperopt_peft.comparison.result import Candidate, Comparison

#: What differs between a method's form, its next simpler one, and the first method.
EFFECTS: dict[tuple[Kind, Kind], str] = {
    ("method", "frozen"): "the upper level",
    ("method", "one level"): "the upper level, the data split, fewer lower steps and the rate",
    ("frozen", "one level"): "the data split, fewer lower steps and the rate",
    ("frozen", "method"): "the data split, fewer lower steps, the adapter and the rate",
    ("one level", "method"): "the variables, the adapter and the rate",
}
#: The fewest values of which one may be called far from the others.
FEW = 4


def heading(found: Comparison) -> str:
    """The score, the rows, the budget, what the intervals are over, and the significance."""
    shared, count = found.store.shared, len(found.plan.seeds)
    tested = f"{found.scored:,} " if found.scored else ""
    rows, over = f"{tested}test rows", f"{count} seeds"
    if shared.get("folds"):
        rows, over = f"folds of {tested}trusted rows", f"{count} folds"
    elif OF_SEED in (shared.get(f"{name}_dataset") for name in ("train", "upper", "test")):
        over = f"{count} draws of rows"
    if found.over_rows:
        over = f"{over.removesuffix(' of rows')} × test rows"
    budget = f"{found.plan.passes:g} passes" if found.plan.passes else "heads at their minimum"
    better = " (lower is better)" if found.plan.lower_is_better else ""
    corrected = any(each.family > 1 for each in found.verdicts.values())
    return (
        f"{found.score_name}{better}, {rows}, {budget}; ± 95 % over {over}; "
        f"*: p < 0.05{' (Holm)' if corrected else ''}"
    )


def recommendation(found: Comparison) -> str:
    """The method with the best mean score, and its difference to the next one."""
    means, lower = found.scores()[[*found.plan.methods]].mean(), found.plan.lower_is_better
    best, *others = means.sort_values(ascending=lower, kind="stable").index
    place = f"{'lowest' if lower else 'highest'} of {len(means)}"
    mean = f"{found.shown(means[best])}{_unit(found)}"
    text = f"the mean {found.plan.metric} of {best}, {mean}, is the {place}"
    if not others:
        return text
    gap = found.difference((best, "method"), (others[0], "method"))
    text += f"; {gap.sentence(best, others[0], found.plan.metric, 'seeds', lower)}"
    return f"{best} is recommended: {text}" if gap.is_significant else text


def sentences(found: Comparison) -> list[str]:
    """For each method the difference to the first one, its effects, and remarks."""
    lines = []
    first, numbers = found.plan.candidates()[0], found.table()
    for name in found.plan.methods:
        forms, last = found.forms(name), found.first
        begin = _steps(found, name, numbers.loc[name])
        if name != found.first:
            names = name, found.first, found.plan.metric, "seeds", found.plan.lower_is_better
            gap = found.verdicts[(name, "method"), first]
            lines.append(begin + gap.sentence(*names) + _share(found, name))
            begin = ""
        elif forms:
            last = f"the same{ABLATIONS[forms[-1][1]]}"
        terms = [_effect(found, *pair) for pair in pairwise(forms)]
        if terms:
            lines.append("\n  ".join([f"{begin}{name} − {last} is the sum of", *terms]))
    return lines + remarks(found)


def _share(found: Comparison, name: str) -> str:
    """What the upper level of ``name`` has to do with a significant difference to the first one."""
    pair: tuple[Candidate, Candidate] = (name, "method"), (name, "frozen")
    whole = found.verdicts[pair[0], found.plan.candidates()[0]]
    upper = found.verdicts.get(pair)
    if upper is None or not whole.is_significant:
        return ""
    better, helps = ((x.estimate < 0) == found.plan.lower_is_better for x in (whole, upper))
    if not upper.is_significant:
        alone = f" ({upper}): its frozen form does as well"
        return f", but not by its upper level{alone}" if better else ""
    if helps == better:
        return f", of which its upper level contributes {upper}{_unit(found)}"
    return f", although its upper level contributes {upper}{_unit(found)}"


def _effect(found: Comparison, one: Candidate, other: Candidate) -> str:
    """What differs between two forms of a method, and what this is worth."""
    gap = found.verdicts[one, other]
    text = f"effect of {EFFECTS[one[1], other[1]]}: {gap}{_unit(found)}"
    return text if gap.is_significant else f"{text}, not significant"


def _unit(found: Comparison) -> str:
    return " points" if found.in_points else ""


def _steps(found: Comparison, name: str, did: Any) -> str:
    """The budget, the number of upper steps and how far these moved u, to begin a sentence."""
    if not has_upper_level(found.plan.methods[name]):
        return ""
    words = [f"at {found.plan.passes:g} passes"] if found.plan.passes else []
    steps, moved = did.get("upper.steps", math.nan), did.get("upper.moved", math.nan)
    if steps == steps:
        text = f"with {steps:.3g} upper step{'' if steps == 1 else 's'}"
        if did.get("upper.start") == 0:
            text += f" that moved the upper variables from 0 to a norm of {moved:.2g}"
        elif moved == moved:
            text += f" that moved the upper variables by {100 * moved:.3g} %"
        words.append(text)
    return f"{', '.join(words)}: " if words else ""


def remarks(found: Comparison) -> list[str]:
    """Remarks on rows, seeds, rates and layers."""
    lines = [found.note, found.store.remark(), *_seeds(found), *_edges(found), _rows(found)]
    lines = [text for text in lines if text]
    layers: dict[str, list[str]] = {}
    for name, method in found.plan.methods.items():
        if method.absorbed:
            lines.append(
                f"{name}: a lower level at its minimum absorbs the upper variables; what moves "
                "them is the path to it or the decay of an optimizer"
            )
        if text := found.reported(name)[0]["layers"]:
            layers.setdefault(text, []).append(name)
    alike = len(layers) == 1
    return lines + [k if alike else f"{', '.join(names)}: {k}" for k, names in layers.items()]


def _rows(found: Comparison) -> str:
    """Whether the intervals lack the test rows, though all seeds share these."""
    shared = found.store.shared
    if found.over_rows or shared.get("folds") or shared.get("test_dataset") == OF_SEED:
        return ""
    return (
        f"{found.plan.metric} is not known without parts of the test rows, so the intervals are "
        "over seeds alone"
    )


def _seeds(found: Comparison) -> Iterator[str]:
    """A caution where there are two seeds, and seeds whose score is far from the others'.

    By Grubbs' test at 1 % (Grubbs 1950, Annals of Mathematical Statistics 21, eq. 2), if the score
    is a tenth of the others' mean away from it, too: a t-interval is not made for such values.
    """
    count = len(found.plan.seeds)
    if count == 2:
        yield (
            "two seeds hardly show how much scores differ from seed to seed, and their intervals "
            "may be far too small; give three or more"
        )
    if count < FEW:
        return
    square = t.isf(0.01 / (2 * count), count - 2) ** 2
    limit = (count - 1) * (square / (count * (count - 2 + square))) ** 0.5
    for title, scores in found.scores().items():
        seed = (scores - scores.mean()).abs().idxmax()
        others = scores.drop(seed)
        gap = abs(scores[seed] - others.mean())
        far = abs(scores[seed] - scores.mean()) > limit * scores.std()
        if far and gap > abs(others.mean()) / 10:
            yield (
                f"{title}: seed {seed} scores {found.shown(scores[seed])}, far from the mean of "
                f"the others, {found.shown(others.mean())}; look at its run before you trust "
                "the interval"
            )


def _edges(found: Comparison) -> Iterator[str]:
    """Rates without a finite score, and chosen rates at an end of their grid."""
    count = len(found.plan.seeds)
    for title, rows in found.rates().groupby("method", sort=False):
        for axis, word in {"rate": "a rate", "upper_rate": "an upper rate"}.items():
            grid = rows.dropna(subset=axis)
            for rate in grid[axis][~grid["mean"].map(math.isfinite)]:
                text = "a score is not finite, which counts as the worst"
                yield f"{title}: at the {word.partition(' ')[2]} {rate:g} {text}"
            ends = grid[grid[axis].isin([grid[axis].min(), grid[axis].max()])]
            if 2 * ends["seeds"].sum() > count:
                far = " and ".join(f"{x:g}" for x in sorted(ends[axis][ends["seeds"] > 0]))
                text = f"seeds chose {word} at an end of the grid, {far}; give further ones"
                yield f"{title}: {ends['seeds'].sum()} of {count} {text}"
