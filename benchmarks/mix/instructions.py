"""Sources of instructions for a language model: mathematics, code and texts from data.

Each task has a clean source and a damaged one, in which the answers are those of other prompts; for
a target task the sources of the other tasks are irrelevant. The model is SmolLM2-135M, whose last
layers alone are trained: those below are run once for each row, in bfloat16. Its vocabulary is cut
to the tokens of the rows, which makes the head a tenth as dear; losses are of that softmax.
"""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from small_language_models import load
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from hyperopt_peft.core.logits import IGNORED
from hyperopt_peft.trainer.fingerprint import weights_fingerprint

#: Next to the repository; ``--data`` gives another folder.
DATA = Path(__file__).parents[3] / "shared/data"
CACHE = Path(__file__).parents[2] / "outputs/mix"
TASKS = ("math", "code", "e2e")
DAMAGED = "{}, damaged"
#: Settings are chosen on this seed, by rows that no other seed is judged by.
DEVELOPMENT_SEED = 50
#: The trained layers, and the most tokens of a row.
LAYERS, LENGTH = 2, 112
PAD, END = 0, 1
PADDING = {"input_ids": PAD, "labels": IGNORED}
#: A prompt and its answer, as text and as tokens.
Pair = tuple[str, str]
Coded = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Counts:
    """Rows: of a file, of a clean and of a damaged source, trusted ones, and test rows."""

    file: int = 600
    clean: int = 200
    damaged: int = 250
    trusted: int = 32
    tests: int = 80


@dataclass(frozen=True)
class Mix:
    """Tokens of sources by name, of a few trusted rows, and of test rows of the target."""

    target: str
    sources: dict[str, Dataset]
    trusted: Dataset
    test: Dataset

    @property
    def damaged(self) -> str:
        """The target's damaged source."""
        return DAMAGED.format(self.target)


def pairs(folder: Path) -> dict[str, tuple[list[Pair], list[Pair]]]:
    """The training and the test rows of each task.

    Code has no test file: its last quarter are test rows. A meaning representation of the E2E
    challenge has several texts; of a test one the last is taken.
    """

    def lines(name: str) -> list[Pair]:
        with (folder / "instruct" / name).open() as file:
            return [(row["prompt"], row["completion"]) for row in map(json.loads, file)]

    def meanings(name: str) -> list[Pair]:
        with (folder / "e2e" / name).open(newline="") as file:
            return list(dict.fromkeys((row["mr"], row["ref"]) for row in csv.DictReader(file)))

    code = lines("code.jsonl")
    tests = len(code) // 4
    return {
        "math": (lines("math_train.jsonl"), lines("math_test.jsonl")),
        "code": (code[:-tests], code[-tests:]),
        "e2e": (
            meanings("devset.csv"),
            list(
                {mr: (mr, text) for mr, text in reversed(meanings("testset_w_refs.csv"))}.values()
            ),
        ),
    }


class Below(nn.Module):
    """In place of the embeddings: the states of rows after the frozen layers, by their tokens.

    They are in a file too, since they take longer than a training.
    """

    def __init__(self, frozen: Any, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept
        # In a tuple, without which it would be a part of the model that is trained.
        self.frozen = (frozen.bfloat16().eval(),)
        self.file = CACHE / f"states-{weights_fingerprint(frozen.named_parameters())[:16]}.pt"
        self.states: dict[tuple[int, ...], Tensor] = {}
        if self.file.exists():
            numbers = {int(token): number for number, token in enumerate(kept)}
            for row, states in torch.load(self.file).items():
                if numbers.keys() >= set(row):
                    self.states[tuple(numbers[token] for token in row)] = states

    @torch.no_grad()
    def remember(self, rows: Iterable[Sequence[int]]) -> None:
        """Run the frozen layers on those of ``rows`` that are new."""
        new = sorted({tuple(row) for row in rows} - self.states.keys(), key=len)
        if not new:
            return
        for begin in range(0, len(new), 32):
            part = new[begin : begin + 32]
            ids = pad_sequence([self.kept[list(row)] for row in part], True)
            states = self.frozen[0](ids, use_cache=False).last_hidden_state
            for row, each in zip(part, states, strict=True):
                self.states[row] = each[: len(row)].clone()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        of_tokens = {tuple(self.kept[list(row)].tolist()): x for row, x in self.states.items()}
        torch.save(of_tokens, self.file)

    def forward(self, ids: Tensor) -> Tensor:
        """The states of rows that are padded on the right, ``(n, tokens, hidden)``."""
        rows = [tuple(row[: int((row != PAD).sum())].tolist()) for row in ids]
        states = pad_sequence([self.states[row] for row in rows], True)
        return nn.functional.pad(states, (0, 0, 0, ids.shape[1] - states.shape[1]))


class Language:
    """The rows of all tasks as tokens of a cut vocabulary, and a model's last layers over them.

    Args:
        folder: the folder with ``instruct`` and ``e2e``.
        name: as in `small_language_models.load`.
        counts: how many rows are used.
    """

    def __init__(self, folder: Path, name: str = "smollm2", counts: Counts | None = None) -> None:
        whole, tokenizer, self.name = load(name)
        self.counts = counts or Counts()
        coded = {
            task: tuple(_coded(part, tokenizer)[: self.counts.file] for part in two)
            for task, two in pairs(folder).items()
        }
        used = {t for two in coded.values() for part in two for a, b in part for t in a + b}
        kept = torch.tensor([0, tokenizer.eos_token_id or 0, *sorted(used)])
        number = {token: new for new, token in enumerate(kept.tolist()) if new > END}
        self.rows = {
            task: [[tuple([number[t] for t in ids] for ids in row) for row in part] for part in two]
            for task, two in coded.items()
        }
        head = nn.Linear(whole.config.hidden_size, len(kept), bias=False)
        head.weight.data = whole.lm_head.weight.data[kept]
        frozen = copy.deepcopy(whole.model)
        frozen.layers, frozen.norm = frozen.layers[:-LAYERS], nn.Identity()
        self.below = Below(frozen, kept)
        whole.model.layers = whole.model.layers[-LAYERS:]
        whole.model.embed_tokens, whole.lm_head = None, head
        changed = {"num_hidden_layers": LAYERS, "vocab_size": len(kept), "use_cache": False}
        whole.config.update({**changed, "tie_word_embeddings": False})
        whole.set_attn_implementation("eager")  # faster on a CPU at this length
        self.base = whole.bfloat16()

    def model(self, seed: int) -> Any:
        """The last layers with a new adapter."""
        base = copy.deepcopy(self.base)
        base.set_input_embeddings(self.below)
        torch.manual_seed(seed)
        adapter = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
        return get_peft_model(base, adapter)

    def draw(self, target: str, seed: int) -> Mix:
        """The rows of ``seed``: each task's sources, and for ``target`` trusted and test rows."""
        random, sources, n = torch.Generator().manual_seed(seed), {}, self.counts
        for task, (pool, tests) in self.rows.items():
            order = torch.randperm(len(pool) - n.tests, generator=random) + n.tests
            rows = [pool[k] for k in order.tolist()]
            sources[task], rows = rows[: n.clean], rows[n.clean :]
            wrong, rows = rows[: n.damaged], rows[n.damaged :]
            others = [answer for _, answer in (*wrong[1:], wrong[0])]
            sources[DAMAGED.format(task)] = [
                (prompt, answer) for (prompt, _), answer in zip(wrong, others, strict=True)
            ]
            if task == target:
                trusted = rows[: n.trusted]
                test = (pool if seed == DEVELOPMENT_SEED else tests)[: n.tests]
        named = {name: self._data(part) for name, part in sources.items()}
        return Mix(target, named, self._data(trusted), self._data(test))

    def _data(self, rows: Sequence[Coded]) -> Dataset:
        """The rows with labels, whose states are known from here on."""
        ids = [[*prompt, *answer, END] for prompt, answer in rows]
        self.below.remember(ids)
        labels = [[IGNORED] * len(row[0]) + each[len(row[0]) :] for row, each in zip(rows, ids)]
        return Dataset.from_dict({"input_ids": ids, "labels": labels})


def _coded(rows: Sequence[Pair], tokenizer: Any) -> list[Coded]:
    """The tokens of those rows that are short enough with their end."""
    prompts = tokenizer([f"{prompt}\n" for prompt, _ in rows])["input_ids"]
    answers = tokenizer([answer for _, answer in rows])["input_ids"]
    ids = zip(prompts, answers, strict=True)
    return [row for row in ids if sum(map(len, row)) < LENGTH]


def collated(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of rows, padded on the right."""
    batch = {n: torch.tensor([row[n] for row in rows]) for n in rows[0] if n not in PADDING}
    for name, fill in PADDING.items():
        batch[name] = pad_sequence([torch.tensor(row[name]) for row in rows], True, fill)
    return {**batch, "attention_mask": (batch["input_ids"] != PAD).long()}


@torch.no_grad()
def judged(model: Any, rows: Dataset) -> tuple[float, float]:
    """The loss of a token of the answers, and how many of a hundred are the most likely ones."""
    loss = right = count = 0.0
    for begin in range(0, len(rows), 32):
        batch = collated(rows.select(range(begin, min(begin + 32, len(rows)))).to_list())
        labels = batch.pop("labels")[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.eval()(**batch).logits[:, :-1]
        scored = labels != IGNORED
        loss += float(cross_entropy(logits[scored].float(), labels[scored], reduction="sum"))
        right += float((logits[scored].argmax(-1) == labels[scored]).sum())
        count += float(scored.sum())
    return loss / count, 100 * right / count
