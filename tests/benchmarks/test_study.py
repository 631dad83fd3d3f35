"""The study of BiDoRA: its statistics, its plan, and that docs/results.md is what its runs give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import wilcoxon

from benchmarks.last_layers import disjoint
from benchmarks.measure import mean_and_half
from benchmarks.store import Store
from benchmarks.study.plan import Study
from benchmarks.study.report import compared, differences, held_out, of_tasks
from benchmarks.study.variants import HyperMagnitudes, Rotating
from tests.support import trainers

SMOKE = Path(__file__).parents[2] / "benchmarks/study/smoke.yaml"


def test_statistics_are_those_of_the_definitions() -> None:
    gaps = [0.03, -0.01, 0.0, 0.02, 0.05, -0.04]
    row = compared(gaps)
    assert row["win/tie/loss"] == "3/1/2"
    assert row["p"] == f"{wilcoxon([gap for gap in gaps if gap]).pvalue:.2g}"
    assert compared([0.1 + 0.2 - 0.3])["win/tie/loss"] == "0/1/0"  # floats of the last digit
    middle, half = mean_and_half([1.0, 2.0, 3.0])
    assert (middle, half) == (2.0, pytest.approx(4.302653 / 3**0.5))


def test_differences_are_of_the_same_task_and_seed() -> None:
    one = {("a", 0): {"score": 0.5}, ("a", 1): {"score": 0.7}}
    other = {("a", 1): {"score": 0.4}, ("b", 0): {"score": 0.1}}
    assert differences(one, other) == [pytest.approx(0.3)]
    more = one | {("c", 0): {"score": 0.9}, ("c", 1): {"score": 0.3}}
    base = other | {("c", 0): {"score": 0.4}, ("c", 1): {"score": 0.4}}
    assert of_tasks(more, base) == [pytest.approx(0.3), pytest.approx(0.2)]


def test_no_row_is_alike_in_two_parts() -> None:
    texts = ["one two", "three", "one two four", "five", "three", "six", "one two"]
    parts = torch.arange(7).split([3, 2, 2])
    found = disjoint(parts, texts, length=4)  # the class token, two words, the end
    assert [part.tolist() for part in found] == [[0, 1, 2], [3], [5]]


def test_a_result_s_key_depends_on_all_of_the_run_s_options(tmp_path: Path) -> None:
    text, keys = SMOKE.read_text(), set()
    for change in (("a", "a"), ("test: 40", "test: 50"), ("tweets: 16", "tweets: 20")):
        file = tmp_path / "study.yaml"
        file.write_text(text.replace(*change))
        keys |= {run.key for run in Study.read(file).rates_runs("tweets", 40, "DoRA")}
    assert len(keys) == 6
    file.write_text(text.replace("controls", "control"))
    with pytest.raises(SystemExit, match="is not a study: KeyError"):
        Study.read(file)
    study = Study.read(SMOKE)
    runs = [*study.variants_runs(), *study.rates_runs("tweets", 40, "DoRA")]
    assert len({run.key for run in runs}) == len(runs)
    study.default["bilevel"]["lower_steps"] += 1
    changed = [run.key for run in study.variants_runs()]
    same = [run.key in changed for run in runs if run.part == "variants"]
    assert same == [True] + 4 * [False]  # the control is not bilevel


def test_a_method_s_rate_is_that_of_the_lowest_held_out_loss() -> None:
    study, store = Study.read(SMOKE), Store(None)
    cell = ("tweets", 40, "DoRA")
    assert study.chosen(store, *cell) is None
    results = {"tweets": ((0.9, 0.6), (0.8, 0.4)), "tags": ((0.5, 0.2), (0.7, 0.6))}
    for task, of_rates in results.items():
        for run, (loss, score) in zip(study.rates_runs(task, 40, "DoRA"), of_rates, strict=True):
            store.save({"key": run.key, "loss": loss, "score": score})
    assert study.chosen(store, *cell) == 5e-3
    for name in set(study.table) - {"DoRA"}:
        del study.table[name]
    (row,) = held_out(study, store, 40)
    assert list(row.values()) == ["DoRA", "0.400", "0.500", "0.500", "0.300"]


def test_the_rows_above_are_not_those_of_the_lower_steps_before(tmp_path: Path) -> None:
    rows = trainers.data()
    args = trainers.arguments(tmp_path, max_steps=12, per_device_upper_batch_size=6)
    trainer = Rotating(trainers.peft_model(), args, train_dataset=rows)

    def numbers(batch: dict[str, torch.Tensor]) -> set[int]:
        return {rows["input_ids"].index(row) for row in batch["input_ids"].tolist()}

    below = [numbers(batch) for batch in trainer.get_train_dataloader()]
    above = [numbers(trainer.upper_batches.batch(cycle)) for cycle in range(6)]
    assert len(below) == 12
    for step, batch in enumerate(below):
        assert len(batch) == 4
        assert not batch & above[step // 2]
    assert set().union(*above[:4]) == set(range(24))  # an epoch
    assert len(set().union(*below)) > 18  # more than one cycle can have
    trainer.train()
    assert trainer.state.global_step == 12


def test_hyper_magnitudes_pull_to_a_scale_of_the_first_ones(tmp_path: Path) -> None:
    args = trainers.arguments(tmp_path, hypergradient="minres:steps=5,damping=1.0", retrain="warm")
    trainer = HyperMagnitudes(trainers.peft_model(dropout=0.0), args, train_dataset=trainers.data())
    batch = trainers.data().with_format("torch")[:4]
    with torch.no_grad():
        assert trainer.lower.loss(batch) == trainer.lower.task_loss(batch)
        trainer.scales[0] = torch.tensor(2.0).log()
        trainer.precisions[0] = torch.tensor(3.0).log()
        pull = trainer.lower.loss(batch) - trainer.lower.task_loss(batch)
        assert pull.item() == pytest.approx(1.5 * trainer.start[0].square().mean().item(), rel=1e-4)
        trainer.scales[0] = 0.0
    first = [*trainer.scales.tolist(), *trainer.precisions.tolist()]
    trainer.train()
    learnt = [*trainer.scales.tolist(), *trainer.precisions.tolist()]
    assert all(before != after for before, after in zip(first[1:3], learnt[1:3]))
    assert trainer.retrainer.lower.scales is trainer.scales
    now = [m for n, m in trainers.values(trainer.model).items() if "magnitude" in n]
    assert all(not torch.equal(m, m0) for m, m0 in zip(now, trainer.start, strict=True))
