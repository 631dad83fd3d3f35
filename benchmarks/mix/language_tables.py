"""The tables of `language`, made of the entries of its file."""

from __future__ import annotations

import statistics

from benchmarks.measure import mean_and_half
from benchmarks.store import Row, Store

#: The learned mix that the others are compared with, by `MixTrainer`'s defaults, and the one by a
#: search on the adapter; all that are learned by a search.
ON_FEATURES, BY_DOTS = "a head on features", "darts, dots"
LEARNED = (BY_DOTS, "fastmix", ON_FEATURES)
#: What `compare_baselines` on the adapter recommends, as a way.
RECOMMENDED = "recommended on the adapter"


def tables_of(runs: Store) -> dict[str, list[Row]]:
    """For each target a table of the ways; those of shares and of cross-validated losses."""
    rows, tables, summary = runs.of("language"), {}, []
    for target in dict.fromkeys(row["target"] for row in rows):
        ways: dict[str, dict[int, Row]] = {}
        for row in rows:
            if row["target"] == target and "loss" in row:
                ways.setdefault(row["way"], {})[row["seed"]] = row
        for row in runs.of("verdict"):
            if row["target"] == target and "loss" in row:
                ways.setdefault(RECOMMENDED, {})[row["seed"]] = row
        tables[f"Target {target}"] = [_line(name, ways) for name in ways]
        summary += _shares(target, ways)
    tables["Shares in the training loss"] = summary
    tables["Cross-validated trusted loss, and what is recommended"] = _recommended(runs)
    return {title: rows for title, rows in tables.items() if rows}


def _line(name: str, ways: dict[str, dict[int, Row]]) -> Row:
    by_seed, ours = ways[name], ways.get(ON_FEATURES, {})
    losses = [row["loss"] for row in by_seed.values()]
    gaps = [by_seed[seed]["loss"] - ours[seed]["loss"] for seed in by_seed.keys() & ours.keys()]
    middle, half = mean_and_half(gaps) if gaps else (0.0, 0.0)
    setting = next(iter(by_seed.values()))["setting"]
    return {
        "way": name,
        "loss": f"{statistics.fmean(losses):.3f}",
        "− on features": None if name == ON_FEATURES or not gaps else f"{middle:+.3f} ± {half:.3f}",
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


def _recommended(runs: Store) -> list[Row]:
    """The cross-validated loss of each method by seed; that of the recommended one is marked."""
    lines: dict[tuple[str, str], Row] = {}
    for row in (row for row in runs.of("verdict") if "named" in row):
        for method, loss in row["cv"].items():
            line = {"target": row["target"], "method": method}
            marked = f"{loss:.2f}{' ←' * (method == row['named'])}"
            lines.setdefault((row["target"], method), line)[f"seed {row['seed']}"] = marked
    return list(lines.values())
