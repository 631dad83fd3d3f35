"""The method of docs/define-a-method.md, as a file and in a distribution, everywhere it can run."""

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, Engine, ProblemError
from hyperopt_peft.comparison import find_method
from hyperopt_peft.hypergradients import get_estimator, registered, registry
from hyperopt_peft.method import Method
from tests.support.adapted_models import randomise
from tests.support.cli import run, small_run
from tests.support.comparisons import compared
from tests.support.files import rows, write
from tests.support.trainers import base_model, data, peft_model

PAGE = (Path(__file__).parents[2] / "docs/define-a-method.md").read_text()
(SOURCE,) = re.findall(r"```python\n# scaled_rows.py\n(.*?)```", PAGE, re.S)
ESTIMATOR = """
from hyperopt_peft.hypergradients import DARTS, register
@register("plain", kind="identity")
class Plain(DARTS):
    pass
"""
POINTS = """
[hyperopt_peft.methods]
scaled_rows = scaled_rows:ScaledRows
broken = no_such_module:Method
other = dataclasses:dataclass
[hyperopt_peft.estimators]
plain = plain_estimator:Plain
"""
ARGUMENTS: dict[str, Any] = {"report_to": "none", "use_cpu": True, "max_steps": 4}
ARGUMENTS |= {"per_device_train_batch_size": 4, "disable_tqdm": True}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution: modules and metadata in a folder of ``sys.path``."""
    site = tmp_path / "site"
    info = site / "scaled_rows-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scaled-rows\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    (site / "scaled_rows.py").write_text(SOURCE)
    (site / "plain_estimator.py").write_text(ESTIMATOR)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    for name in ("scaled_rows", "plain_estimator"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return site


def require_plain(folder: Path, model: Any, base: Any, batch: dict[str, Any]) -> None:
    """PEFT alone computes the logits of ``model`` from what it saves to ``folder``."""
    assert not any("parametrizations" in name for name, _ in model.named_parameters())
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, folder).eval()
    torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits)


def test_engine_and_trainer_leave_a_plain_adapter(folder: Path, tmp_path: Path) -> None:
    made, train, upper = find_method("scaled_rows"), data(), data(rows=8, seed=1)
    batch = default_data_collator(list(train.select(range(4))))
    for way in ("engine", "trainer"):
        model, method = randomise(peft_model(dora=False)), made(decay=0.1)
        if way == "engine":
            method.rows(train, upper)
            numbered = train.add_column("index", list(range(len(train))))
            batches = [
                DataLoader(x, 4, collate_fn=default_data_collator) for x in (upper, numbered)
            ]
            sgd = partial(torch.optim.SGD, lr=0.1)
            levels = method.levels(model, data=batches, optimizers=[sgd, sgd])
            Engine(*levels, "plain", lower_steps=2, progress=False).run(2)
            model = method.finish(model)
        else:
            args = BilevelTrainingArguments(str(tmp_path), **ARGUMENTS, learning_rate=0.1)
            rows_of = {"train_dataset": train, "upper_dataset": upper}
            trained = BilevelTrainer(model, args, method=method, **rows_of)
            trained.train()
            model = trained.model
            assert trained.retrainer.state.global_step == 4
        assert method.logits.detach().abs().max() > 0
        require_plain(tmp_path / way, model, base_model(), batch)


def test_command_line_and_comparison(folder: Path, tmp_path: Path) -> None:
    trusted = write(tmp_path / "trusted.jsonl", rows(number=8, seed=5))
    options = small_run(tmp_path, method="scaled_rows", decay=0.2, upper_file=trusted)
    run("train", **options, hypergradient="plain")
    del options["method"]
    file = f"{folder}/scaled_rows.py:ScaledRows"
    options |= {"methods": ["lora", file], "output_dir": tmp_path / "2", "seeds": [0, 1]}
    run("compare", **options, passes=40, rates=3e-2, upper_rates=1e-2)
    assert len(compared({"LoRA": "lora", "mine": "scaled_rows"}, passes=40).scores()["mine"]) == 2


def test_names_of_distributions(folder: Path) -> None:
    assert registered()["plain"].kind == "identity"
    for name, words in [
        ("broken", "'broken' of scaled-rows cannot be imported: ModuleNotFoundError"),
        ("other", "'other' of scaled-rows: dataclasses:dataclass is no Method"),
        ("scaled_row", "unknown 'scaled_row'; did you mean 'scaled_rows'"),
    ]:
        with pytest.raises(ProblemError, match=words):
            find_method(name)
    with (folder / "scaled_rows-1.0.dist-info/entry_points.txt").open("a") as file:
        file.write("misnamed = plain_estimator:Plain\n")
        file.write("[hyperopt_peft.methods]\nlora = scaled_rows:ScaledRows\n")
    with pytest.raises(ProblemError, match=r"'misnamed': Plain needs @register\('misnamed', kind="):
        get_estimator("misnamed")
    with pytest.warns(UserWarning, match="'lora' is the library's"):
        assert find_method("lora").__name__ == "LoRA"
    assert "decay: of all that the lower level trains." in str(find_method("scaled_rows").__doc__)


@pytest.mark.parametrize("name", ["lowerloss", "lower_Loss", "upper_variable", "default", "tag"])
def test_a_name_close_to_a_hook_s_is_refused(name: str) -> None:
    with pytest.raises(ProblemError, match=rf"Mine.{name}: is close to the hook \w+, and no hook"):
        type("Mine", (Method,), {name: lambda self: None})
    type("Mine", (Method,), {"__annotations__": {"rank": int, "row": int}, "rank": 1, "row": 2})
