"""The patch proposed to TRL, in docs/upstream/trl_row_weights, on a copy of the installed TRL."""

import importlib.util
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch

trl = pytest.importorskip("trl")
if version("trl") != "1.16.0":
    pytest.skip("the patch is for trl 1.16.0", allow_module_level=True)
FOLDER = Path(__file__).parents[2] / "docs" / "upstream" / "trl_row_weights"
NAME = "trl.trainer.sft_trainer"


def load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    return module


def patched() -> ModuleType:
    """TRL's module of `SFTTrainer` with the patch, beside the installed one."""
    relative = Path("trl") / "trainer" / "sft_trainer.py"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / relative
        copy.parent.mkdir(parents=True)
        copy.write_text((Path(trl.__file__).parents[1] / relative).read_text())
        command = ["git", "apply", str(FOLDER / "trl-1.16.0.patch")]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return load(NAME, copy)


installed, weighted = trl.SFTTrainer, patched()
with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, NAME, weighted)
    patch.setattr(trl, "SFTTrainer", weighted.SFTTrainer)
    proposed = load("test_loss_weights", FOLDER / "test_loss_weights.py")
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
    from tests.support import two_processes, weighted_rows_in_processes

    launcher = ["torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    results = two_processes.run(launcher, "weighted_rows_in_processes.py", tmp_path)
    expected = weighted_rows_in_processes.train(tmp_path, 2)
    for result in results:
        torch.testing.assert_close(result, expected)
