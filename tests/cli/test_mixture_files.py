"""A mixture that other trainers read has the learned proportions, and no row twice."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hyperopt_peft.cli.mixture_files import axolotl, llama_factory, trl, write_mixture
from tests.support.files import write

FILES = {"web": {"web.jsonl": 40}, "code": {"a.jsonl": 10, "b.json": 5}, "math": {"m.jsonl": 20}}
WEIGHTS = {"web": 0.5, "code": 2.0, "math": 1.0}
#: Of 40, 10, 5 and 20 rows with the weights 1/4, 1, 1 and 1/2 of the largest.
KEPT = [10, 10, 5, 10]

rows_of_files = st.lists(st.integers(1, 10**7), min_size=1, max_size=3)
sources = st.lists(
    st.tuples(rows_of_files, st.floats(1e-6, 1e3, allow_nan=False)), min_size=2, max_size=20
)


@given(sources)
def test_every_trainer_keeps_rows_in_proportion_to_their_weights(drawn: Any) -> None:
    files = {
        f"s{k}": {f"{k}-{i}.jsonl": n for i, n in enumerate(rows)}
        for k, (rows, _) in enumerate(drawn)
    }
    weights = {f"s{k}": weight for k, (_, weight) in enumerate(drawn)}
    largest = max(weights.values())
    each = [(n, weights[name] / largest) for name, rows in files.items() for n in rows.values()]

    fractions = [entry["fraction"] for entry in trl(files, weights)["datasets"]]
    total = min(n * sum(fractions) / f for (n, _), f in zip(each, fractions))
    for (n, weight), fraction in zip(each, fractions):
        assert fraction / sum(fractions) * total == pytest.approx(weight * n, rel=1e-9)

    shares = [entry["weight"] for entry in axolotl(files, weights)["datasets"]]
    assert all(0 < share <= 1 for share in shares)
    assert shares == pytest.approx([weight for _, weight in each], rel=1e-9)

    options = llama_factory(files, weights)
    odds = [float(x) for x in options["interleave_probs"].split(",")]
    assert options["dataset"].split(",") == list(files)
    expected = [weights[name] * sum(rows.values()) for name, rows in files.items()]
    assert odds == pytest.approx([x / sum(expected) for x in expected], rel=1e-9)
    np.random.default_rng(0).choice(len(odds), p=odds)  # refuses any other sum than 1


def test_trl_loads_its_file_and_mixes_the_learned_proportions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = pytest.importorskip("trl.scripts.utils")
    if "fraction" not in {field.name for field in fields(utils.DatasetConfig)}:
        pytest.skip("this TRL has no fractions")
    monkeypatch.chdir(tmp_path)
    for paths in FILES.values():
        for path, count in paths.items():
            write(Path(path), [{"text": f"{path} {row}"} for row in range(count)])
    write_mixture(tmp_path / "mixture", FILES, WEIGHTS)
    parser = utils.TrlParser((utils.DatasetMixtureConfig,))
    (config,) = parser.parse_args_and_config(["--config", "mixture/trl.yaml"])
    texts = utils.get_dataset(config)["train"]["text"][:]
    paths = [path for files in FILES.values() for path in files]
    assert [sum(text.startswith(path) for text in texts) for path in paths] == KEPT
    assert len(set(texts)) == sum(KEPT)


def test_axolotl_and_llama_factory_have_the_keys_of_their_schemas(tmp_path: Path) -> None:
    write_mixture(tmp_path / "mixture", FILES, WEIGHTS)
    read = {p.stem: yaml.safe_load(p.read_text()) for p in (tmp_path / "mixture").iterdir()}
    assert read["axolotl"] == {
        "datasets": [
            {"path": "web.jsonl", "weight": 0.25},
            {"path": "a.jsonl", "weight": 1.0},
            {"path": "b.json", "weight": 1.0},
            {"path": "m.jsonl", "weight": 0.5},
        ]
    }
    options = read["llama-factory"]
    assert options["mix_strategy"] == "interleave_under" and set(options) == {
        "dataset",
        "mix_strategy",
        "interleave_probs",
    }


def test_files_that_these_trainers_cannot_read_have_no_mixture(tmp_path: Path) -> None:
    write_mixture(tmp_path / "mixture", {"web": {"web.tsv": 3}, "code": {"c.csv": 3}}, WEIGHTS)
    assert not (tmp_path / "mixture").exists()
