"""BiDoRA: who owns what, what moves in which phase, and that the result is a PEFT adapter."""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from hyperopt_peft import Engine, ProblemError, compare_hypergradients, hypergradient
from hyperopt_peft.adapters import gram_penalty, set_norm_grad, split_parameters
from hyperopt_peft.problems.bidora import (
    BiDoRAConfig,
    Direction,
    Magnitude,
    bidora,
    search,
    split_dataset,
)

CONFIG = BiDoRAConfig(
    search_steps=6, lower_steps=2, lower_learning_rate=1e-2, warmup_ratio=0.0, retrain="none"
)
SHAPE = BertConfig(
    vocab_size=50,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    initializer_range=0.5,  # the default leaves a network of this size all but constant
    num_labels=3,
)


def base_model(dropout=0.1):
    torch.manual_seed(0)
    config = copy.deepcopy(SHAPE)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    return BertForSequenceClassification(config)


def dora_model(dropout=0.1, **options):
    torch.manual_seed(0)
    adapter = LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        lora_alpha=4,
        lora_dropout=dropout,
        target_modules=["query", "value", "intermediate.dense"],
        use_dora=True,
        **options,
    )
    return get_peft_model(base_model(dropout), adapter).train()


def batches(seed, count=3, size=8):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(50, (size, 7), generator=generator),
            "labels": torch.randint(3, (size,), generator=generator),
        }
        for _ in range(count)
    ]


DATA = {"lower_data": batches(1), "upper_data": batches(2), "all_data": batches(3)}


def train(model, config=CONFIG, **data):
    return bidora(model, config=config, progress=False, **(data or DATA))


def values(parameters):
    return {name: p.detach().clone() for name, p in parameters.items()}


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_levels_share_out_the_trainable_parameters():
    model = dora_model()
    lower, upper = Direction(model), Magnitude(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(lower.names) | set(upper.names) == trainable
    assert not set(lower.names) & set(upper.names)
    assert all("magnitude" in name for name in upper.names)
    assert len(upper.names) == 2 * 3
    assert any("classifier" in name for name in lower.names)


def test_training_starts_at_the_pretrained_model():
    model, batch = dora_model(dropout=0.0), batches(4)[0]
    engine = search(model, **{k: DATA[k] for k in ("lower_data", "upper_data")}, config=CONFIG)
    expected = base_model(0.0).train()
    expected.classifier.load_state_dict(
        {"weight": model.classifier.weight, "bias": model.classifier.bias}
    )
    torch.testing.assert_close(engine.lower.loss(batch), expected(**batch).loss)


def test_search_moves_both_levels_and_nothing_else():
    model = dora_model()
    before = values(dict(model.named_parameters()))
    parts = split_parameters(model)
    owned = {*parts.magnitudes, *parts.directions, *parts.rest}
    history = train(model)
    assert len(history["search"]) == 3
    assert history["retrain"] == []
    assert moved(before, values(dict(model.named_parameters()))) == owned


@pytest.mark.parametrize("retrain", ["warm", "scratch"])
def test_retraining_holds_the_magnitudes(retrain):
    """With learning rate 0 it shows where it starts from, with another that it trains."""
    model = dora_model()
    initial = values(split_parameters(model).directions)
    config = replace(CONFIG, retrain=retrain, retrain_steps=4, retrain_learning_rate=0.0)
    history = train(model, config)
    searched = dora_model()
    train(searched)
    parts, expected = split_parameters(model), split_parameters(searched)
    assert len(history["retrain"]) == 4
    assert not moved(values(parts.magnitudes), values(expected.magnitudes))
    start = initial if retrain == "scratch" else values(expected.directions)
    assert not moved(start, values(parts.directions))

    model = dora_model()
    train(model, replace(config, retrain_learning_rate=1e-2))
    parts = split_parameters(model)
    assert not moved(values(parts.magnitudes), values(expected.magnitudes))
    assert moved(start, values(parts.directions)) == set(parts.directions)


def test_control_without_upper_learning_rate_holds_the_magnitudes():
    model = dora_model()
    before = values(split_parameters(model).magnitudes)
    train(model, replace(CONFIG, upper_learning_rate=0.0))
    assert not moved(before, values(split_parameters(model).magnitudes))


def test_decay_pulls_magnitudes_to_where_they_started():
    model, batch = dora_model(dropout=0.0), batches(4)[0]
    plain, decayed = Magnitude(model), Magnitude(model, decay=0.7)
    with torch.no_grad():
        for m in plain.variables:
            m += torch.randn_like(m)
    pairs = zip(
        plain.gradient(batch, plain.variables).gradient,
        decayed.gradient(batch, plain.variables).gradient,
        plain.variables,
        decayed.start,
        strict=True,
    )
    for without, with_decay, m, m0 in pairs:
        torch.testing.assert_close(with_decay - without, 0.7 * (m - m0).detach())


def test_gamma_adds_the_gram_penalty():
    model, batch = dora_model(dropout=0.0), batches(4)[0]
    plain, regularised = Direction(model), Direction(model, gamma=0.3)
    loss, metrics = regularised.evaluate(batch)
    task, penalty = plain.evaluate(batch)[0], gram_penalty(model)
    torch.testing.assert_close(loss, task + 0.3 * penalty)
    assert metrics == pytest.approx({"task_loss": task.item(), "gram": penalty.item()})


def levels(norm_grad):
    """Both levels in float64, away from the start, where B is no longer 0."""
    model = set_norm_grad(dora_model(dropout=0.0).double(), norm_grad)
    with torch.no_grad():
        for p in split_parameters(model).directions.values():
            p += 0.3 * torch.randn_like(p)
    lower_batch, upper_batch = batches(5, 1), batches(6, 1)
    return Magnitude(model, data=upper_batch), Direction(model, data=lower_batch)


def disagreement(norm_grad):
    """Relative difference between the finite-difference and the double-backward product."""
    rows = compare_hypergradients(
        *levels(norm_grad), ["darts"], "darts:product=exact", repeats=1
    ).rows
    return rows[0].relative_error


def test_only_a_norm_in_the_graph_makes_both_products_agree():
    assert disagreement("full") < 1e-6
    assert disagreement("detach") > 1e-2


def test_hypergradient_is_the_derivative_of_the_validation_loss_after_a_step():
    """ξ = lr: central differences of m ↦ F(w − lr·∂f/∂w(w, m), m), the formula's own definition."""
    upper, lower = levels("full")
    rate, h = 0.05, 1e-5
    start = [w.detach().clone() for w in lower.variables]
    m = upper.variables[0]

    def after_step():
        gradient = lower.gradient(lower.peek_batch(), lower.variables).gradient
        with torch.no_grad():
            for w, w0, g in zip(lower.variables, start, gradient, strict=True):
                w.copy_(w0 - rate * g)
        value = upper.evaluate(upper.peek_batch())[0].item()
        with torch.no_grad():
            for w, w0 in zip(lower.variables, start, strict=True):
                w.copy_(w0)
        return value

    def shifted(delta):
        with torch.no_grad():
            m[0] += delta
        value = after_step()
        with torch.no_grad():
            m[0] -= delta
        return value

    numeric = (shifted(h) - shifted(-h)) / (2 * h)
    # In training the mixed product is taken at the start of the step, F at its end: the Engine
    # does one step of gradient descent and asks for the hypergradient there.
    optimizer = torch.optim.SGD(lower.variables, lr=rate)
    lower = Direction(lower.model, data=[lower.peek_batch()], optimizer=optimizer)
    upper = Magnitude(
        upper.model,
        data=[upper.peek_batch()],
        optimizer=torch.optim.SGD(upper.variables, lr=1.0),
    )
    before = m[0].item()
    Engine(upper, lower, "darts:scale=lr,product=exact", progress=False).run(1)
    assert before - m[0].item() == pytest.approx(numeric, rel=1e-5)


def test_every_estimator_family_runs_on_it():
    upper, lower = levels("full")
    lower.optimizer = torch.optim.AdamW(lower.variables, lr=1e-3)
    for method in ("direct", "darts:sides=1", "cg:damping=1.0", "minres:steps=3", "unrolled"):
        parts = hypergradient(upper, lower, method)
        assert [p.shape for p in parts] == [m.shape for m in upper.variables]
        assert all(p.isfinite().all() for p in parts)


LOAD = """
import json, sys, torch
from peft import PeftModel
from transformers import BertConfig, BertForSequenceClassification
folder = sys.argv[1]
base = BertForSequenceClassification(BertConfig.from_pretrained(folder))
base.load_state_dict(torch.load(folder + "/base.pt", weights_only=True))
model = PeftModel.from_pretrained(base, folder + "/adapter").eval()
ids = torch.load(folder + "/ids.pt", weights_only=True)
with torch.no_grad():
    logits, merged = model(ids).logits, None
    merged = model.merge_and_unload()(ids).logits
torch.save([logits, merged], folder + "/logits.pt")
assert "hyperopt_peft" not in sys.modules
"""


def test_stock_peft_loads_and_merges_the_adapter_in_a_fresh_process(tmp_path):
    model = dora_model()
    train(model, replace(CONFIG, retrain="warm", retrain_steps=3))
    model.save_pretrained(tmp_path / "adapter")
    plain = dora_model()
    plain.save_pretrained(tmp_path / "plain")

    def keys(name):
        return load_file(tmp_path / name / "adapter_model.safetensors").keys()

    def settings(name):
        return json.loads((tmp_path / name / "adapter_config.json").read_text())

    assert keys("adapter") == keys("plain")
    assert settings("adapter") == settings("plain")

    ids = batches(7)[0]["input_ids"]
    SHAPE.save_pretrained(tmp_path)
    torch.save(base_model().state_dict(), tmp_path / "base.pt")
    torch.save(ids, tmp_path / "ids.pt")
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True)
    with torch.no_grad():
        expected = model.eval()(ids).logits
    for logits in torch.load(tmp_path / "logits.pt", weights_only=True):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_training_is_in_train_mode():
    """A model fresh from ``from_pretrained`` is in evaluation mode, without dropout."""
    model = dora_model().eval()
    train(model)
    assert model.training


def test_one_seed_is_one_result():
    runs = []
    for _ in range(2):
        model = dora_model()
        torch.manual_seed(5)
        train(model)
        runs.append(values(dict(model.named_parameters())))
    assert not moved(*runs)


def labelled(counts):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    features = Features({"row": Value("int64"), "label": ClassLabel(num_classes=len(counts))})
    return Dataset.from_dict({"row": range(len(labels)), "label": labels}, features=features)


def test_split_is_stratified_disjoint_and_complete():
    lower, upper = split_dataset(labelled([50, 30, 20]), 0.2, seed=3)
    assert [upper["label"].count(k) for k in range(3)] == [10, 6, 4]
    assert sorted([*lower["row"], *upper["row"]]) == list(range(100))
    assert split_dataset(labelled([50, 30, 20]), 0.2, seed=3)[1]["row"] == upper["row"]
    assert split_dataset(labelled([50, 30, 20]), 0.2, seed=4)[1]["row"] != upper["row"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: BiDoRAConfig(upper_fraction=1.0), "upper_fraction"),
        (lambda: BiDoRAConfig(retrain="cold"), "retrain"),
        (lambda: BiDoRAConfig(lower_steps=0), "at least one lower step"),
        (lambda: BiDoRAConfig(warmup_ratio=2.0), "warmup_ratio"),
        (lambda: BiDoRAConfig(search_steps=2, lower_steps=3), "no upper step"),
        (lambda: BiDoRAConfig(hypergradient="dart"), "did you mean 'darts'"),
        (lambda: BiDoRAConfig(hypergradient="cg", xi=1.0), "xi is an option of darts"),
        (lambda: BiDoRAConfig(xi=-1.0), "scale must not be negative"),
        (lambda: train(base_model()), "PeftModel"),
        (lambda: split_dataset(labelled([5, 1]), 0.4, 0), "upper level"),
        (lambda: split_dataset(labelled([1]), 0.4, 0), "upper level"),
        (
            lambda: train(
                dora_model(),
                replace(CONFIG, retrain="warm"),
                lower_data=batches(1),
                upper_data=batches(2),
            ),
            "needs all_data",
        ),
        (lambda: train(dora_model(), lower_data=[], upper_data=batches(2)), "no batch"),
        (lambda: train(dora_model(), lower_data=batches(1), upper_data=iter([])), "only once"),
    ],
)
def test_bad_input_is_named(wrong, said):
    with pytest.raises(ProblemError, match=said):
        wrong()
