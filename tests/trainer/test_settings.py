"""A checkpoint knows every setting that changes a run's result, and its data, in both phases."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import TrainingArguments, default_data_collator

from hyperopt_peft import Method, ProblemError
from hyperopt_peft.trainer.arguments import RESUME_MUST_MATCH
from hyperopt_peft.trainer.fingerprint import FINGERPRINT_ROWS, data_fingerprint
from tests.support.methods import method_trainer
from tests.support.networks import differences
from tests.support.resume import Stop, StopAt, saving
from tests.support.trainers import data, peft_model

# What a run is watched, kept, spread and sped up by.
FREE = """activation_checkpointing activation_checkpointing_kwargs auto_find_batch_size
batch_eval_metrics bf16_full_eval dataloader_in_order dataloader_multiprocessing_context
dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm
do_eval do_predict do_train enable_jit_checkpoint eval_accumulation_steps eval_delay
eval_do_concat_batches eval_on_start eval_steps eval_strategy eval_use_gather_object
fp16 fp16_full_eval fsdp fsdp_config gradient_checkpointing
gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id
hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip
include_for_metrics include_num_input_tokens_seen load_best_model_at_end local_rank
log_level log_level_replica log_on_each_node logging_dir logging_first_step
logging_nan_inf_filter logging_steps logging_strategy metric_for_best_model output_dir
parallelism_config per_device_eval_batch_size prediction_loss_only project push_to_hub
report_to restore_callback_states_from_checkpoint resume_from_checkpoint run_name
save_on_each_node save_only_model save_steps save_strategy save_total_limit
skip_memory_metrics torch_compile torch_compile_backend torch_compile_mode
torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id
use_cache use_cpu""".split()  # noqa: SIM905


def test_each_argument_of_the_trainer_is_decisive_or_free() -> None:
    known = {field.name for field in fields(TrainingArguments)}
    assert not known - {*RESUME_MUST_MATCH, *FREE}
    assert not set(RESUME_MUST_MATCH) & set(FREE)


def permuted(table: Dataset) -> Dataset:
    """The same rows with the labels of others."""
    labels = table["labels"][:]
    labels[0], labels[1] = labels[1], labels[0]
    feature = table.features["labels"]
    return table.remove_columns("labels").add_column("labels", labels, feature=feature)


def shorter(table: Dataset) -> Dataset:
    """The same rows with fewer tokens, as with a lower ``max_length``."""
    return table.map(lambda row: {k: row[k][:5] for k in ("input_ids", "attention_mask")})


def other_base() -> Any:
    """The model on frozen weights of the same shapes, one of which has one other entry."""
    model = peft_model()
    with torch.no_grad():
        model.get_parameter("base_model.model.bert.embeddings.word_embeddings.weight")[0, 0] += 1
    return model


class Indexed(torch.utils.data.Dataset):
    """Numbers, with noise of their own, or of the global generators."""

    def __init__(self, rows: Any, noise: Any = np.random) -> None:
        self.rows, self.noise, self.reads = rows, noise, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        self.reads += 1
        return {"x": torch.tensor(self.rows[row]) + torch.rand(2), "y": self.noise.normal()}


class Weighted(Method):
    """No dataclass: an upper variable, options as attributes, and a count that changes."""

    def __init__(self, k: int = 1, kind: Any = torch.sigmoid) -> None:
        self.k, self.kind, self.steps = k, kind, 0

    def prepare(self, model: Any) -> None:
        self.factor = torch.ones(1, requires_grad=True)

    def upper_variables(self, model: Any) -> Any:
        return {"factor": self.factor}

    def lower_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
        self.steps += 1
        return task_loss(batch) * self.kind(self.factor * self.k).sum()


class Collator:
    def __init__(self, multiple: int = 1) -> None:
        self.multiple = multiple

    def __call__(self, rows: Any) -> Any:
        return default_data_collator(rows)


class Another(Collator):
    pass


@pytest.mark.parametrize("phase", ["search", "retrain"])
def test_options_and_a_collator_of_any_class_are_settings(tmp_path: Path, phase: str) -> None:
    """They are read before the method changes itself in training."""
    settings = {"retrain": "warm", "save_strategy": "steps", "save_steps": 1}

    def made(callbacks: Any = (), collator: Any = None, **own: Any) -> Any:
        options = {"data_collator": collator or Collator()}
        method = Weighted(**own)
        return method_trainer(tmp_path, callbacks, method=method, options=options, **settings)

    with pytest.raises(Stop):
        made(callbacks=[StopAt(3, phase)]).train()
    others = [{"k": 5}, {"kind": torch.exp}, {"collator": Another()}, {"collator": Collator(2)}]
    for other in others:
        with pytest.raises(ProblemError, match="resume with the same settings"):
            made(**other).train(resume_from_checkpoint=True)
    made().train(resume_from_checkpoint=True)


RETRAINING = {"learning_rate": 0.5}
OTHER: dict[str, dict[str, Any]] = {
    "hypergradient": {"hypergradient": "cg:steps=3"},
    "upper_prior": {"upper_prior": 0.5},
    "max_steps": {"max_steps": 300},
    "learning_rate": {"learning_rate": 0.5},
    "gamma": {"gamma": 0.5},
    "fast_dora": {"fast_dora": False},
    "train_dataset": {"options": {"train_dataset": permuted(data())}},
    "lower.": {"model": peft_model(modules_to_save=["classifier", "pooler"])},
    "frozen weights of the model": {"model": other_base()},
    "lora_alpha": {"model": peft_model(lora_alpha=8)},
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs that were stopped in the search and in the retraining."""
    folders = {}
    for phase in ("search", "retrain"):
        folders[phase] = tmp_path_factory.mktemp(phase)
        made = saving(folders[phase], [StopAt(4, phase)], retrain="warm")
        with pytest.raises(Stop):
            made.train()
    return folders


IN_RETRAINING = ("gamma", "train_dataset", "retrain_arguments")


@pytest.mark.parametrize(
    ("phase", "name"),
    [*(("search", name) for name in OTHER), *(("retrain", name) for name in IN_RETRAINING)],
)
def test_a_run_of_other_settings_is_not_resumed(
    broken: dict[str, Path], phase: str, name: str
) -> None:
    given = {"retrain_arguments": RETRAINING} if name == "retrain_arguments" else OTHER[name]
    made = saving(broken[phase], **{"retrain": "warm", **given})
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    with pytest.raises(ProblemError, match=name) as found:
        made.train(resume_from_checkpoint=True)
    assert len(str(found.value)) < 700  # the first difference, not all of them
    assert not differences(dict(made.model.named_parameters()), before)


def test_what_takes_effect_at_once_or_later_may_change(
    broken: dict[str, Path], tmp_path: Path
) -> None:
    changed = {"non_finite": "skip", "save_steps": 1, "retrain_arguments": RETRAINING}
    made = saving(tmp_path, logging_steps=1, retrain="warm", **changed)
    made.train(resume_from_checkpoint=str(broken["search"] / "checkpoint-3"))
    assert made.state.global_step == 9


def test_a_resumed_run_may_read_the_epoch_again(tmp_path: Path) -> None:
    """`ignore_data_skip`: from a checkpoint within an epoch, its first batch comes next."""
    with pytest.raises(Stop):
        saving(tmp_path, [StopAt(4)]).train()
    first, batches = {}, {}
    for skip in (False, True):
        made = saving(tmp_path, ignore_data_skip=skip)
        seen = batches[skip] = []
        loss = made.lower.task_loss
        made.lower.task_loss = lambda batch, seen=seen, loss=loss: seen.append(batch) or loss(batch)
        first[skip] = next(iter(made.get_train_dataloader()))["input_ids"]
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert made.state.global_step == 9
    assert torch.equal(batches[True][0]["input_ids"], first[True])
    assert not torch.equal(batches[False][0]["input_ids"], first[False])


def test_a_fingerprint_is_of_contents_and_order() -> None:
    """Whatever the format, the file or the memory that holds the rows; of many, of some of them."""
    table = data()
    expected = data_fingerprint(table)
    parts = concatenate_datasets([table.select(range(5)), table.select(range(5, 24))])
    again = Dataset.from_list(table.to_list(), features=table.features)
    for same in (parts, again, table.with_format("torch"), table.select(list(range(24)))):
        assert data_fingerprint(same) == expected
    for other in (permuted(table), shorter(table), table.shuffle(seed=0), table.select(range(23))):
        assert data_fingerprint(other) != expected
    rows = [{"x": torch.ones(2), "label": k} for k in range(3)]
    assert data_fingerprint(rows) == data_fingerprint([dict(row) for row in rows])
    assert data_fingerprint(rows) != data_fingerprint(rows[::-1])
    few, others = Indexed(range(20)), Indexed(range(1, 21))
    assert data_fingerprint(few) == data_fingerprint(Indexed(range(20))) != data_fingerprint(others)
    assert data_fingerprint(Indexed(range(3), noise=np.random.default_rng(0))) == 3
    long = Indexed(range(1000))
    assert data_fingerprint(long) != data_fingerprint(few) and long.reads < 30
    assert data_fingerprint(range(3)) == 3 and data_fingerprint(iter(rows)) is None
    many = Dataset.from_dict({"x": torch.arange(FINGERPRINT_ROWS + 5).tolist()})
    assert data_fingerprint(many) != data_fingerprint(many.select(range(len(many))[::-1]))
    assert data_fingerprint(many) != data_fingerprint(many.select(range(len(many) - 1)))
