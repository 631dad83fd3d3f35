"""The patch proposed to TRL on a copy of the installed TRL."""

from pathlib import Path

import pytest
import torch
from patched_trainer import installed, proposed
from two_processes_step import train

from tests.support import two_processes

#: The tests that are proposed with the patch, with the patched trainer.
TestLossWeights = proposed.TestLossWeights


@pytest.mark.parametrize("layout", proposed.LAYOUTS)
def test_equals_the_installed_trainer(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, without weights; the proposed tests compare weights of 1 with that."""
    case = TestLossWeights()
    case.tmp_dir = str(tmp_path)
    loss, parameters = case.step(proposed.make_dataset(), **proposed.LAYOUTS[layout])
    monkeypatch.setattr(proposed, "SFTTrainer", installed)
    expected = case.step(proposed.make_dataset(), **proposed.LAYOUTS[layout])
    assert torch.equal(loss, expected[0]) and torch.equal(parameters, expected[1])


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """The weights of both are summed, so that it does not matter which process has a row."""
    launcher = ["torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    results = two_processes.run(
        launcher, Path(__file__).with_name("two_processes_step.py"), tmp_path
    )
    expected = train(tmp_path, 2)
    for result in results:
        torch.testing.assert_close(result, expected)
