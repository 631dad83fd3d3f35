"""The hypergradients and the accounting of benchmarks/tune.py."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import tune
import tune_runs
import tune_tables
from attribution_tables import Runs
from last_layers import LastLayers, States

PLAIN = [{"trainings": 1.0, "held": held} for held in (0.9, 0.7, 0.8, 1.0)]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> tune_runs.Tuned:
    """A training of 10 steps of a small model in float64."""
    small = {"TRAIN": 8, "HELD": 4, "TEST": 4, "BATCH": 4, "EPOCHS": 5, "STEPS": 10}
    for name, value in small.items():
        monkeypatch.setattr(tune_runs, name, value)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    body = BertForSequenceClassification(BertConfig(vocab_size=10, num_hidden_layers=6, **sizes))
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    model = get_peft_model(LastLayers(body, 2), config).double().eval()
    mask = (torch.arange(5) < torch.randint(2, 6, (16, 1))).double()
    states = States(torch.randn(16, 5, 8).double(), mask, torch.randint(0, 2, (16,)))
    rows = tune_runs.Rows(states, *torch.arange(16).split([8, 4, 4]))
    return tune_runs.Tuned(model, rows, 0)


def test_hypergradient_is_that_of_retraining(tiny: tune_runs.Tuned) -> None:
    """By central differences over each hyper-parameter."""
    u = tiny.space.plain(2e-2).double()
    u += 0.1 * torch.randn(len(u), generator=torch.Generator().manual_seed(0)).double()
    u[9:18] += 3  # decays of about .2, which matter

    def trained(at: Tensor) -> float:
        tiny.train(at)
        return tiny.measure(tiny.rows.held)[0]

    steps = tiny.train(u, keep=True)
    found, passes = tune_runs.hypergradient(tiny, steps)
    e = 1e-5 * torch.eye(len(u)).double()
    truth = torch.tensor([(trained(u + d) - trained(u - d)) / 2e-5 for d in e]).double()
    assert passes == 2 * len(steps) and len(u) == 25
    assert torch.allclose(found, truth, rtol=1e-5, atol=1e-9)
    assert all(part.abs().max() > 1e-5 for part in tiny.space.parts(truth).values())


def test_rates_are_spread_at_every_number_of_trials() -> None:
    """The widest gap between the logarithms is at most twice as wide as an equal spacing's."""
    least, largest = tune_runs.RANGES["rate"]
    for count in (4, 8, 15, 30):
        logs = torch.tensor(tune.rates(count)).log().sort().values
        gaps = (logs[1:] - logs[:-1]) / (largest - least)
        assert least < logs[0] and logs[-1] < largest and gaps.max() <= 2 / count
    assert tune.rates(30)[:8] == pytest.approx(tune.rates(8))


class Quadratic:
    """A level whose held-out loss is ‖u − target‖²."""

    seed = 0
    rows = SimpleNamespace(held="held", test="test")

    def __init__(self) -> None:
        self.space = tune_runs.Space(("lora_A", "lora_B", "head"), 1, 2)
        self.target = self.space.plain(tune.rates(4)[1]) + 1

    def train(self, u: Tensor, optimizer: Any = None) -> None:
        self.u = u

    def measure(self, index: object) -> tuple[float, float]:
        return float((self.u - self.target).square().sum()), 0.5


@pytest.mark.parametrize("budget", [10, 20, 30])
@pytest.mark.parametrize("sign", [True, False])
def test_a_descent_pays_for_its_gradients(
    budget: int, sign: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = Quadratic()
    plain = [{**trial, "held": 10 + trial["held"]} for trial in PLAIN]
    paid = []

    def gradient(search: object, u: Tensor, orders: int) -> tuple[Tensor, float]:
        paid.append(2.0)
        return 2 * (u - level.target), 2.0

    monkeypatch.setattr(tune, "mean_gradient", gradient)
    search = tune.Search(Runs(None), level, "compare", "tweets", tune.OURS)
    tune.descend(search, plain, tune.Descent(sign=sign), budget)
    spent = sum(trial["trainings"] for trial in search.trials)
    own = search.trials[4:]
    assert search.trials[:4] == plain and budget - 3 < spent <= budget
    # A last gradient may find that no training is left to use it.
    assert sum(t["trainings"] - 1 for t in own) in (sum(paid), sum(paid) - 2)
    first, *_ = own
    assert first["change"] == pytest.approx(first["held"] - 10.7)
    moves = [t["change"] for t in own if t["change"] < 0]
    assert 10.7 + sum(moves) == pytest.approx(min(t["held"] for t in search.trials), abs=1e-4)


def test_a_budget_selects_among_the_trials_it_pays_for() -> None:
    trials = [*PLAIN, {"trainings": 3.0, "held": 0.5}, {"trainings": 1.0, "held": 0.6}]
    chosen = [tune_tables.selected(trials, budget)["held"] for budget in (1, 2, 6, 6.9, 7, 30)]
    assert chosen == [0.9, 0.7, 0.7, 0.7, 0.5, 0.5]


def made_up(ours: float) -> Runs:
    """Ten tasks and seeds, in which hypergradients gain ``ours`` at seven trainings."""
    runs = Runs(None)
    for seed in range(5):
        for task, base in (("tweets", 0.8), ("movies", 0.6)):
            noise = 0.001 * seed
            known = {
                "one rate": [(1.0, 0.7, base)] * 4,
                tune.TPE: [(1.0, 0.7, base + 0.1)] * 20 + [(1.0, 0.6, base - 0.1)],
                tune.RANDOM: [(1.0, 0.8, base + 0.2)],
                tune.OURS: [(1.0, 0.7, base)] * 4 + [(3.0, 0.65, base - ours - noise)],
                tune.CONTROL: [(1.0, 0.7, base)] * 4,
            }
            for method, trials in known.items():
                row = runs.entry(part="compare", task=task, seed=seed, method=method)
                row["trials"] = [
                    {"trainings": cost, "held": held, "loss": loss, "accuracy": 1 - loss}
                    for cost, held, loss in trials
                ]
                row |= {"budget": 30, "seconds": {"trainings": 1.0, "hypergradients": 2.5}}
                if method in (tune.OURS, tune.CONTROL):
                    row["trials"][-1] |= {"change": -0.05, "predicted": -0.1}
    runs.entry(part="compare", task="tweets", seed=9, method="one rate")["trials"] = []
    return runs


@pytest.mark.parametrize("ours", [0.05, -0.05])
def test_tables_targets_and_the_decision(ours: float) -> None:
    runs = made_up(ours)
    tables, targets = tune_tables.tables_of(runs), tune_tables.targets_of(runs)
    regret = {row["method"]: row for row in tables["Regret of the test loss"]}
    assert regret[tune.TPE]["20 trainings"] == pytest.approx(0.2)
    assert regret[tune.TPE]["30 trainings"] == pytest.approx(0)
    assert regret["one rate"]["4 trainings"] == pytest.approx(0.1)
    assert regret[tune.OURS]["10 trainings"] == pytest.approx(0.1 - ours - 0.002)
    accuracy = tables["Regret of the test accuracy"][0]
    assert accuracy["4 trainings"] == pytest.approx(0.1)
    assert tables["A hypergradient, in trainings"] == [{"passes": 2.0, "processor time": 2.5}]
    best = {r["trainings"]: r["other"] for r in tables["Paired differences"] if r["best baseline"]}
    assert best == {10: "one rate", 20: "one rate", 30: tune.TPE}
    assert [target.record()["met"] for target in targets] == [ours > 0, ours > 0, False]
    said = tune_tables.decision(runs)
    assert ("at no budget" in said) == (ours < 0)
    for row in runs.rows[:5]:  # a task and seed that still goes on
        row["budget"] = 20
    assert "30 trainings" not in tune_tables.decision(runs)
    assert "30 trainings" not in tune_tables.tables_of(runs)["Regret of the test loss"][0]
