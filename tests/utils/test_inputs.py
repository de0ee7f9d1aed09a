"""What is refused before torch is loaded, in the words in which the set-up refuses it; and what a forecast does not load."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import layers.backbone
from layers.errors import InputError
from models import MODELS, _read_switches, model_class
from tests.realdata import ROOT
from tests.small_run import run_folder, train, write_csv
from utils.command_line import parse_flags
from utils.inputs import check_inputs
from utils.run import main

SLOW = {"torch", "transformers", "accelerate", "safetensors", "sklearn", "scipy", "matplotlib"}
TABLES = {"numpy", "pandas"}
SWITCHES = ("uses_llm", "channel_independent", "whole_batches", "is_trained", "reads_masks")


def python(code: str, *words: str) -> tuple[Any, set[str], str]:
    """Run `code` in a process of its own: what it leaves as `found`, the packages loaded by then, its stderr."""
    code += "\nprint()\nprint(json.dumps([found, [m for m in sys.modules if '.' not in m]]))"
    done = subprocess.run(
        [sys.executable, "-c", "import json, sys\n" + code, *words], cwd=ROOT, capture_output=True, text=True,
        timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, loaded = json.loads(done.stdout.splitlines()[-1])
    return found, set(loaded), done.stderr


PROGRAM = """
import run_main
try:
    found = run_main.main(sys.argv[1:])
except SystemExit as stop:
    found = stop.code
"""


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--seq_len", "x"], 2), (["--bacth_size", "4"], 2)])
def test_help_and_a_wrong_flag_load_nothing(words: list[str], code: int) -> None:
    found, loaded, err = python(PROGRAM, *words)
    assert found == code and bool(err) == bool(code)
    assert not loaded & (SLOW | TABLES)


FLAGS = {
    "an even average": ({"moving_avg": 24}, "--moving_avg: got 24"),
    "no language model to replace": ({"model": "DLinear", "llm_ablation": "none"}, "--llm_ablation: got none"),
    "batches taken whole": ({"model": "PatchTST", "max_sequences": 8}, "--max_sequences: got 8"),
    "a model of all channels": ({"model": "Autoformer", "features": "MS"}, "--features: got MS"),
    "drawn in 4 bits": ({"llm_ablation": "random", "load_in_4bit": True}, "--llm_ablation random: got it with"),
    "no data": ({"data_path": "missing.csv"}, "missing.csv: got no such file"),
    "no checkpoint": ({"is_training": 0}, "got no checkpoint, expected"),
    "no checkpoint there": ({"is_training": 0, "checkpoint": "nothing/here"}, "nothing/here: got no checkpoint"),
    "no language model": ({"llm_model_path": "./nowhere"}, "--llm_model_path: got no weights in ./nowhere"),
}  # fmt: skip


def cut_short(folder: Path) -> None:
    """As a download leaves a file that was broken off."""
    shard = max(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


HALVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "got no config.json, expected"),
    "broken configuration": (lambda folder: (folder / "config.json").write_text("{"), "got a config.json that cannot be"),
    "no configuration in it": (lambda folder: (folder / "config.json").write_text("[]"), "got a config.json that cannot be"),
    "another family": (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'), "a model of type gpt2"),
    "a shard is missing": (lambda folder: max(folder.glob("*.safetensors")).unlink(), ".safetensors, expected safetensors"),
    "a shard is cut short": (cut_short, "cut short or damaged"),
    "no tokenizer": (lambda folder: (folder / "tokenizer_config.json").unlink(), "got no tokenizer_config.json"),
}  # fmt: skip


def check_refused_early(words: list[str], line: str, allowed: frozenset[str] = frozenset()) -> None:
    """The program refuses `words` without what is slow to load, and the set-up in the same words."""
    found, loaded, err = python(PROGRAM, *words)
    assert found == 2 and err.startswith("run_main.py: error: ") and err.count("\n") == 1
    assert line in err
    assert not loaded & ((SLOW | TABLES) - allowed)
    with pytest.raises(InputError) as caught:
        main(parse_flags(words))
    assert err == f"run_main.py: error: {caught.value}\n"


@pytest.mark.parametrize("case", FLAGS)
def test_contradictions_and_missing_files_are_refused_before_torch_is_loaded(argv, case: str) -> None:
    flags, line = FLAGS[case]
    check_refused_early(argv(**flags), line)


@pytest.mark.parametrize("case", HALVES)
def test_half_a_language_model_is_refused_before_torch_is_loaded(argv, backbones, tmp_path: Path, case: str) -> None:
    spoil, line = HALVES[case]
    folder = Path(shutil.copytree(backbones["qwen2"], tmp_path / "half"))
    spoil(folder)
    check_refused_early(argv(llm_model_path=folder), line)


def test_a_missing_description_is_refused_before_torch_is_loaded(argv) -> None:
    check_refused_early(argv(prompt_domain=1), "--prompt_domain: got 1, expected a file series.txt", frozenset(TABLES))


def test_what_is_sound_or_may_be_on_the_hub_is_let_through(argv, monkeypatch, tmp_path: Path) -> None:
    check_inputs(parse_flags(argv()))
    check_inputs(parse_flags(argv(model="DLinear", llm_model_path="./nowhere")))  # which it does not read
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name))
    check_inputs(parse_flags(argv(llm_model_path="owner/name")))
    assert not asked  # before the data are read nothing is fetched


def test_a_models_switches_are_the_same_read_as_text() -> None:
    code = f"import models\nfound = {{n: [getattr(models.traits(n), s) for s in {SWITCHES}] for n in models.MODELS}}"
    found, loaded, _ = python(code)
    assert found == {name: [getattr(model_class(name), switch) for switch in SWITCHES] for name in MODELS}
    assert not loaded & (SLOW | TABLES)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("uses_llm: bool = True", True),
        ("uses_llm = is_trained = True", True),
        ("prompts = None", False),
        ("uses_llm = not False", None),
        ("if True:\n        uses_llm = True", None),
    ],
)
def test_a_models_switches_are_read_where_the_text_tells_them(tmp_path: Path, body: str, told: bool | None) -> None:
    file = tmp_path / "Other.py"
    file.write_text(f"class Model(Forecaster):\n    {body}\n")
    found = _read_switches(file)
    assert found == (None if told is None else dict(zip(SWITCHES, (told, True, False, True, False), strict=True)))


def test_a_models_switches_may_come_from_another_model(tmp_path: Path) -> None:
    (tmp_path / "Child.py").write_text("from models import Ridge\n\nclass Model(Ridge.Model):\n    whole_batches = True\n")
    shutil.copy(ROOT / "models" / "forecaster.py", tmp_path)
    code = "import models, pathlib\nmodels.FOLDER = pathlib.Path(sys.argv[1])\nmodels.__path__.append(sys.argv[1])\n"
    found, _, _ = python(code + f"found = [getattr(models.traits('Child'), s) for s in {SWITCHES}]", str(tmp_path))
    assert found == [False, True, True, False, True]


FORECASTS = """
import gc, run_main
from pathlib import Path
found = [run_main.main(sys.argv[1:]), sorted(sys.modules), gc.isenabled(), gc.get_freeze_count()]
found += [run_main.main([*sys.argv[1:], "--plots", "1"]), gc.get_freeze_count()]
"""


def test_a_forecast_of_a_file_that_has_grown_loads_and_does_no_more_than_it_takes(argv, capsys, tmp_path: Path) -> None:
    words = argv(max_iters=1, plots=0)
    train(words, capsys)
    folder = run_folder(words)
    checkpoint = (folder / "checkpoint.safetensors").read_bytes()
    rows = (tmp_path / "series.csv").read_text().splitlines()
    grown = write_csv(tmp_path / "more.csv", rows=400).read_text().splitlines()
    (tmp_path / "series.csv").write_text("\n".join(rows + grown[len(rows) :]) + "\n")

    asked = argv(is_training=0, do_predict=True, plots=0)
    (code, modules, collects, frozen, drawn, frozen_later), loaded, _ = python(FORECASTS, *asked)
    assert (code, drawn) == (0, 0)
    for package in ("matplotlib", "sklearn", "bitsandbytes", "datasets", "tensorboard"):
        assert package not in modules
    assert "matplotlib" in loaded  # which the pictures need, so the names above are those of packages
    assert collects and frozen >= frozen_later > 100_000  # once: some of them are gone later, and none has come

    assert (folder / "checkpoint.safetensors").read_bytes() == checkpoint
    dates = pd.read_csv(folder / "forecast.csv", parse_dates=["date"])["date"]
    assert dates[0] == pd.Timestamp(grown[-1].split(",")[0]) + pd.Timedelta(hours=1)


def test_a_forecast_reads_the_tokenizer_once(argv, capsys, monkeypatch) -> None:
    train(argv(max_iters=1, plots=0), capsys)
    read: list[Path] = []
    load = layers.backbone._load_tokenizer
    monkeypatch.setattr(layers.backbone, "_load_tokenizer", lambda folder: read.append(folder) or load(folder))
    lines = train(argv(is_training=0, do_predict=True, plots=0), capsys)
    assert lines[-1].startswith("Forecast saved at") and len(read) == 1
