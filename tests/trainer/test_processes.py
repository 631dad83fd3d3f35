"""`BiDoRATrainer` in two processes by ``accelerate launch`` (gloo, float64) is that in one process.

Each of the two has half of every micro-batch, and the one twice as many examples a device.
"""

from pathlib import Path

import pytest
import torch
import two_processes

from trainer import in_processes

CONFIGURATION = Path(__file__).parents[2] / "examples" / "accelerate" / "two_cpu_processes.yaml"
LAUNCHER = ["accelerate.commands.launch", "--config_file", str(CONFIGURATION)]
RUNS = in_processes.RUNS
# By method: the largest relative error; a one-sided difference divides rounding by 1e-8.
ROUNDING = {"darts": 1e-6, "minres": 1e-9, "retrain": 1e-6}
TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder):
    """What each process has of every run: one launch for all of them."""
    return two_processes.run(LAUNCHER, "trainer/in_processes.py", folder)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_does(two, tmp_path, name):
    """Losses, gradient norms, the levels' metrics, and every parameter at the end."""
    expected_logs, expected = in_processes.train(tmp_path, 4, **RUNS[name])
    tolerance = ROUNDING.get(name, 1e-12)
    for result in two:
        logs, values = result[name]
        for key, value in expected.items():
            assert (values[key] - value).norm() < tolerance * value.norm(), key
        assert len(logs) == len(expected_logs)
        for log, other in zip(logs, expected_logs, strict=True):
            for key in other.keys() - TIMES:
                assert log[key] == pytest.approx(other[key], rel=tolerance), key
    assert same(two[0][name][1], two[1][name][1])


def test_a_checkpoint_is_written_once_and_two_processes_resume_from_it(two, folder):
    """With the random states of both."""
    for result in two:
        (logs, values), (logs_resumed, values_resumed) = result["saved"], result["resumed"]
        assert same(values, values_resumed)
        assert [log for log in logs if "loss" in log] == [x for x in logs_resumed if "loss" in x]
    names = sorted(path.name for path in (folder / "saved" / "checkpoint-4").iterdir())
    assert [name for name in names if "rng" in name] == ["rng_state_0.pth", "rng_state_1.pth"]
    assert not [name for name in names if name.endswith(".part")]


def test_a_nan_on_one_process_stops_both(two, folder):
    """After the state before the step was written."""
    for result in two:
        assert "step 4 (epoch 0.75, 1 micro-batches)" in result["stopped"]
        assert "the loss is nan" in result["stopped"]
        assert str(folder / "stopped" / "checkpoint-3") in result["stopped"]
    assert (folder / "stopped" / "checkpoint-3" / "bilevel.json").is_file()
