"""`MixTrainer` with a search on a head: weights in seconds, then one training of the adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hyperopt_peft import MixTrainer, ProblemError, compare_baselines
from hyperopt_peft.problems import mix_trainer
from hyperopt_peft.problems.head_mix import HeadMix, Plan
from hyperopt_peft.problems.mix_plans import LABEL_MODEL, LEARNED, equal, methods_of
from tests.support import mix_in_processes as in_processes
from tests.support import two_processes
from tests.support.mix_runs import rows, trainer, votes
from tests.support.resume import interrupted
from tests.support.trainers import values

LAUNCHER = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def on_head(folder: Path, callbacks: Any = (), **options: Any) -> MixTrainer:
    settings = {"search": "head", "search_steps": 4, "retrain_steps": 4, **options}
    return trainer(folder, callbacks, **settings)


def test_the_weights_are_found_and_the_adapter_is_trained_by_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features are made once; the records have the shares of each step."""
    made, calls = mix_trainer.features_of, []
    monkeypatch.setattr(
        mix_trainer, "features_of", lambda *a, **k: calls.append(1) or made(*a, **k)
    )
    run = on_head(tmp_path, data=votes(40))
    begin = values(run.model)
    run.train()
    weights = run.row_weights()
    assert run.on_head and weights["0"] > 2 * weights["1"]
    assert torch.allclose(run.weights.logits, run.head_mix.learned.logits)
    assert any(not torch.equal(value, begin[name]) for name, value in values(run.model).items())
    assert run.retrainer is not None and run.retrainer.state.global_step == 4
    logged = [record for record in run.state.log_history if "shares" in record]
    assert [record["step"] for record in logged] == [0, 1, 2, 3, 4]
    assert sum(logged[-1]["shares"].values()) == pytest.approx(1)
    assert run.state.log_history[-1]["search_passes"] == run.head_mix.learned.passes > 0
    compare_baselines(run, folds=2)
    assert len(calls) == 1 and (tmp_path / "features.safetensors").exists()


def test_the_features_are_those_of_the_initial_adapter(tmp_path: Path) -> None:
    """Also after a training, which they leave as it is."""
    before = on_head(tmp_path / "before").head_mix.rows
    run = on_head(tmp_path / "after", search="adapter", max_steps=2)
    run.train()
    end = values(run.model)
    assert torch.equal(run.head_mix.rows.sources.x, before.sources.x)
    assert all(torch.equal(value, end[name]) for name, value in values(run.model).items())


@pytest.mark.parametrize("kind", ["tokens", "regression", "causal"])
def test_the_default_search_is_on_the_head(tmp_path: Path, kind: str) -> None:
    run = on_head(tmp_path, kind=kind, search="auto", max_steps=2, retrain_steps=1)
    run.train()
    assert run.on_head and "head_mix" in vars(run)
    assert len(run.weights.names) == 3 and run.weights.logits.isfinite().all()
    assert run.weights.logits.norm() > 0


def test_a_model_in_shards_has_no_head(tmp_path: Path) -> None:
    run = on_head(tmp_path, kind="causal", search="adapter", max_steps=2, retrain="none")
    run.train()
    run.is_fsdp_enabled = True
    with pytest.raises(ProblemError, match=r"in shards \(FSDP\); choose the adapter"):
        compare_baselines(run, model="head")


def test_a_resumed_retraining_does_not_search_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(folder: Path, callbacks: Any = ()) -> Any:
        return on_head(folder, callbacks, save_strategy="steps", save_steps=2)

    whole = make(tmp_path / "whole")
    whole.train()
    interrupted(tmp_path / "cut", (3, "retrain"), make)
    monkeypatch.setattr(HeadMix, "search", lambda self: pytest.fail("a search"))
    run = make(tmp_path / "cut")
    run.train(resume_from_checkpoint=True)
    assert torch.equal(run.weights.logits, whole.weights.logits)
    for name, value in values(run.model).items():
        assert torch.equal(value, values(whole.model)[name]), name


def trained_on(run: MixTrainer, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rows, steps and weights of each training of ``plan``."""
    seen, of_parts = [], run.of_parts

    def spied(parts: Any, args: Any, weights: Any, **options: Any) -> Any:
        made = of_parts(parts, args, weights, **options)
        seen.append((made.train_dataset, args.max_steps, made.weights().tolist()))
        return made

    monkeypatch.setattr(run, "of_parts", spied)
    run.retrain(plan)
    return seen


def test_a_plan_trains_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of groups the rows that they keep; then the trusted rows, of weight 1, for half the steps."""
    run = on_head(tmp_path)
    groups = run.head_mix.rows.groups.clone()
    groups[[1, 50]] = -1
    plan = Plan(torch.tensor([0.5, 0.1, 0.9]), groups=groups, then_trusted=True)
    (first, steps, weights), (second, after, ones) = trained_on(run, plan, monkeypatch)
    everything = run.data.everything["input_ids"][:]
    assert first["input_ids"][:] == [
        ids for row, ids in enumerate(everything) if row not in (1, 50)
    ]
    assert second["input_ids"][:] == run.data.trusted["input_ids"][:]
    assert (steps, after) == (2, 2)
    assert weights[0] == pytest.approx(5 * weights[1]) and weights[2] == pytest.approx(
        9 * weights[1]
    )
    assert ones == pytest.approx([1.0] * 3)
    assert weights == pytest.approx(list(run.row_weights().values()))


def test_trusted_rows_alone_have_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And two trainings by one plan end alike: each begins at the initial values."""
    run = on_head(tmp_path)
    plan = Plan(torch.tensor([0.0, 0.0, 1.0]))
    ((trained, steps, weights),) = trained_on(run, plan, monkeypatch)
    assert len(trained) == 30 and steps == 4 and weights == pytest.approx([1.0] * 3)
    first = values(run.model)
    run.retrain(equal(run.head_mix))
    assert any(not torch.equal(value, first[name]) for name, value in values(run.model).items())
    run.retrain(plan)
    assert all(torch.equal(value, first[name]) for name, value in values(run.model).items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["votes", "soft votes", "rows", "tokens"])
def test_the_adapter_is_trained_by_every_method(tmp_path: Path, kind: str) -> None:
    data: Dataset | None = None
    if "votes" in kind:
        data = votes(30, sure=0.8 if kind == "soft votes" else None)
    run = on_head(tmp_path, kind="tokens" if kind == "tokens" else "classes", data=data)
    methods = methods_of(run.head_mix)
    assert (LABEL_MODEL in methods) == ("votes" in kind)
    for method in methods.values():
        run.retrain(method(run.head_mix))
        assert all(value.isfinite().all() for value in values(run.model).values())


def test_the_verdict_is_of_what_the_weights_were_learned_on(tmp_path: Path) -> None:
    run = on_head(tmp_path, retrain="none", trusted=rows(12, 3))
    run.train()
    names = {result.method for result in compare_baselines(run, folds=2).results}
    assert names == set(methods_of(run.head_mix)) and LEARNED in names
    assert run.search_passes() == -(-108 // 32)


@pytest.mark.slow
def test_two_processes_search_and_train_as_one_does(tmp_path: Path) -> None:
    two = two_processes.run(LAUNCHER, "mix_in_processes.py", tmp_path, "head")
    one = in_processes.train(tmp_path / "one", 8, search="head")
    for name, value in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        assert (two[0][name] - value).norm() <= 1e-6 * value.norm(), name
