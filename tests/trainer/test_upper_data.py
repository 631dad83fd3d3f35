"""How the training set is divided, and the upper level's batches by number."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from hyperopt_peft import ProblemError, split_dataset
from hyperopt_peft.problems import ClassOffsets, LayerScales
from hyperopt_peft.trainer.data import require_apart, warn_of_repeated_rows
from hyperopt_peft.trainer.splits import reads_of, shared_rows
from hyperopt_peft.trainer.upper_batches import FULL, UpperBatches
from tests.support.methods import FullBatch, method_trainer
from tests.support.trainers import data, peft_model, ragged, trainer

N = 40


def table(labels: Any, feature: Any = None, name: Any = "labels") -> Any:
    """Rows that are told apart by ``row``."""
    columns = {"row": list(range(len(labels))), name: labels}
    features = Features({"row": Value("int64"), name: feature or Value("int64")})
    return Dataset.from_dict(columns, features=features)


def classes(counts: Any) -> Any:
    """As many rows of each class as ``counts`` says, the last class first."""
    labels = [c for c, count in reversed(list(enumerate(counts))) for _ in range(count)]
    names = [f"class {c}" for c in range(len(counts))]
    return table(labels, ClassLabel(names=names))


COUNTS = st.lists(st.integers(10, 40), min_size=2, max_size=4)


@given(counts=COUNTS, share=st.floats(0.2, 0.8), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_classes_have_their_shares_in_both_parts(counts: Any, share: Any, seed: Any) -> None:
    """To one example a class; no row is lost or doubled."""
    data = classes(counts)
    lower, upper = split_dataset(data, share, seed)
    assert sorted([*lower["row"], *upper["row"]]) == data["row"][:]
    found = Counter(upper["labels"])
    for c, count in enumerate(counts):
        assert abs(found[c] - len(upper) * count / len(data)) < 1
    assert len(upper) == -int(-share * len(data) // 1)


def require_split_as(expected: Any, data: Any, seed: int, **options: Any) -> None:
    split = expected.train_test_split(0.25, seed=seed, **options)
    for ours, theirs in zip(split_dataset(data, 0.25, seed), split.values(), strict=True):
        assert ours["row"][:] == theirs["row"][:]


def test_whole_numbers_that_come_again_are_classes() -> None:
    """They are divided as the same classes with names, whatever the numbers, by the seed."""
    named = table([(1, 0, 2)[row % 3] for row in range(N)], ClassLabel(names=["a", "b", "c"]))
    labels = [(7, -3, 100)[row % 3] for row in range(N)]
    for name, seed in (("label", 0), ("labels", 0), ("labels", 1)):
        require_split_as(named, table(labels, name=name), seed, stratify_by_column="labels")


@pytest.mark.parametrize(
    "data",
    [
        table([x / N for x in range(N)], Value("float32")),
        table(list(range(N))),
        table([x % 2 for x in range(N)], name="target"),
        table(["ab"[x % 2] for x in range(N)], Value("string")),
    ],
    ids=["regression", "counts", "no label", "text"],
)
def test_what_holds_no_classes_is_shuffled(data: Any) -> None:
    require_split_as(data, data, 3)


@pytest.mark.parametrize("kind", [None, "torch", "arrow"])
def test_examples_of_both_levels_are_counted(kind: str | None) -> None:
    """In any format, and told apart by what the formats round."""
    values = [[1 + x * 1e-9, 0.0] for x in range(60)]
    data = Dataset.from_dict({"x": values, "id": list(range(60))})
    lower = data.select(range(30)).with_format(kind)
    require_apart(lower, Dataset.from_dict({"x": values[30:]}), None)
    again = {"id": list(range(27, 60)), "x": values[27:]}  # with columns in another order
    with pytest.raises(ProblemError, match="3 of 33 examples"):
        require_apart(lower, Dataset.from_dict(again), None)


def test_sets_that_share_rows_with_the_evaluation_set_in_part_are_apart(caplog: Any) -> None:
    """Data sets repeat themselves: only if one set lies in the other one it is refused."""
    data = table(list(range(N)))
    lower, upper = data.select(range(20)), data.select(range(20, 30))
    for evaluation in (None, {"a": None}, [1, 2], data.select(range(30, N))):
        require_apart(lower, upper, evaluation)
    assert not caplog.text
    require_apart(lower, upper, data.select(range(21, N)))
    assert "9 examples are in upper_dataset too" in caplog.text
    for numbers in (range(20, N), range(20, 30), range(22, 25)):
        with pytest.raises(ProblemError, match="eval_dataset is given as the upper level's data"):
            require_apart(lower, upper, {"a": data.select(numbers)})


def glue(kind: str = "classes", rows: int = 24, begin: int = 0, **options: Any) -> Any:
    """Rows with a number and a name of their own, which no model reads."""
    rows_of = data(kind, rows, **options)
    numbers = range(begin, begin + rows)
    return rows_of.add_column("idx", [*numbers]).add_column("guid", [f"dev-{k}" for k in numbers])


def test_rows_are_told_apart_by_what_the_model_reads(tmp_path: Path) -> None:
    """With all columns the collator may read any of them, so that all count."""
    again = glue(begin=100).select(range(3, 9))
    held_out = glue(rows=6, seed=1)
    cases = [
        ({"upper_dataset": again}, "6 of 6 examples of upper_dataset are in train_dataset"),
        ({"upper_dataset": held_out, "eval_dataset": glue(rows=6, begin=50, seed=1)}, "eval_data"),
    ]
    for sets, message in cases:
        for method in ("lora", "bidora"):
            options = {"train_dataset": glue(), **sets}
            with pytest.raises(ProblemError, match=message):
                trainer(tmp_path, method=method, options=options)
    options = {"train_dataset": glue(), "upper_dataset": again}
    trainer(tmp_path, options=options, remove_unused_columns=False)


def test_texts_that_a_parent_prepares_are_told_apart_by_their_text() -> None:
    reads = reads_of("a name", SimpleNamespace(remove_unused_columns=True, label_names=None))
    texts = {"text": ["a", "b", "b"], "label": [0, 1, 0]}
    one, other = (Dataset.from_dict({**texts, "idx": range(k, k + 3)}) for k in (0, 7))
    assert shared_rows(one, other.select([1]), reads) == [1]
    assert shared_rows(one, other.select([1])) == []


def test_copies_of_a_row_are_in_one_level(tmp_path: Path) -> None:
    """Each row three times, with numbers of its own; without copies the split is as ever."""
    rows, copies = glue(), [glue(begin=100 * k) for k in (1, 2)]
    run = trainer(tmp_path, options={"train_dataset": concatenate_datasets([rows, *copies])})
    sides = [[tuple(ids) for ids in x["input_ids"]] for x in (run.train_dataset, run.upper_dataset)]
    assert not {*sides[0]} & {*sides[1]}
    assert sorted(map(len, sides)) == sorted([3 * len({*side}) for side in sides])
    alone = trainer(tmp_path, options={"train_dataset": rows})
    for side, once in zip(sides, (alone.train_dataset, alone.upper_dataset), strict=True):
        assert side[: len(once)] == [tuple(ids) for ids in once["input_ids"]]


SIZES = {"rows": st.integers(1, 25), "size": st.integers(1, 9), "seed": st.integers(0, 2**31)}


@given(**SIZES, numbers=st.lists(st.integers(0, 200), min_size=1, max_size=6))
@settings(max_examples=30)
def test_a_batch_is_a_function_of_its_number(rows: Any, size: Any, seed: Any, numbers: Any) -> None:
    """Asked for in any order, whatever the random state; none is drawn from it."""
    one = UpperBatches(range(rows), size, seed=seed, collate=list)
    expected = {number: one.batch(number) for number in sorted(numbers)}
    state = torch.get_rng_state()
    torch.rand(3)
    other = UpperBatches(range(rows), size, seed=seed, collate=list)
    moved = torch.get_rng_state()
    assert [other.batch(number) for number in numbers] == [expected[n] for n in numbers]
    assert torch.equal(torch.get_rng_state(), moved)
    torch.set_rng_state(state)


@given(**SIZES, epoch=st.integers(0, 50))
@settings(max_examples=30)
def test_an_epoch_has_no_example_twice(rows: Any, size: Any, seed: Any, epoch: Any) -> None:
    """Each once where the batches divide the examples; otherwise a smaller last one is left out."""
    batches = UpperBatches(range(rows), size, seed=seed, collate=list)
    count = batches.per_epoch
    drawn = [x for number in range(count) for x in batches.batch(epoch * count + number)]
    assert len(set(drawn)) == len(drawn) == count * min(size, rows)
    assert len(drawn) > rows - size
    if rows % size == 0:
        assert sorted(drawn) == list(range(rows))


@given(**SIZES, processes=st.integers(1, 4), number=st.integers(0, 50))
@settings(max_examples=30)
def test_the_shares_of_processes_make_the_batch_of_one(
    rows: Any, size: Any, seed: Any, processes: Any, number: Any
) -> None:
    options = {"seed": seed, "collate": list, "processes": processes}
    if rows < processes:
        with pytest.raises(ProblemError, match=f"{rows} examples for {processes} processes"):
            UpperBatches(range(rows), size, **options)
        return
    shares = [UpperBatches(range(rows), size, rank=rank, **options) for rank in range(processes)]
    assert len({len(share.batch(number)) for share in shares}) == 1
    together = [x for share in shares for x in share.batch(number)]
    whole = UpperBatches(range(rows), shares[0].size * processes, seed=seed, collate=list)
    assert together == whole.batch(number)


def test_workers_make_the_batches_of_one_process() -> None:
    """Random numbers of a collator included, and none are drawn from the training stream."""

    def collate(found: Any) -> Any:
        return torch.tensor(found), torch.rand(3)

    one = UpperBatches(range(23), 4, seed=1, collate=collate)
    several = UpperBatches(range(23), 4, seed=1, collate=collate, num_workers=2)
    state = torch.get_rng_state()
    for number in (0, 1, 2, 7, 8, 3):
        for part, other in zip(several.batch(number), one.batch(number), strict=True):
            assert torch.equal(part, other)
    several.close()
    assert torch.equal(torch.get_rng_state(), state)


@given(**SIZES, processes=st.integers(1, 4), number=st.integers(0, 20))
@settings(max_examples=60)
def test_a_whole_batch_is_every_example_once(
    rows: Any, size: Any, seed: Any, processes: Any, number: Any
) -> None:
    """In equally many pieces on each process, whose weights make the mean over examples."""
    rows += processes
    options = {"seed": seed, "collate": list, "full": True, "processes": processes}
    shares = [
        UpperBatches(range(rows), size, rank=rank, **options).pieces(number)
        for rank in range(processes)
    ]
    pieces = [piece for share in shares for piece in share]
    assert sorted(x for rows_of, _ in pieces for x in rows_of) == list(range(rows))
    assert len(set(map(len, shares))) == 1
    lengths = {len(rows_of) for rows_of, _ in pieces}
    assert min(lengths) > 0 and max(lengths) - min(lengths) <= 1
    assert max(lengths) <= size or size == 1 < processes  # no process is without an example
    mean = sum(weight * sum(part) / len(part) for part, weight in pieces) / len(pieces)
    assert mean == pytest.approx((rows - 1) / 2)
    assert sum(weight for _, weight in pieces) == pytest.approx(len(pieces))


@pytest.mark.parametrize(
    ("size", "count", "drop", "words"),
    [
        (2, 2, False, "1 rows are repeated"),
        (1, 5, False, "2 rows are repeated"),
        (1, 23, False, ""),
        (2, 2, True, ""),
    ],
)
def test_rows_that_processes_repeat_are_warned_of(
    size: int, count: int, drop: bool, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 23 rows, as `accelerate.data_loader.BatchSamplerShard` gives them out."""
    settings = {"train_batch_size": size, "world_size": count, "dataloader_drop_last": drop}
    warn_of_repeated_rows(range(23), SimpleNamespace(should_log=True, **settings))
    assert words in caplog.text and bool(words) == bool(caplog.text)
    sampler = BatchSampler(range(23), size, drop)
    given_out = sum(len(x) for k in range(count) for x in BatchSamplerShard(sampler, count, k))
    assert (given_out > 23) == bool(words)


@pytest.mark.parametrize("kind", ["tokens", "causal"])
def test_a_label_counts_the_same_in_each_piece(tmp_path: Path, kind: str) -> None:
    losses = []
    for size, count in ((None, 3), (9, 1)):
        settings = {"per_device_upper_batch_size": size, "hypergradient": "direct"}
        model, options = peft_model(kind, dropout=0.0), {"train_dataset": ragged(kind, 45)}
        options["method"] = FullBatch()
        run = trainer(tmp_path / str(size), model=model.double(), options=options, **settings)
        assert run.upper_batches.count == count
        run.train()
        logs = run.state.log_history
        losses.append([record["upper_loss"] for record in logs if "upper_loss" in record])
    # The loss of a language model is computed in float32.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_pieces_have_masks_of_their_own_that_differ_from_step_to_step(tmp_path: Path) -> None:
    """At rates of zero, with dropout, and with equal rows."""
    row = data(rows=1)
    equal = {name: row[name][:] * 6 for name in row.column_names}
    upper = type(row).from_dict(equal, features=row.features)
    settings = {"learning_rate": 0.0, "upper_learning_rate": 0.0, "weight_decay": 0.0}
    settings |= {"per_device_train_batch_size": 2, "lower_steps": 1, "max_steps": 3}
    options = {"train_dataset": data(seed=4), "upper_dataset": upper, "method": FullBatch()}
    run, seen = trainer(tmp_path, options=options, hypergradient="direct", **settings), []
    loss = run.upper.task_loss
    run.upper.task_loss = lambda batch: seen.append(loss(batch)) or seen[-1]
    run.train()
    assert len(seen) == 9 and len({float(x) for x in seen}) == 9


@pytest.mark.parametrize("count", [FULL, FULL + 1])
@pytest.mark.parametrize("full", [False, True])
def test_an_upper_batch_is_as_large_as_a_lower_step(tmp_path: Path, count: int, full: bool) -> None:
    """Or all rows, if they are few and the method asks for them."""
    settings = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
    method = ClassOffsets() if full else LayerScales()
    rows = {"upper_dataset": data(rows=count, seed=1)}
    run = method_trainer(tmp_path, method=method, options=rows, **settings)
    sizes = [len(piece["labels"]) for piece, _ in run.upper_batches.pieces(0)]
    assert sizes == [16] * (FULL // 16 if full and count <= FULL else 2)
    alone = method_trainer(
        tmp_path, method=method, options=rows, per_device_upper_batch_size=4, **settings
    )
    assert [len(piece["labels"]) for piece, _ in alone.upper_batches.pieces(0)] == [4]
