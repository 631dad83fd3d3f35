"""Documents as sources, for `mix.py`: SmolLM2's last layer on cached states, next-token loss.

The target are docstrings. Two sources have docstrings too, two have licences and tweets, and two
have shuffled words. The output layer has the tokens that occur, so that a pass takes a fraction of
a second.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from mix_learners import Lora
from mix_tasks import BAD, DEVELOPMENT_SEEDS, GOOD, NEITHER, ROWS_OF_SOURCE, Task, cached
from package_text import docstrings, licences, shuffled, tweet_texts
from peft import LoraConfig, get_peft_model
from small_language_models import load
from torch import Tensor, nn

from hyperopt_peft.problems.data_sources import NO_VOTE
from hyperopt_peft.problems.example_weights import example_losses

#: Tokens of a block, blocks of a kind of text, and test blocks in each half of the docstrings.
LENGTH, BLOCKS, TEST = 24, 400, 100
#: Sources by the kind of text that they have.
SOURCES = {
    "docstrings 1": ("docstrings", GOOD),
    "docstrings 2": ("docstrings", GOOD),
    "licences": ("licences", NEITHER),
    "tweets": ("tweets", NEITHER),
    "shuffled docstrings": ("shuffled docstrings", BAD),
    "shuffled licences": ("shuffled licences", BAD),
}


@dataclass(frozen=True)
class Documents:
    """Blocks of each kind of text, one kind after the other.

    ``states`` of the last layer's input is ``(n, LENGTH, hidden)``, ``tokens`` has numbers among
    those that occur, whose rows of the output layer are ``head``.
    """

    states: Tensor
    tokens: Tensor
    head: Tensor
    begins: dict[str, int]


def documents(trusted: int, source: torch.Generator, seed: int) -> Task:
    """Blocks of six sources. Development seeds draw from the first half of each kind."""
    data = _documents()
    half = BLOCKS // 2
    offset = 0 if seed in DEVELOPMENT_SEEDS else half

    begin = data.begins["docstrings"] + 2 * offset
    apart = torch.arange(begin, begin + TEST)
    own = torch.randperm(2 * half - TEST, generator=source) + begin + TEST
    votes, train = torch.full((len(data.tokens), len(SOURCES)), NO_VOTE), []
    for number, (kind, _) in enumerate(SOURCES.values()):
        if kind == "docstrings":
            rows, own = own[:ROWS_OF_SOURCE], own[ROWS_OF_SOURCE:]
        else:
            order = torch.randperm(half, generator=source) + data.begins[kind] + offset
            rows = order[:ROWS_OF_SOURCE]
        votes[rows, number] = 0
        train.append(rows)
    quality = torch.tensor([quality for _, quality in SOURCES.values()])

    def inputs(index: Tensor) -> dict[str, Tensor]:
        mask = torch.ones(len(index), LENGTH, dtype=torch.int64)
        return {"inputs_embeds": data.states[index], "attention_mask": mask}

    return Task(inputs, data.tokens, votes, torch.cat(train), own[:trusted], apart, quality)


@cache
def _smollm2() -> Any:
    model, tokenizer, _ = load("smollm2")
    return model.requires_grad_(False), tokenizer


def _documents() -> Documents:
    found: Documents = cached(f"documents-{LENGTH}-{BLOCKS}", _encoded)
    return found


@torch.no_grad()
def _encoded() -> Documents:
    """Blocks through all layers but the last one."""
    model, tokenizer = _smollm2()
    texts = {"docstrings": docstrings(), "licences": licences(), "tweets": tweet_texts()}
    texts |= {
        f"shuffled {kind}": shuffled(texts[kind][::-1]) for kind in ("docstrings", "licences")
    }
    blocks, begins = [], {}
    for kind, given in texts.items():
        count = 2 * BLOCKS if kind == "docstrings" else BLOCKS
        begins[kind] = len(blocks)
        tokens = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in given)
        long = (ids[:LENGTH] for ids in tokens if len(ids) >= LENGTH)
        blocks += [ids for ids, _ in zip(long, range(count), strict=False)]
        assert len(blocks) == begins[kind] + count, kind
    ids = torch.tensor(blocks)
    known, numbers = ids.unique(return_inverse=True)
    states = [
        model.model(part, output_hidden_states=True).hidden_states[-2] for part in ids.split(25)
    ]
    head = model.lm_head.weight[known].clone()
    return Documents(torch.cat(states), numbers, head, begins)


@dataclass(frozen=True)
class LanguageModel(Lora):
    """LoRA in SmolLM2's last layer, AdamW.

    In place of votes, sources agree with a model as far as it expects their rows.
    """

    rate: float = 2e-3
    steps: int = 60
    search_batch: int = 64

    def model(self, task: Task) -> Any:
        """The last layer with a new adapter."""
        torch.manual_seed(self.seed)
        head = _documents().head
        base = copy.deepcopy(_last_layer())
        base.config.vocab_size = len(head)
        base.lm_head = nn.Linear(head.shape[1], len(head), bias=False)
        base.lm_head.weight = nn.Parameter(head, requires_grad=False)
        lora = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora))

    def given(self, task: Task, rows: Tensor, votes: Tensor, mixed: bool) -> dict[str, Tensor]:
        """The tokens, and the source of each row."""
        source = {"source": votes.argmax(1)} if mixed else {}
        return {"labels": task.labels[rows], **source}

    @torch.no_grad()
    def outcome(self, task: Task, model: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of each row's tokens, and which tokens are right, ``(n, LENGTH - 1)``."""
        losses, right = [], []
        for part in rows.split(100):
            batch = self.batch(task, part)
            losses.append(example_losses(model, batch))
            guess = model(**task.inputs(part)).logits[:, :-1].argmax(-1)
            right.append(guess == batch["labels"][:, 1:])
        return torch.cat(losses), torch.cat(right)

    def agrees(self, task: Task, model: Any) -> Tensor:
        """The half of the training rows of the lowest loss, in the column of their source."""
        losses, _ = self.outcome(task, model, task.train)
        return (task.votes[task.train] != NO_VOTE) & (losses <= losses.median())[:, None]

    def agreement(self, task: Task, model: Any) -> Tensor:
        """exp(−mean loss) of each source, divided by the largest one."""
        losses, _ = self.outcome(task, model, task.train)
        each = (task.votes[task.train] != NO_VOTE).float()
        means = (each * losses[:, None]).sum(0) / each.sum(0)
        return (means.min() - means).exp().clamp(max=0.99)


@cache
def _last_layer() -> Any:
    model, _ = _smollm2()
    model.model.layers = model.model.layers[-1:]
    model.model.embed_tokens = nn.Embedding(1, model.config.hidden_size)  # states are given
    return model
