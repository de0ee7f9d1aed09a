"""Command lines of the published scripts, and of this repository's: parsed as they stand, and run on a small file."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import run_main
from data_provider.splits import DATASETS, DataSet
from tests.m4_files import write_m4
from tests.published import PUBLISHED, FlagSet
from tests.realdata import ROOT
from utils.command_line import parse_flags
from utils.flags import run_name

SETS = [each for each in PUBLISHED if each.program != "run_m4.py"]
M4 = [each for each in PUBLISHED if each.program == "run_m4.py"]
BATCHES = 2


def ours() -> list[FlagSet]:
    """The flag sets of this repository's scripts on the ETT files."""
    found = []
    for script in sorted((ROOT / "scripts").glob("TimeLLM_ETT*.sh")):
        call = re.search(r"run_(ett|transfer) (\w+)(?: (\w+))? \\\n(.*?)\s*\"\$@\"", script.read_text(), re.DOTALL)
        kind, first, second, flags = call.groups()
        target = second or first
        source = f"--data_pretrain {first} " if kind == "transfer" else ""
        program = "run_pretrain.py" if source else "run_main.py"
        words = f"{source}--data {target} --data_path {target}.csv {flags}".replace("\\", " ")
        found.append(FlagSet(script.name, program, target, 96, words))
    return found


OURS = ours()


def value(words: list[str], flag: str) -> str | None:
    """The last value of a flag; None where it is left out."""
    places = [place for place, word in enumerate(words) if word == flag]
    return words[places[-1] + 1] if places else None


@pytest.mark.parametrize("given", SETS, ids=lambda given: given.name)
def test_every_word_is_taken_as_it_stands(given: FlagSet) -> None:
    words = given.words
    args = parse_flags(words, given.program)
    for flag in {word for word in words if word.startswith("--")} - {"--data", "--label_len"}:
        held = getattr(args, flag.removeprefix("--"))
        assert held == type(held)(value(words, flag)), flag
    assert args.label_len == min(int(value(words, "--label_len")), args.seq_len)
    # The published code's name of the run, whose folder it has.
    tagged = [args.model_id, args.model, args.data, f"ftM_sl512_ll{args.label_len}_pl{given.horizon}", f"dm{args.d_model}"]
    name = run_name(args, 0)
    assert name.startswith("long_term_forecast_" + "_".join(tagged)) and name.endswith(f"_0-{args.model_comment}")
    assert args.patience == int(value(words, "--patience") or {"run_main.py": 10, "run_pretrain.py": 5}[given.program])


def test_the_table_has_every_script_of_the_family() -> None:
    names = "ETTh1 ETTh2 ETTm1 ETTm2 ETTh1_ETTh2 ECL Traffic Weather".split()
    counts = {script: sum(each.script == script for each in PUBLISHED) for script in {each.script for each in PUBLISHED}}
    assert counts == {f"TimeLLM_{name}.sh": 4 for name in names} | {"TimeLLM_M4.sh": 6}
    assert len(OURS) == len(list((ROOT / "scripts").glob("TimeLLM_ETT*.sh"))) and all(each.words for each in OURS)


@pytest.mark.parametrize("given", [*SETS, *OURS], ids=lambda given: given.name)
def test_it_runs(given: FlagSet, backbones: dict[str, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    """All flags as published, but for what a test has: the language model and its size, the data's size, few iterations."""
    T, H, B = (int(value(given.words, f"--{name}")) for name in ("seq_len", "pred_len", "batch_size"))
    train, other = T + H + BATCHES * B, H + 1  # two training steps, two windows to validate and two to test
    hours = pd.date_range("2020-01-01", periods=train + 2 * other, freq="h")
    wave = np.sin(np.arange(len(hours)) / 4) + np.random.default_rng(0).standard_normal(len(hours)) / 10
    for flag, name in (("--data", "--data_path"), ("--data_pretrain", "--data_path_pretrain")):
        data = value(given.words, flag)
        if data is not None:
            monkeypatch.setitem(DATASETS, data, DataSet((train, other, other)))
            file = value(given.words, name) or f"{data}.csv"
            pd.DataFrame({"date": hours, "OT": wave}).to_csv(tmp_path / file, index=False)
    words = [
        *given.words, "--root_path", tmp_path, "--checkpoints", tmp_path / "runs", "--enc_in", 1, "--device", "cpu",
        "--num_workers", 0, "--llm_model_path", backbones["qwen2"], "--llm_layers", 1, "--max_iters", BATCHES,
        "--train_epochs", 1, "--plots", 0, "--torch_checkpoint", 0,
    ]  # fmt: skip
    words += ["--llm_dim", 128, "--load_in_4bit", "False"] if "--llm_dim" in words else []
    assert run_main.main(list(map(str, words)), given.program) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"val 2", "test 2"} <= set(lines) and any(line.startswith("Test MSE: ") for line in lines)
    (folder,) = (tmp_path / "runs").iterdir()
    assert {"checkpoint.safetensors", "metrics.json", "predictions.npz"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "given", M4, ids=lambda given: given.name + given.words[given.words.index("--seasonal_patterns") + 1]
)
def test_the_competitions_sets_run(given: FlagSet, backbones: dict[str, Path], tmp_path: Path, capsys) -> None:
    """As above; the competition's files have a batch of series here, all long enough for a window."""
    pattern, B, H = value(given.words, "--seasonal_patterns"), int(value(given.words, "--batch_size")), given.horizon
    write_m4(tmp_path / "m4", pattern, lengths=(4 * H,) * B)
    words = [
        *given.words, "--root_path", tmp_path / "m4", "--checkpoints", tmp_path / "runs", "--device", "cpu",
        "--num_workers", 0, "--llm_model_path", backbones["qwen2"], "--llm_layers", 1, "--max_iters", BATCHES,
        "--train_epochs", 1, "--plots", 0, "--torch_checkpoint", 0,
    ]  # fmt: skip
    words += ["--llm_dim", 128, "--load_in_4bit", "False"] if "--llm_dim" in words else []
    args = parse_flags(list(map(str, words)), given.program)
    assert (args.pred_len, args.seq_len, args.patience, args.loss) == (H, 2 * H, 10, "SMAPE")
    assert run_main.main(list(map(str, words)), given.program) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"short_term_forecast_m4_{pattern}_TimeLLM_m4_")
    assert {"checkpoint.safetensors", "metrics.json", f"{pattern}_forecast.csv"} <= {path.name for path in folder.iterdir()}
    assert any(line.startswith("Test SMAPE: ") for line in capsys.readouterr().out.splitlines())
