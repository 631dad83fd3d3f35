"""The installed TRL with the patch, and the tests that are proposed with it."""

import importlib.util
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

trl = pytest.importorskip("trl")
if version("trl") != "1.16.0":
    pytest.skip("the patch is for trl 1.16.0", allow_module_level=True)
FOLDER = Path(__file__).parent
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
