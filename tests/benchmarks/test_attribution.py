"""The arithmetic of benchmarks/attribution."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.attribution import scores, tables, trainers
from benchmarks.attribution.runs import Recipe, actual, planted, random_rows
from benchmarks.store import Store
from hyperopt_peft.attribution.check import metasmoothness
from hyperopt_peft.attribution.scores import parse_estimator
from tests.support.attributed import ROWS, levels, scored, setup_of


def test_planted_noise_has_its_share_and_its_kind() -> None:
    labels = torch.arange(300) % 3
    for noise in ("uniform", "class-dependent"):
        found = planted(labels, 3, noise, 0.2, torch.Generator().manual_seed(0))
        changed = found != labels
        assert int(changed.sum()) == 60 and int(found.max()) < 3
        turned = (found[changed] == (labels[changed] + 1) % 3).double().mean()
        assert turned == 1 if noise == "class-dependent" else 0.3 < turned < 0.7
    assert torch.equal(planted(labels, 3, "none", 0.2, torch.Generator()), labels)


def test_retrainings_are_those_of_the_check() -> None:
    result = scored(levels())
    setting, masks = setup_of(result), random_rows(ROWS, 0.1, 6, seed=3)
    check = result.check(6, share=0.1, perturbation=None, seed=3)
    assert torch.allclose(actual(setting, masks), check.actual, rtol=1e-12, atol=1e-14)
    assert scores.predicted(result.scores, masks) == pytest.approx(check.predicted.tolist())
    source = torch.Generator().manual_seed(3)
    smooth = metasmoothness(setting, parse_estimator("unrolled"), result.scores, 0.1, source)
    assert smooth > 0.95


def task() -> trainers.Task:
    """Two layers of a small language model on random states of eight tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, intermediate_size=32, **sizes))
    ids = torch.randint(20, (18, 8))
    rows = trainers.States(torch.randn(18, 8, 16), torch.ones_like(ids), ids)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    recipe = Recipe(batch=4, rate=0.05, epsilon=1e-2, warm_up=0.2, epochs=2.0)
    return trainers.Task("small", model, lora, rows, 14, recipe)


@pytest.mark.slow
def test_methods_share_retrainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry has what each method predicts of them, and is not measured twice."""
    made = []
    monkeypatch.setattr(trainers, "tags", lambda seed, quick: made.append(seed) or task())
    monkeypatch.setattr(trainers, "METHODS", trainers.METHODS[:-1])  # heads are of classifiers
    monkeypatch.setattr(trainers, "RETRAININGS", 8)
    monkeypatch.setattr(trainers, "SHARE", 0.2)
    for _ in range(2):
        runs = Store(tmp_path / "runs.jsonl")
        trainers.measure(runs, 3, False)
    (row,) = runs.rows
    assert made == [3]
    assert set(row["methods"]) == set(trainers.METHODS)
    assert all(len(m["predicted"]) == len(row["actual"]) == 8 for m in row["methods"].values())
    check = tables.check(row, "unrolled")
    assert check.lds > 0.9 and check.slope == pytest.approx(1, abs=0.2)
    whole, *_ = tables.tables_of(runs)[tables.TAGS]
    assert whole["tags: LDS"] == pytest.approx(check.lds)
    assert whole["trainings"] == pytest.approx(3, abs=0.2)  # one, and two passes a step
