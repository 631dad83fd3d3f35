"""Loss weights of `SFTTrainer`, with a model and rows made here: nothing is downloaded."""

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnop"]
TEXTS = ["a b c", "d e", "f g h i j", "k l m n o p", "b d f", "c e g i"]
WEIGHTS = [0.5, 2.0, 0.0, 1.5, 3.0, 0.25]

# Each way from rows to batches, with the settings that choose it. Packing makes rows of 9 tokens.
LAYOUTS = {
    "padded": {},
    "truncated": {"max_length": 4},
    "padding free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True, "packing_strategy": "bfd", "max_length": 9},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 4},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 9},
}


def make_tokenizer():
    tokenizer = Tokenizer(WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_dataset(texts=TEXTS, **columns):
    return Dataset.from_dict({"text": [f"{text} <eos>" for text in texts], **columns})


class TestLossWeights:
    @pytest.fixture(autouse=True)
    def _tmp_dir(self, tmp_path):
        self.tmp_dir = str(tmp_path)

    def trainer(
        self, dataset, eval_dataset=None, peft_config=None, compute_loss_func=None, **config
    ):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(WORDS), **sizes, **heads))
        defaults = {
            "per_device_train_batch_size": 32,
            "optim": "sgd",
            "learning_rate": 0.5,
            "max_steps": 1,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        return SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=self.tmp_dir, **{**defaults, **config}),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=make_tokenizer(),
            peft_config=peft_config,
            compute_loss_func=compute_loss_func,
        )

    def step(self, dataset, **config):
        """The loss of one step and the trained parameters after it."""
        trainer = self.trainer(dataset, **config)
        trainer.train()
        parameters = [p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]
        return torch.tensor(trainer.state.log_history[0]["loss"]), torch.cat(parameters)

    @pytest.mark.parametrize(
        "config",
        [
            *LAYOUTS.values(),
            {"loss_type": "dft"},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        ],
        ids=[*LAYOUTS, "dft", "accumulated"],
    )
    def test_weights_of_one_are_bitwise_unweighted(self, config):
        expected = self.step(make_dataset(), **config)
        weighted = self.step(make_dataset(loss_weight=[1] * len(TEXTS)), **config)
        for value, other in zip(weighted, expected, strict=True):
            assert torch.equal(value, other)

    @pytest.mark.parametrize("loss_type", ["nll", "dft"])
    @pytest.mark.parametrize("layout", ["padded", "truncated", "padding free", "bfd", "bfd_split"])
    def test_integer_weights_are_repeated_rows(self, layout, loss_type):
        weights = [1, 2, 0, 3, 1, 0]
        repeated = [
            text for text, weight in zip(TEXTS, weights, strict=True) for _ in range(weight)
        ]
        config = {**LAYOUTS[layout], "loss_type": loss_type}
        expected = self.step(make_dataset(repeated), **config)
        torch.testing.assert_close(self.step(make_dataset(loss_weight=weights), **config), expected)

    def test_scale_of_the_weights_does_not_matter(self):
        expected = self.step(make_dataset(loss_weight=WEIGHTS))
        scaled = make_dataset(loss_weight=[weight / 1000 for weight in WEIGHTS])
        torch.testing.assert_close(self.step(scaled), expected)

    @pytest.mark.parametrize("layout", ["padded", "padding free", "bfd"])
    def test_gradient_accumulation_does_not_matter(self, layout):
        config = LAYOUTS[layout]
        weighted = make_dataset(loss_weight=WEIGHTS)
        expected = self.step(weighted, **config)
        accumulated = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}
        torch.testing.assert_close(self.step(weighted, **config, **accumulated), expected)

    @pytest.mark.parametrize("layout", ["padding free", "bfd"])
    def test_packing_does_not_matter(self, layout):
        weighted = make_dataset(loss_weight=WEIGHTS)
        torch.testing.assert_close(self.step(weighted, **LAYOUTS[layout]), self.step(weighted))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_weights_stay_with_their_tokens(self, layout):
        texts = ["a b c", "d e", "f g h i j", "k l m n o p"]  # a word is in one row only
        weight_of = {"<eos>": None}
        for text, weight in zip(texts, WEIGHTS, strict=False):
            weight_of.update(dict.fromkeys(text.split(), weight))
        trainer = self.trainer(
            make_dataset(texts, loss_weight=WEIGHTS[: len(texts)]), **LAYOUTS[layout]
        )
        seen = 0
        for row in trainer.train_dataset:
            assert len(row["loss_weights"]) == len(row["input_ids"])
            for token, weight in zip(row["input_ids"], row["loss_weights"], strict=True):
                assert weight_of[WORDS[token]] in (None, weight)
                seen += 1
        assert seen >= 14

    def test_a_row_without_a_weight_weighs_one(self):
        expected = self.step(make_dataset(loss_weight=[1.0, 2.0, 1.0, 1.0, 1.0, 1.0]))
        missing = self.step(make_dataset(loss_weight=[None, 2.0, None, None, None, None]))
        torch.testing.assert_close(missing, expected, rtol=0, atol=0)

    def test_negative_weights_are_normalized_by_their_size(self):
        first, _ = self.step(make_dataset(TEXTS[:1]))  # 3 tokens are predicted
        second, _ = self.step(make_dataset(TEXTS[1:2]))  # 2 tokens
        both, _ = self.step(make_dataset(TEXTS[:2], loss_weight=[1.0, -0.5]))
        torch.testing.assert_close(
            both, (3 * first - 2 * 0.5 * second) / (3 + 2 * 0.5), rtol=1e-4, atol=0
        )

    def test_weights_of_zero_leave_the_model_as_it_is(self):
        loss, parameters = self.step(make_dataset(loss_weight=[0.0] * len(TEXTS)))
        assert loss == 0
        _, expected = self.step(make_dataset(), learning_rate=0.0)
        assert torch.equal(parameters, expected)

    def test_weights_of_tokens(self):
        """In a pre-tokenized dataset each token can have a weight, and weight 0 is label -100."""
        rows = {"input_ids": [[3, 4, 5, 6, 1], [7, 8, 9, 1]]}
        masked = {"labels": [[-100, -100, 5, 6, 1], [-100, 8, 9, -100]]}
        weights = {"loss_weights": [[0, 0, 1, 1, 1], [1, 1, 1, 0]]}
        expected = self.step(Dataset.from_dict({**rows, **masked}))
        torch.testing.assert_close(self.step(Dataset.from_dict({**rows, **weights})), expected)

    def test_completions(self):
        rows = {"prompt": ["a b", "c"], "completion": [" d e", " f g h"]}
        expected = self.step(
            Dataset.from_dict({key: [*value, value[1]] for key, value in rows.items()})
        )
        torch.testing.assert_close(
            self.step(Dataset.from_dict({**rows, "loss_weight": [1, 2]})), expected
        )

    def test_prompt_learning(self):
        """Virtual tokens before the row do not shift its weights."""
        options = {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
        rows = {"input_ids": [[3, 4, 5, 6, 1]], "labels": [[-100, -100, 5, -100, 1]]}
        expected = self.step(Dataset.from_dict(rows), **options)
        weights = {"input_ids": rows["input_ids"], "loss_weights": [[0, 0, 1, 0, 1]]}
        torch.testing.assert_close(self.step(Dataset.from_dict(weights), **options), expected)

    def test_evaluation(self):
        """The same loss as in training, where the first one is logged before the model changes."""
        rows = make_dataset(loss_weight=[1.0, 2.0, -0.5, 0.0, 3.0, -1.0])
        expected, _ = self.step(rows)
        trainer = self.trainer(rows, eval_dataset=rows, per_device_eval_batch_size=32)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-3)
        assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected.item(), rel=1e-3)

    def test_streamed(self):
        weighted = make_dataset(loss_weight=WEIGHTS)
        torch.testing.assert_close(self.step(weighted.to_iterable_dataset()), self.step(weighted))

    @pytest.mark.parametrize("padding_free", [False, True])
    def test_collator(self, padding_free):
        collator = DataCollatorForLanguageModeling(
            pad_token_id=0, padding_free=padding_free, pad_to_multiple_of=4
        )
        rows = [
            {"input_ids": [3, 4, 5], "loss_weights": [2, 2, 2]},
            {"input_ids": [6, 7], "loss_weights": [0.5, 1]},
        ]
        expected = [[2, 2, 2, 0.5, 1, 0, 0, 0]] if padding_free else [[2, 2, 2, 0], [0.5, 1, 0, 0]]
        torch.testing.assert_close(collator(rows)["loss_weights"], torch.tensor(expected))

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    @pytest.mark.parametrize(
        ("options", "columns", "message"),
        [
            ({"compute_loss_func": lambda *args, **kwargs: None}, {}, "compute_loss_func"),
            ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor"),
            (
                {"dataset_kwargs": {"skip_prepare_dataset": True}},
                {"input_ids": [[3, 1]] * len(TEXTS), "labels": [[3, 1]] * len(TEXTS)},
                "skip_prepare_dataset",
            ),
        ],
        ids=["loss function", "label smoothing", "not prepared"],
    )
    def test_unsupported(self, options, columns, message):
        with pytest.raises(ValueError, match=message):
            self.trainer(make_dataset(loss_weight=WEIGHTS, **columns), **options)
