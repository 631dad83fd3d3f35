"""BiDoRA in two processes by ``accelerate launch`` (gloo, float64) is that in one process.

Each of the two has half of every micro-batch, and the one twice as many examples a device. The
processes are started with the configurations that are shipped, for DDP and for FSDP2.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.support import trainer_in_processes as in_processes
from tests.support import trainers as models
from tests.support import two_processes

CONFIGURATIONS = Path(__file__).parents[2] / "examples" / "accelerate"
# By method: the largest relative error; a one-sided difference divides rounding by 1e-8.
ROUNDING = {"darts": 1e-6, "minres": 1e-9, "f2sa": 1e-8, "retrain": 1e-6}
TIMES = ("runtime", "samples_per_second", "steps_per_second")
KINDS = {"ddp": "two_cpu_processes.yaml", "fsdp": "fsdp2.yaml"}
RUNS = [("ddp", name) for name in in_processes.RUNS]
RUNS += [("fsdp", name) for name in in_processes.SHARDED]
pytestmark = pytest.mark.slow  # processes of their own; tests/engine has two of an Engine


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def two(folders: Any) -> Any:
    """The results of each process of every run, of a kind: a launch for each kind asked for."""

    @cache
    def launched(kind: str) -> Any:
        configuration = CONFIGURATIONS / KINDS[kind]
        return two_processes.run(in_processes, folders[kind], configuration=configuration)

    return launched


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The logs and parameters of each method in one process."""

    @cache
    def train(name: str) -> Any:
        folder = tmp_path_factory.mktemp("one")
        return in_processes.train(folder, 4, **in_processes.RUNS[name])

    return train


def same(a: Any, b: Any) -> Any:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_two_processes_train_as_one_does(two: Any, one: Any, kind: Any, name: Any) -> None:
    """Losses, gradient norms, the levels' metrics, and every parameter at the end."""
    expected_logs, expected = one(name)
    tolerance = ROUNDING.get(name, 1e-12)
    for result in two(kind):
        logs, values = result[name]
        for key, value in expected.items():
            assert (values[key] - value).norm() < tolerance * value.norm(), key
        assert len(logs) == len(expected_logs)
        for log, other in zip(logs, expected_logs, strict=True):
            for key in [key for key in other if not key.endswith(TIMES)]:
                # The Trainer adds losses up in float32.
                near = max(tolerance, 1e-6) if key in ("loss", "train_loss") else tolerance
                assert log[key] == pytest.approx(other[key], rel=near), key
    assert same(two(kind)[0][name][1], two(kind)[1][name][1])


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_what_is_saved_is_a_plain_adapter(two: Any, folders: Any, kind: Any, name: Any) -> None:
    """Whole, and once."""
    trained = two(kind)[0][name][1]
    plain = models.base_model(dropout=0.0).double()
    loaded = PeftModel.from_pretrained(plain, folders[kind] / name / "adapter", is_trainable=True)
    assert same(models.values(loaded), trained)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_resume_from_a_checkpoint_that_is_written_once(
    two: Any, folders: Any, kind: Any
) -> None:
    """With the random states of both; the best model comes back at the end."""
    for result in two(kind):
        (logs, values), (logs_resumed, values_resumed) = result["saved"], result["resumed"]
        assert same(values, values_resumed)
        assert [log for log in logs if "loss" in log] == [x for x in logs_resumed if "loss" in x]
    files = [path.name for path in (folders[kind] / "saved" / "checkpoint-4").iterdir()]
    assert {f for f in files if "rng" in f} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert not [f for f in files if f.endswith(".part")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_on_one_process_stops_both(two: Any, kind: Any) -> None:
    for result in two(kind):
        assert "step 4 (epoch 0.75, 1 micro-batches)" in result["stopped"]
        assert "the loss is nan" in result["stopped"]


def test_what_shards_cannot_do_is_refused(two: Any) -> None:
    """Before anything is trained."""
    for result in two("fsdp"):
        refused = result["refused"]
        assert 'choose product="difference"' in refused["cg"]
        assert "reads parameters outside" in refused["gamma"]
        assert "bf16 does not go with FSDP2" in refused["bf16"]
        assert "fsdp_version" in refused["version"]
        assert "FULL_STATE_DICT" in refused["state"]
