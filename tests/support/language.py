"""A tiny language model, its tokenizer, and rows in the layouts that TRL's trainers read.

A test module that trains with TRL begins with ``pytest.importorskip("trl")``.
"""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

#: TRL's release; empty without TRL.
TRL = tuple(map(int, version("trl").split(".")[:2])) if find_spec("trl") else ()
#: For tests of losses of rows over SFTTrainer, whose models then return no logits.
with_logits = pytest.mark.skipif((1, 0) <= TRL < (1, 15), reason="refused before TRL 1.15")
LETTERS = "abcdefghijklmnop"


def fuse_head(model: Any) -> None:
    """Give ``model`` the head of TRL's trainers, which makes no logits; skips if TRL has none."""
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("TRL 1.15 has this head")
    utils.add_fused_lm_head(model)


SPECIAL = ["<pad>", "<end>", "<unk>"]
#: Marks what the assistant says, as ``assistant_only_loss`` needs it.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + ' <end> ' }}{% endgeneration %}{% else %}{{ m['content'] + ' ' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
#: Layouts of rows, each with the settings of an ``SFTConfig`` that it needs.
LAYOUTS: dict[str, dict[str, Any]] = {
    "text": {},
    "completion": {},
    "messages": {"assistant_only_loss": True},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 24},
    "packed": {"packing": True, "packing_strategy": "bfd", "max_length": 24},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token; nothing is added to a text."""
    words = [*SPECIAL, "say", "then", "user", "assistant", *LETTERS]
    splitter = Tokenizer(WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    splitter.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=splitter, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    return made


def language_model(
    dtype: torch.dtype = torch.float32, *, experts: int = 0, **config: Any
) -> LlamaForCausalLM | MixtralForCausalLM:
    """An untrained Llama, or Mixtral of ``experts``, of two layers, equal at every call."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.2,  # the default leaves a network of this size all but constant
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if experts:
        sizes |= {"num_local_experts": experts}
        return MixtralForCausalLM(MixtralConfig(**sizes | config)).to(dtype)
    return LlamaForCausalLM(LlamaConfig(**sizes | config)).to(dtype)


def quantised(
    folder: Any, compute: torch.dtype = torch.float32, *, bits: int = 4, **config: Any
) -> Any:
    """`language_model` in 4 or 8 bits, as ``from_pretrained`` loads it from ``folder``."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2}
    language_model(**sizes | config).save_pretrained(folder)
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **four)
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": "cpu"}, quantization_config=settings, dtype=torch.float32
    )


def lora(**options: Any) -> LoraConfig:
    """An adapter of every linear layer of a block, whose B is not zero."""
    defaults: dict[str, Any] = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    return LoraConfig(task_type="CAUSAL_LM", **defaults | options)


def rows(layout: str = "completion", count: int = 16, seed: int = 0) -> Dataset:
    """Rows of different lengths in a layout of `LAYOUTS`, or ``preference``."""
    generator = torch.Generator().manual_seed(seed)
    made: list[dict[str, Any]] = []
    for row in range(count):
        picked = torch.randint(len(LETTERS), (2 + row % 3,), generator=generator).tolist()
        letters = [LETTERS[k] for k in picked]
        question, answer = f"say {letters[0]} then {letters[1]}", " ".join(letters)
        if layout == "completion":
            made.append({"prompt": question, "completion": f" {answer}"})
        elif layout == "messages":
            said = {"role": "user", "content": question}
            made.append({"messages": [said, {"role": "assistant", "content": answer}]})
        elif layout == "preference":
            pair = {"chosen": f" {answer}", "rejected": f" {answer[::-1]} {letters[0]}"}
            made.append({"prompt": question, **pair})
        else:
            made.append({"text": f"{question} {answer}"})
    return Dataset.from_list(made)


def write_files(folder: Path) -> None:
    """A model by the name of a real one, and the rows of docs/language-models.md."""
    name = folder / "Qwen" / "Qwen3-0.6B"
    model = language_model(hidden_size=32, intermediate_size=64, num_key_value_heads=2)
    model.save_pretrained(name)
    tokenizer().save_pretrained(name)
    files = {"web": 48, "forum": 48, "trusted": 12, "pairs": 40, "trusted_pairs": 20}
    made = {
        file: rows("preference" if "pairs" in file else "completion", count, seed).to_list()
        for seed, (file, count) in enumerate(files.items())
    }
    # Few letters make equal rows.
    made["trusted_pairs"] = [row for row in made["trusted_pairs"] if row not in made["pairs"]]
    for file, each in made.items():
        Dataset.from_list(each).to_json(folder / f"{file}.jsonl")
