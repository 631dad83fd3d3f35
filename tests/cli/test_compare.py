"""``compare``: methods by name or of a file, judged by one command."""

import json
from pathlib import Path

import torch

from hyperopt_peft.cli.text.data import DataArguments
from hyperopt_peft.cli.text.models import ModelArguments
from hyperopt_peft.cli.text.setup import prepare
from hyperopt_peft.problems import DoRA, LoRA
from tests.support.cli import Capture, refused, run, small_run
from tests.support.comparisons import passes_of

SHORT = {
    "passes": 16,
    "seeds": [0, 1],
    "rates": [3e-2, 6e-2],
    "upper_rates": [1e-2],
    "splits": 1,
    "max_steps": None,
    "target_modules": ["query"],
}


def test_methods_of_files_too_are_judged_at_equal_passes(tmp_path: Path, capsys: Capture) -> None:
    """One command, and again: the second one has nothing to train."""
    (tmp_path / "mine.py").write_text(
        "from hyperopt_peft.problems import BiDoRA\nclass Mine(BiDoRA):\n    pass\n"
    )
    methods = ["lora", f"{tmp_path / 'mine.py'}:Mine"]
    options = small_run(tmp_path, methods=methods, **SHORT)
    for again in (False, True):
        before = (tmp_path / "out/runs.jsonl").read_text() if again else ""
        run("compare", **options)
        out = capsys.readouterr().out
        assert "no significant difference" in out or "better than" in out or "worse than" in out
        text = (tmp_path / "out/runs.jsonl").read_text()
        assert not again or text == before
        runs = [each for each in map(json.loads, text.splitlines()) if "spent" in each]
        assert len(runs) == 3 * 2 * 2 + 4 * 2  # those at both rates, and the reported ones
    assert all(14 <= passes_of(each) <= 17 for each in runs)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    files = {"runs.jsonl", "runs.csv", "report.html", "comparison.png", "comparison.tex"}
    assert written - {".lock"} == files


def test_budgets_and_stopping_points_in_one_folder(tmp_path: Path, capsys: Capture) -> None:
    """A second command with another budget has the runs of this budget alone."""
    short = {"seeds": [0, 1], "rates": 3e-2, "points": 2, "splits": 1}
    options = small_run(tmp_path, methods=["lora", "dora"], max_steps=None, **short)
    seen: list[str] = []
    for passes in (8, 16):
        run("compare", **{**options, "passes": passes})
        out = capsys.readouterr().out
        assert f" {passes} passes; " in out and "stopped at" in out
        assert "no significant difference" in out
        lines = (tmp_path / "out/runs.jsonl").read_text().splitlines()
        more = [json.loads(line) for line in lines[len(seen) :]]
        assert seen == lines[: len(seen)]
        assert {each["passes"] for each in more if "passes" in each} == {passes}
        seen = lines
    heading, *table = (tmp_path / "out/comparison.tex").read_text().splitlines()
    assert heading.startswith("% ") and "16 passes" in heading and table[1] == r"\toprule"
    assert (tmp_path / "out/comparison.png").exists()


def test_folds_of_trusted_examples_recommend_a_method(tmp_path: Path, capsys: Capture) -> None:
    """On heads, and on adapters, whose rates are chosen by other trusted examples."""
    short = SHORT | {"seeds": None, "folds": 2}
    options = small_run(tmp_path, methods=["lora", "trusted_repeated"], **short)
    options["upper_file"] = options.pop("eval_file")
    of_adapters = {n: options.pop(n) for n in ("passes", "rates", "upper_rates", "splits")}
    (tmp_path / "both.yaml").write_text(json.dumps(of_adapters))
    for model, runs in (("head", 2 * 2), ("adapter", 2 * 2 * (2 + 1))):
        options |= {"output_dir": tmp_path / model, "score_model": model}
        run("compare", str(tmp_path / "both.yaml"), **options)
        out = capsys.readouterr().out
        assert "the mean loss of " in out and "folds of 10 trusted rows" in out
        lines = (tmp_path / model / "runs.jsonl").read_text().splitlines()
        assert sum("metrics" in json.loads(line) for line in lines) == runs
    options |= {"score_model": "head", "rates": 3e-2, "overwrite_output_dir": True}
    refused(capsys, "compare", options, "rates: has no effect")


def test_one_seed_is_one_start_and_models_leave_the_options_as_they_are(tmp_path: Path) -> None:
    options = small_run(tmp_path)
    args = ModelArguments(options["model"], options["task"], rank=2, modules_to_save=["pooler"])
    setup = prepare(args, DataArguments([options["train_file"]], max_length=16), None)
    models = [setup.model(0, LoRA()), setup.model(0, DoRA()), setup.model(1, DoRA())]
    lora, dora, other = (
        {n: p.detach() for n, p in model.named_parameters() if "magnitude" not in n}
        for model in models
    )
    assert lora.keys() == dora.keys() and any("lora_A" in name for name in lora)
    for name, weight in lora.items():
        assert torch.equal(weight, dora[name])
        assert "lora_A" not in name or not torch.equal(weight, other[name])
    saved = [model.peft_config["default"].modules_to_save for model in models]
    assert saved[0] == saved[1] and "pooler" in saved[0] and args.modules_to_save == ["pooler"]


def test_no_evaluation_is_refused(tmp_path: Path, capsys: Capture) -> None:
    refused(capsys, "compare", small_run(tmp_path, eval_fraction=0, eval_file=None), "eval_file")
    refused(capsys, "compare", small_run(tmp_path, run="3/2"), "run: must be K/N")
    refused(capsys, "compare", small_run(tmp_path, folds=2, eval_file=None), "give upper_file")
    (tmp_path / "one").mkdir()
    mine = "from hyperopt_peft.problems import LoRA\nclass Mine(LoRA):\n    pass\n"
    files = [tmp_path / "mine.py", tmp_path / "one" / "mine.py"]
    for file in files:
        file.write_text(mine)
    twice = small_run(tmp_path, methods=[f"{file}:Mine" for file in files])
    refused(capsys, "compare", twice, "methods: two of Mine, Mine have one name")
