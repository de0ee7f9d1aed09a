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
OURS = []  # the flag sets of this repository's scripts on the ETT files
for script in sorted((ROOT / "scripts").glob("TimeLLM_ETT*.sh")):
    call = re.search(r"run_(ett|transfer) (\w+)(?: (\w+))? \\\n(.*?)\s*\"\$@\"", script.read_text(), re.DOTALL)
    _, first, second, flags = call.groups()
    sets = f"--data_pretrain {first} --data {second}" if second else f"--data {first}"
    words = f"{sets} --data_path {second or first}.csv {flags}".replace("\\", " ")
    OURS.append(FlagSet(script.name, "run_pretrain.py" if second else "run_main.py", words))


def name(given: FlagSet) -> str:
    """For a test's title."""
    return "-".join(filter(None, (given.script, given.value("--pred_len"), given.value("--seasonal_patterns"))))


@pytest.mark.parametrize("given", PUBLISHED, ids=name)
def test_every_word_is_taken_as_it_stands(given: FlagSet) -> None:
    args, words = parse_flags(given.text.split(), given.program), given.text.split()
    for flag in {word for word in words if word.startswith("--")} - {"--label_len"}:
        held = getattr(args, flag.removeprefix("--"))
        assert held == type(held)(given.value(flag)), flag
    assert args.patience == int(given.value("--patience") or {"run_pretrain.py": 5}.get(given.program, 10))
    if given.program == "run_m4.py":
        H = PATTERNS[args.seasonal_patterns]
        assert (args.pred_len, args.seq_len, args.label_len) == (H, 2 * H, H)
        return
    assert args.label_len == min(int(given.value("--label_len")), args.seq_len)
    # The published code's name of the run, whose folder it has.
    lengths = f"ftM_sl512_ll{args.label_len}_pl{args.pred_len}_dm{args.d_model}"
    folder = run_name(args, 0)
    assert folder.startswith(f"long_term_forecast_{args.model_id}_{args.model}_{args.data}_{lengths}_")
    assert folder.endswith(f"_0-{args.model_comment}")


def test_the_table_has_every_script_of_the_family() -> None:
    names = "ETTh1 ETTh2 ETTm1 ETTm2 ETTh1_ETTh2 ECL Traffic Weather".split()
    scripts = [given.script for given in PUBLISHED]
    assert {script: scripts.count(script) for script in scripts} == (
        {f"TimeLLM_{name}.sh": 4 for name in names} | {"TimeLLM_M4.sh": 6}
    )
    assert len(OURS) == 8


# Of each script the first horizon and the last one: between them its flags are the same. Of M4 every pattern.
RUN = {given.script: given for given in reversed(PUBLISHED)} | {f"{g.script} last": g for g in PUBLISHED}
RUN |= {name(given): given for given in PUBLISHED if given.program == "run_m4.py"}


@pytest.mark.parametrize("given", [*{id(g): g for g in RUN.values()}.values(), *OURS], ids=name)
def test_it_runs(given: FlagSet, backbones: dict[str, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    """All flags as published, but for what a test has: the language model and its size, the data's size, few iterations."""
    words = [
        *given.text.split(), "--root_path", tmp_path, "--checkpoints", tmp_path / "runs", "--enc_in", 1, "--device", "cpu",
        "--num_workers", 0, "--llm_model_path", backbones["qwen2"], "--llm_layers", 1, "--max_iters", BATCHES,
        "--train_epochs", 1, "--plots", 0, "--torch_checkpoint", 0,
    ]  # fmt: skip
    words += ["--llm_dim", 128, "--load_in_4bit", "False"] if "--llm_dim" in words else []
    args, kept = parse_flags(list(map(str, words)), given.program), {"checkpoint.safetensors", "metrics.json"}
    if args.data == "m4":
        write_m4(tmp_path, args.seasonal_patterns, lengths=(2 * args.seq_len,) * args.batch_size)
        kept |= {f"{args.seasonal_patterns}_forecast.csv"}
    else:
        kept |= {"predictions.npz"}
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
    assert any(line.startswith("Test SMAPE: " if args.data == "m4" else "Test MSE: ") for line in lines)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == run_name(args, 0) and kept <= {path.name for path in folder.iterdir()}
