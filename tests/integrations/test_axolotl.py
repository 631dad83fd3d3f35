"""The plug-in for axolotl: its own command trains with a method from a YAML file, on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from hyperopt_peft import ProblemError
from tests.support.language import LETTERS, language_model, tokenizer
from tests.support.process import python

pytest.importorskip("axolotl", reason="axolotl is installed in two sets of the matrix")

PLUGIN = "hyperopt_peft.integrations.axolotl.BilevelPlugin"
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
SETTINGS: dict[str, Any] = {
    **{"adapter": "lora", "lora_r": 2, "lora_alpha": 4, "lora_target_modules": ["q_proj"]},
    **dict.fromkeys((*KERNELS, "bf16", "tf32"), False),
    **{"sequence_len": 32, "special_tokens": {"pad_token": "<pad>"}, "dataset_num_proc": 1},
    **{"max_steps": 4, "micro_batch_size": 4, "gradient_accumulation_steps": 2},
    **{"learning_rate": 1e-2, "optimizer": "adamw_torch", "save_strategy": "no", "use_cpu": True},
    **{"attn_implementation": "sdpa", "val_set_size": 0, "logging_steps": 1, "plugins": [PLUGIN]},
}
#: By method: more keys of the YAML, and the mapping ``bilevel``.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bidora": ({"peft_use_dora": True}, {"gamma": 1e-3, "lower_steps": 2}),
    "row_weights": ({}, {"method": "row_weights", "upper_learning_rate": 0.5, "retrain": "none"}),
}


def rows(path: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    texts = (" ".join(LETTERS[(k + j) % 16] for j in range(3 + k % 5)) for k in range(seed, count))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [{"path": str(path), "ds_type": "json", "type": "completion"}]


@pytest.mark.parametrize("method", RUNS)
def test_a_yaml_trains_with_a_method(tmp_path: Path, method: str) -> None:
    """The folder has an adapter of stock PEFT, the settings and the card."""
    more, bilevel = RUNS[method]
    for each in (tokenizer(), model := language_model()):
        each.save_pretrained(tmp_path / "model")
    if method == "row_weights":
        bilevel = {**bilevel, "upper_datasets": rows(tmp_path / "upper.jsonl", 56, seed=48)}
    run = {
        **SETTINGS,
        **more,
        "bilevel": bilevel,
        "base_model": str(tmp_path / "model"),
        "datasets": rows(tmp_path / "train.jsonl", 40),
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": str(folder := tmp_path / "outputs"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    off = {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = python("-m", "axolotl.cli.train", "run.yaml", folder=tmp_path, **off)
    assert "upper_loss" in done.stdout + done.stderr
    settings = json.loads((folder / "bilevel_settings.json").read_text())
    assert settings.items() >= {k: x for k, x in bilevel.items() if k in settings}.items()
    assert "## Bilevel training" in (folder / "README.md").read_text()
    values = load_file(folder / "adapter_model.safetensors")
    assert all(float(x.abs().max()) > 0 for x in values.values())  # B begins at 0
    if method == "bidora":
        names = [name for name in values if "magnitude" in name]
        assert len(names) == 2 and (folder / "retrain").is_dir()
        for name in names:
            stem = name.removeprefix("base_model.model.").rpartition(".lora_magnitude")[0]
            norms = model.get_parameter(f"{stem}.weight").norm(dim=1)
            assert 0 < float((values[name] - norms).detach().abs().max()) < 0.1
    loaded = PeftModel.from_pretrained(language_model(), folder)
    assert torch.isfinite(loaded(torch.arange(8)[None]).logits).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict.fromkeys(KERNELS, True), f"{', '.join(KERNELS)}: not possible with bilevel"),
        ({"rl": "dpo"}, "rl: not possible"),
        ({"bilevel": {"method": "bidorra"}}, "unknown 'bidorra'; did you mean 'bidora'"),
    ],
)
def test_what_does_not_fit_is_refused(settings: Any, message: str) -> None:
    from axolotl.utils.dict import DictDefault

    from hyperopt_peft.integrations.axolotl import BilevelPlugin

    with pytest.raises(ProblemError, match=message):
        BilevelPlugin().get_trainer_cls(DictDefault({"bilevel": {"method": "lora"}, **settings}))
    assert BilevelPlugin().get_trainer_cls(DictDefault({})) is None
