"""Command lines of the published scripts, and of this repository's: parsed as they stand, and run on a small file."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import run_main
from data_provider.splits import DATASETS, DataSet
from tests.m4_files import write_m4
from tests.published import PATTERNS, PUBLISHED, FlagSet
from tests.realdata import ROOT
from utils.flags import parse_flags, run_name

BATCHES = 2
RECIPE = dict.fromkeys((given.script for given in PUBLISHED), ["--recipe", "published"])  # ours say so themselves
OURS = []  # the flag sets of this repository's scripts on the ETT files
for script in sorted((ROOT / "scripts").glob("TimeLLM_ETT*.sh")):
    call = re.search(r"run_(ett|transfer) (\w+)(?: (\w+))? \\\n(.*?)\s*\"\$@\"", script.read_text(), re.DOTALL)
    _, first, second, flags = call.groups()
    sets = f"--data_pretrain {first} --data {second}" if second else f"--data {first}"
    words = f"{sets} --data_path {second or first}.csv {flags}".replace("\\", " ")
    OURS.append(FlagSet(script.name, "run_pretrain.py" if second else "run_main.py", words))


@pytest.mark.parametrize("given", PUBLISHED, ids=lambda given: f"{given.script} {given.text[-60:]}")
def test_every_word_is_taken_as_it_stands(given: FlagSet) -> None:
    args, words = parse_flags(given.text.split(), given.program), given.text.split()
    for flag in {word for word in words if word.startswith("--")} - {"--label_len"}:
        held = getattr(args, flag.removeprefix("--"))
        assert held == type(held)(given.value(flag)), flag
    assert args.patience == int(given.value("--patience") or {"run_pretrain.py": 5}.get(given.program, 10))
    if given.program == "run_m4.py":
        H = PATTERNS[args.seasonal_patterns]
        assert (args.pred_len, args.seq_len, args.label_len, args.loss) == (H, 2 * H, H, "SMAPE")
        return
    assert args.label_len == min(int(given.value("--label_len")), args.seq_len)


# Of each script the longest horizon: with the others its flags are the same. Of M4 the shortest and the longest.
RUN = {given.script: given for given in PUBLISHED} | {"M4": next(g for g in PUBLISHED if g.program == "run_m4.py")}


@pytest.mark.parametrize("given", [*RUN.values(), *OURS], ids=lambda given: given.script)
def test_it_runs(given: FlagSet, backbones: dict[str, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    """All flags as published, but for what a test has: the language model and its size, the data's size, few iterations."""
    words = [
        *given.text.split(), *RECIPE.get(given.script, []), "--root_path", tmp_path, "--checkpoints", tmp_path / "runs",
        "--enc_in", 1, "--device", "cpu", "--num_workers", 0, "--llm_model_path", backbones["qwen2"], "--llm_layers", 1,
        "--max_iters", BATCHES, "--train_epochs", 1, "--plots", 0, "--torch_checkpoint", 0,
    ]  # fmt: skip
    words += ["--llm_dim", 128, "--load_in_4bit", "False"] if "--llm_dim" in words else []
    args = parse_flags(list(map(str, words)), given.program)
    if args.data == "m4":
        write_m4(tmp_path, args.seasonal_patterns, lengths=(2 * args.seq_len,) * args.batch_size)
    else:
        # Two training steps, two windows to validate and two to test.
        train, other = args.seq_len + args.pred_len + BATCHES * args.batch_size, args.pred_len + 1
        hours = pd.date_range("2020-01-01", periods=train + 2 * other, freq="h")
        wave = np.sin(np.arange(len(hours)) / 4) + np.random.default_rng(0).standard_normal(len(hours)) / 10
        for data, file in ((args.data, args.data_path), (args.data_pretrain, args.data_path_pretrain)):
            if data is not None:
                monkeypatch.setitem(DATASETS, data, DataSet((train, other, other)))
                pd.DataFrame({"date": hours, "OT": wave}).to_csv(tmp_path / file, index=False)
    assert run_main.main(list(map(str, words)), given.program) == 0
    lines = capsys.readouterr().out.splitlines()
    assert args.data == "m4" or {"val 2", "test 2"} <= set(lines)
    assert any(line.startswith("recipe published: ") for line in lines) == (args.recipe == "published")
    assert any(line.startswith("Test SMAPE: " if args.data == "m4" else "Test MSE: ") for line in lines)
    (folder,) = (tmp_path / "runs").iterdir()
    forecasts = f"{args.seasonal_patterns}_forecast.csv" if args.data == "m4" else "predictions.npz"
    assert folder.name == run_name(args, 0)
    assert {"checkpoint.safetensors", "metrics.json", forecasts} <= {path.name for path in folder.iterdir()}
