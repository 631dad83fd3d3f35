"""A checkpoint knows every setting that changes a run's result, and its data, in both phases."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import TrainingArguments

from hyperopt_peft import ProblemError
from hyperopt_peft.trainer.arguments import RESUME_MUST_MATCH
from hyperopt_peft.trainer.fingerprint import FINGERPRINT_ROWS, data_fingerprint
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
    assert known <= {*RESUME_MUST_MATCH, *FREE} and not set(RESUME_MUST_MATCH) & set(FREE)


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


OTHER: dict[str, dict[str, Any]] = {
    "hypergradient": {"hypergradient": "cg:steps=3"},
    "upper_fraction": {"upper_fraction": 0.3},
    "max_steps": {"max_steps": 300},
    "lr_scheduler_type": {"lr_scheduler_type": "constant"},
    "warmup_steps": {"warmup_steps": 2},
    "lower_steps": {"lower_steps": 3},
    "seed": {"seed": 4},
    "data_seed": {"data_seed": 4},
    "optim": {"optim": "sgd"},
    "adam_beta1": {"adam_beta1": 0.5},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "per_device_upper_batch_size": {"per_device_upper_batch_size": 3},
    "learning_rate": {"learning_rate": 0.5},
    "weight_decay": {"weight_decay": 0.5},
    "max_grad_norm": {"max_grad_norm": 0.5},
    "upper_max_grad_norm": {"upper_max_grad_norm": 0.5},
    "upper_learning_rate": {"upper_learning_rate": 0.5},
    "upper_weight_decay": {"upper_weight_decay": 0.5},
    "upper_prior": {"upper_prior": 0.5},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "gamma": {"gamma": 0.5},
    "norm_grad": {"norm_grad": "detach"},
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


def refuses_to_resume(folder: Path, name: str, **settings: Any) -> None:
    made = saving(folder, **{"retrain": "warm", **settings})
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    with pytest.raises(ProblemError, match=name) as found:
        made.train(resume_from_checkpoint=True)
    assert len(str(found.value)) < 700  # the first difference, not all of them
    assert not differences(dict(made.model.named_parameters()), before)


@pytest.mark.parametrize(
    ("phase", "name"),
    [*(("search", name) for name in OTHER), ("retrain", "gamma"), ("retrain", "train_dataset")],
)
def test_a_run_of_other_settings_is_not_resumed(
    broken: dict[str, Path], phase: str, name: str
) -> None:
    refuses_to_resume(broken[phase], name, **OTHER[name])


def test_the_retraining_is_what_it_was_begun_as(broken: dict[str, Path], tmp_path: Path) -> None:
    """Before its begin it may change."""
    settings = {"retrain_arguments": {"learning_rate": 0.5}, "retrain": "warm"}
    refuses_to_resume(broken["retrain"], "retrain_arguments", **settings)
    resumed = saving(tmp_path, **settings)
    assert "retrain_arguments" not in resumed.settings()


def test_what_takes_effect_at_once_may_change(broken: dict[str, Path], tmp_path: Path) -> None:
    made = saving(tmp_path, non_finite="skip", save_steps=1, logging_steps=1, retrain="warm")
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
    """Whatever the format, the file or the memory that holds the rows."""
    table = data()
    expected = data_fingerprint(table)
    parts = concatenate_datasets([table.select(range(5)), table.select(range(5, 24))])
    again = Dataset.from_list(table.to_list(), features=table.features)
    for same in (parts, again, table.with_format("torch"), table.select(list(range(24)))):
        assert data_fingerprint(same) == expected
    for other in (permuted(table), shorter(table), table.shuffle(seed=0), table.select(range(23))):
        assert data_fingerprint(other) != expected


def test_a_fingerprint_of_lists_is_of_contents_too() -> None:
    rows = [{"x": torch.ones(2), "label": k} for k in range(3)]
    assert data_fingerprint(rows) == data_fingerprint([dict(row) for row in rows])
    assert data_fingerprint(rows) != data_fingerprint(rows[::-1])
    assert data_fingerprint(range(3)) == 3 and data_fingerprint(iter(rows)) is None


def test_a_fingerprint_of_many_rows_reads_some_of_them() -> None:
    many = Dataset.from_dict({"x": torch.arange(FINGERPRINT_ROWS + 5).tolist()})
    assert data_fingerprint(many) != data_fingerprint(many.select(range(len(many))[::-1]))
    assert data_fingerprint(many) != data_fingerprint(many.select(range(len(many) - 1)))
