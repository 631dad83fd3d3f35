"""The tables of `language`, made of the entries of its file."""

from __future__ import annotations

import statistics

from benchmarks.measure import mean_and_half
from benchmarks.store import Row, Store
from hyperopt_peft.problems import mix_baselines as simple

#: The learned mix that the others are compared with, and all that are learned by a search.
OURS = "darts, dots"
LEARNED = (OURS, "fastmix")
#: The ways that `compare_baselines` compares, and their names there.
NAMES = {
    "proportional": simple.EQUAL,
    "trusted alone": simple.TRUSTED_ONLY,
    "sources, then trusted": simple.THEN_TRUSTED,
    "agreement": simple.AGREEMENT,
    "filtered": simple.FILTERED,
    OURS: simple.LEARNED,
}


def tables_of(runs: Store) -> dict[str, list[Row]]:
    """For each target a table of the ways, and one of the verdicts and of the learned shares."""
    rows, tables, summary = runs.of("language"), {}, []
    for target in dict.fromkeys(row["target"] for row in rows):
        ways: dict[str, dict[int, Row]] = {}
        for row in rows:
            if row["target"] == target and "loss" in row:
                ways.setdefault(row["way"], {})[row["seed"]] = row
        tables[f"Target {target}"] = [_line(name, ways) for name in ways]
        summary += _shares(target, ways)
    tables["Shares in the training loss"] = summary
    tables["Verdict"] = _verdicts(runs, rows)
    return {title: rows for title, rows in tables.items() if rows}


def _line(name: str, ways: dict[str, dict[int, Row]]) -> Row:
    by_seed, ours = ways[name], ways.get(OURS, {})
    losses = [row["loss"] for row in by_seed.values()]
    gaps = [by_seed[seed]["loss"] - ours[seed]["loss"] for seed in by_seed.keys() & ours.keys()]
    middle, half = mean_and_half(gaps) if gaps else (0.0, 0.0)
    setting = next(iter(by_seed.values()))["setting"]
    return {
        "way": name,
        "loss": f"{statistics.fmean(losses):.3f}",
        f"− {OURS}": None if name == OURS or not gaps else f"{middle:+.3f} ± {half:.3f}",
        "right tokens, %": f"{statistics.fmean(r['accuracy'] for r in by_seed.values()):.1f}",
        "rate": f"{setting['rate']:g}",
        "length": f"{setting['length']:g}",
        "upper rate": f"{setting['upper_rate']:g}" if name in LEARNED else None,
    }


def _shares(target: str, ways: dict[str, dict[int, Row]]) -> list[Row]:
    """The mean share of each source, of the ways that choose them."""
    lines = []
    for name, by_seed in ways.items():
        shares = [row["shares"] for row in by_seed.values() if "shares" in row]
        if shares:
            means = {n: statistics.fmean(each[n] for each in shares) for n in shares[0]}
            line = {"target": target, "way": name}
            lines.append(line | {n: f"{value:.2f}" for n, value in means.items()})
    return lines


def _verdicts(runs: Store, rows: list[Row]) -> list[Row]:
    """What `compare_baselines` names by seed, and how far its test loss is above the best."""
    lines = []
    for row in runs.of("verdict"):
        if "named" not in row:
            continue
        loss = {
            r["way"]: r["loss"]
            for r in rows
            if (r["target"], r["seed"]) == (row["target"], row["seed"]) and r["way"] in NAMES
        }
        named = next(way for way, method in NAMES.items() if method == row["named"])
        best = min(loss, key=lambda way: loss[way])
        lines.append(
            {
                "target": row["target"],
                "seed": row["seed"],
                "named": named,
                "best of these": best,
                "above it": f"{loss[named] - loss[best]:.3f}" if named in loss else None,
            }
        )
    return lines
