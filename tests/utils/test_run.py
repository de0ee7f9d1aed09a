"""A run as a user sees it: its folders, its record, what is refused, the language models it runs with."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import utils.run
import utils.saving.checkpoint
import utils.saving.files
import utils.saving.state
from data_provider.data_factory import series_from_args
from layers.backbone import find_backbone
from layers.errors import InputError
from models.TimeLLM import Model
from scripts.make_backbone import make_backbone
from tests.models.test_TimeLLM import TRAINED
from tests.small_run import COLUMNS, command_line, figures, run_folder, train, write_csv
from utils.flags import parse_flags


def test_each_repeat_has_its_folder_and_its_seed(argv, capsys) -> None:
    words = argv(itr=2, max_iters=3)
    lines = train(words, capsys)
    folders = [run_folder(words, repeat) for repeat in (0, 1)]
    assert [f"Checkpoints saved at: {folder}" for folder in folders] == [x for x in lines if x.startswith("Checkpoints")]
    first, second = (load_file(folder / "checkpoint.safetensors") for folder in folders)
    assert not any(torch.equal(first[name], second[name]) for name in TRAINED)
    assert sum(line.startswith("Test MSE") for line in lines) == 2


def test_the_largest_seed_has_a_repeat(argv, capsys) -> None:
    lines = train(argv(itr=2, max_iters=1, seed=2**32 - 1), capsys)
    assert sum(line.startswith("Test MSE") for line in lines) == 2


def test_a_changed_file_is_refused_and_the_line_says_how_to_start_anew(argv, capsys, tmp_path: Path) -> None:
    words = argv(max_iters=1, resume=True)
    train(words, capsys)
    write_csv(tmp_path / "series.csv", seed=1)
    with pytest.raises(InputError, match="the data's values .* or start anew with --resume False"):
        train(words, capsys)
    assert any("held an earlier run" in line for line in train([*words, "--resume", "False"], capsys))


def test_an_earlier_run_is_moved_aside(argv, capsys) -> None:
    words = argv(max_iters=1)
    folder = run_folder(words)
    kept = []
    for number in range(3):
        lines = train([*words, "--seed", str(number)], capsys)
        if number:
            aside = folder.with_name(f"{folder.name}.{number}")
            assert f"The folder held an earlier run, now in: {aside}" in lines
            assert (aside / "checkpoint.safetensors").read_bytes() == kept[-1]
            assert (aside / "train.log").is_file()
        kept.append((folder / "checkpoint.safetensors").read_bytes())
    assert len(set(kept)) == 3


def test_record_of_a_checkpoint(argv, backbones, capsys, tmp_path: Path) -> None:
    words = argv(max_iters=1, features="MS")
    train(words, capsys)
    folder = run_folder(words)
    record = json.loads((folder / "checkpoint.json").read_text())
    args = parse_flags(words)
    series = series_from_args(args)
    filled = {"enc_in": 3, "llm_dim": 128, "prompt_text": record["flags"]["prompt_text"]}
    assert "one series" in filled["prompt_text"]
    assert filled.items() <= record["flags"].items()
    # Where and how a run is saved is not in it: one that was stopped and resumed leaves the same checkpoint.
    left_out = {
        "resume", "save_steps", "log_every", "checkpoints", "checkpoint", "do_predict", "predict_path", "predict_steps",
        "save_predictions", "plots", "tensorboard", "torch_checkpoint", "intervals", "append",
    }  # fmt: skip
    assert record["flags"] == {k: v for k, v in vars(args).items() if k not in left_out} | filled
    assert record["columns"] == list(COLUMNS)
    training = pd.read_csv(tmp_path / "series.csv")[list(COLUMNS)].to_numpy()[:224]
    np.testing.assert_allclose(record["scaler"]["mean"], training.mean(0), rtol=1e-9)
    np.testing.assert_allclose(record["scaler"]["deviation"], training.std(0), rtol=1e-9)
    data = dict(record["data"])
    mark = data.pop("mark")
    assert mark["rows"] == len(training) and len(mark["sha256"]) == 64
    assert data == {"file": "series.csv", "rows": len(series.dates), "synthetic": False, "step": "1 hour"}
    identity = find_backbone("QWEN", str(backbones["qwen2"])).identity
    assert record["backbone"] == identity | {"layers": 1, "load_in_4bit": False}
    assert {"python", "torch", "transformers", "accelerate", "numpy"} <= set(record["versions"])
    assert record["versions"]["torch"] == torch.__version__
    assert math.isfinite(record["vali_loss"])
    with safe_open(folder / "checkpoint.safetensors", "pt") as held:
        header = json.loads(held.metadata()["record"])
        assert header.pop("intervals") == {"levels": [80.0], "windows": 25} and header == record
        assert set(held.keys()) == {*TRAINED, "intervals.offsets"}
    size = sum(t.numel() for t in load_file(folder / "checkpoint.safetensors").values()) * 4
    assert (folder / "checkpoint.safetensors").stat().st_size < size + 10_000  # nothing of the backbone in it


def test_the_best_weights_are_there_for_torch_load(argv, capsys) -> None:
    words = argv(max_iters=1)
    train(words, capsys)
    folder = run_folder(words)
    tensors, same = load_file(folder / "checkpoint.safetensors"), torch.load(folder / "checkpoint")
    assert set(TRAINED) == same.keys() and all(torch.equal(tensors[name], same[name]) for name in TRAINED)
    (folder / "checkpoint").unlink()
    train([*words, "--is_training", "0"], capsys)
    train([*words, "--torch_checkpoint", "0"], capsys)
    assert not (folder / "checkpoint").exists() and (folder / "checkpoint.safetensors").is_file()


def test_other_weights_are_noticed(argv, backbones, capsys, tmp_path: Path) -> None:
    """A checkpoint is told from one that was trained on another language model of the same shape."""
    words = argv(max_iters=1)
    train(words, capsys)
    other = make_backbone(tmp_path / "other", seed=5)
    lines = train([*words, "--is_training", "0", "--llm_model_path", str(other)], capsys)
    assert sum(line.startswith("WARNING: the checkpoint was trained on") for line in lines) == 1
    lines = train([*words, "--is_training", "0"], capsys)
    assert not any(line.startswith("WARNING") for line in lines)


def test_a_batch_larger_than_the_training_split_is_refused_where_it_is_used(argv, capsys) -> None:
    words = argv(max_iters=1)
    lines = train(words, capsys)
    larger = [*words, "--batch_size", "186"]
    assert figures(train([*larger, "--is_training", "0"], capsys)) == figures(lines)
    with pytest.raises(InputError, match="--batch_size: got 186, expected at most 185, for 185 training windows"):
        train(larger, capsys)


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", {}), ("gpt2", {}), ("bert", {}), ("qwen2", {"prototypes": "direct"}),
        ("qwen2", {"load_in_4bit": True}), ("qwen2", {"fast_path": "plain"}), ("qwen2", {"max_sequences": 7}),
    ],
)  # fmt: skip
def test_other_backbones_and_ways_to_run(backbones, capsys, tmp_path: Path, family: str, flags: dict) -> None:
    name = {"qwen2": "QWEN"}.get(family, family.upper())
    words = command_line(tmp_path, backbones[family], llm_model=name, max_iters=2, **flags)
    lines = train(words, capsys)
    path = "plain" if family == "bert" or "fast_path" in flags else "fast"
    assert any(line.endswith(f"{path} path") for line in lines)
    assert figures(train([*words, "--is_training", "0"], capsys)) == figures(lines)


def test_a_test_reads_the_header_twice_and_outlines_the_model_once(argv, capsys, monkeypatch) -> None:
    """Once for the flags, before torch is loaded, and once for all else."""
    words = argv(max_iters=1)
    lines = train(words, capsys)
    headers, devices = [], []
    read_header, make = utils.saving.files.read_header, Model.__init__

    def counted_read(file):
        headers.append(file)
        return read_header(file)

    def counted_make(self, *args, **kwargs):
        make(self, *args, **kwargs)
        devices.append(next(self.parameters()).device.type)

    for module in (utils.saving.files, utils.saving.checkpoint):
        monkeypatch.setattr(module, "read_header", counted_read)
    monkeypatch.setattr(Model, "__init__", counted_make)
    for place in (run_folder(words), run_folder(words) / "checkpoint.safetensors"):
        assert figures(train(["--is_training", "0", "--checkpoint", str(place)], capsys)) == figures(lines)
        assert headers == [run_folder(words) / "checkpoint.safetensors"] * 2 and devices == ["meta", "cpu"]
        headers.clear(), devices.clear()
