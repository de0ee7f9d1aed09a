"""Whatever is wrong with a command line or a file: one line, exit code 2, and no weight was loaded."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import layers.backbone
import run_main
from tests.small_run import ROWS, command_line, refusal, run_folder, write_csv
from utils import validate
from utils.command_line import parse_flags
from utils.saving.checkpoint import shapes_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_weights(backbones, monkeypatch, tmp_path: Path) -> Path:
    """A backbone whose weights cannot be loaded; who tries fails the test."""

    def fail(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(layers.backbone, "_load", fail)
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", fail)
    folder = Path(shutil.copytree(backbones["qwen2"], tmp_path / "backbone"))
    for shard in folder.glob("*.safetensors"):
        shard.write_bytes(b"\2\0\0\0\0\0\0\0{}")  # a header, and no tensor
    return folder


@pytest.fixture
def refuse(no_weights, tmp_path: Path, capsys):
    """`refuse(**flags)`: the one line on stderr of that run."""

    def refused(**flags: object) -> str:
        line = refusal(command_line(tmp_path, no_weights, **flags), capsys)
        assert not run_folder(command_line(tmp_path, no_weights)).exists()
        return line

    return refused


def test_the_guard_itself(no_weights, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="weights were loaded"):
        run_main.main(command_line(tmp_path, no_weights))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"bacth_size": 4}, ["--bacth_size", "--batch_size"]),
        ({"features": "X"}, ["--features", "'X'", "M, S, MS"]),
        ({"d_model": 0}, ["--d_model", "'0'"]),
        ({"llm_model": "MISTRAL"}, ["--llm_model", "'MISTRAL'", "QWEN"]),
        ({"data_path": "missing.csv"}, ["--data_path", "missing.csv", "no such file"]),
        ({"data_path": "two\nlines.csv"}, ["--data_path", "two\\nlines.csv", "no such file"]),
        ({"features": "S", "target": "heat"}, ["--target", "'heat'", "load, flow, OT"]),
        ({"features": "MS", "target": "heat"}, ["--target", "'heat'", "load, flow, OT"]),
        ({"seq_len": 12}, ["--seq_len", "12", "patch", "16"]),
        ({"seq_len": 217, "label_len": 0}, ["--seq_len 217", "train", "224", "series.csv"]),
        ({"pred_len": 33}, ["--pred_len 33", "val", "32"]),
        ({"seq_len": 32, "pred_len": 65}, ["--pred_len 65", "val"]),
        ({"percent": 1}, ["--percent 1", "train"]),
        ({"batch_size": 186}, ["--batch_size", "186", "185"]),
        ({"enc_in": 7}, ["--enc_in", "7", "expected 3"]),
        ({"enc_in": 3, "features": "S"}, ["--enc_in", "3", "expected 1"]),
        ({"llm_dim": 2048}, ["--llm_dim", "2048", "expected 128"]),
        ({"llm_layers": 3}, ["--llm_layers", "3", "at most 2"]),
        ({"d_ff": 129}, ["--d_ff", "129", "128"]),
        ({"llm_model": "LLAMA"}, ["--llm_model LLAMA", "qwen2"]),
        ({"llm_model_path": "./nowhere"}, ["--llm_model_path", "./nowhere", "hf download"]),
        ({"prompt_domain": 1}, ["--prompt_domain", "series.txt"]),
        ({"data": "ETTh1"}, ["--data ETTh1", "320", "14400"]),
        ({"is_training": 0}, ["--checkpoint", "--is_training 1", "small"]),
        ({"is_training": 0, "checkpoint": "nothing/here"}, ["--checkpoint", "nothing/here"]),
    ],
)  # fmt: skip
def test_flags(refuse, flags: dict, words: list[str]) -> None:
    line = refuse(**flags)
    assert all(word in line for word in words), line


def test_no_gpu_where_one_is_asked_for(refuse, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda" in refuse(device="cuda")


def changed(line: int, old: str, new: str):
    """Changes one cell; lines are counted as in an editor, the header is line 1."""

    def change(text: str) -> str:
        lines = text.split("\n")
        assert old in lines[line - 1]
        lines[line - 1] = lines[line - 1].replace(old, new, 1)
        return "\n".join(lines)

    return change


def cell(line: int, column: int, value: str):
    def change(text: str) -> str:
        lines = text.split("\n")
        cells = lines[line - 1].split(",")
        cells[column] = value
        lines[line - 1] = ",".join(cells)
        return "\n".join(lines)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(1, "date", "day"), ["date"]),
        (cell(20, 2, "broken"), ["row 20", "'flow'", "'broken'"]),
        (cell(300, 3, "NaN"), ["row 300", "'OT'"]),
        (cell(7, 1, ""), ["row 7", "'load'"]),
        (cell(7, 1, "inf"), ["row 7", "'load'"]),
        (cell(9, 0, "some day"), ["row 9", "'date'", "'some day'"]),
        (cell(9, 0, "2019-01-01 00:00:00"), ["row 9", "'date'", "2019-01-01 00:00:00"]),
        (lambda text: "\n".join(text.split("\n")[:61]) + "\n", ["--seq_len 32", "val", "6"]),
        (lambda text: text.split("\n")[0] + "\n", ["rows"]),
        (lambda text: "", ["empty"]),
    ],
    ids=[
        "no date",
        "text",
        "NaN",
        "empty cell",
        "infinite",
        "timestamp",
        "order",
        "short",
        "header only",
        "empty",
    ],
)
def test_files(refuse, tmp_path: Path, change, words: list[str]) -> None:
    csv = write_csv(tmp_path / "series.csv")
    csv.write_text(change(csv.read_text()))
    line = refuse()
    assert "series.csv" in line and all(word in line for word in words), line


def test_checkpoint_of_another_shape(refuse, no_weights, tmp_path: Path) -> None:
    """Seen in the header alone: the tensors themselves are cut off."""
    args = parse_flags(command_line(tmp_path, no_weights))
    shapes = shapes_of(outline(args, check_model(args)))
    file = tmp_path / "checkpoint.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    content = file.read_bytes()
    file.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
    for flags, name in (
        ({"pred_len": 9}, "output_projection"), ({"d_model": 16}, "tokenConv"),
        ({"n_heads": 4}, "reprogramming_layer"),
        ({"prototypes": "direct"}, "mapping_layer"),
    ):  # fmt: skip
        line = refuse(is_training=0, checkpoint=file, **flags)
        assert str(file) in line and name in line
        assert next(iter(flags)) in line  # which flag decides about it


@pytest.mark.parametrize("flags", [{"load_in_4bit": True}, {"optimizer": "adamw8bit"}])
def test_without_bitsandbytes(refuse, monkeypatch, flags: dict) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest):
        return None if name == "bitsandbytes" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert "bitsandbytes" in refuse(**flags)


def test_weights_that_are_not_there(refuse, no_weights) -> None:
    shard = next(no_weights.glob("*.safetensors"))
    shard.unlink()
    assert shard.name in refuse()


@pytest.mark.parametrize("content", ["", "{", "{}", '{"weight_map": 3}', "[]"])
def test_unreadable_index(refuse, no_weights, content: str) -> None:
    (no_weights / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refuse()


@pytest.mark.parametrize("content", [None, "", "{}", "[]"])
def test_unreadable_tokenizer(refuse, no_weights, content: str | None) -> None:
    if content is None:
        (no_weights / "tokenizer.json").unlink()
    else:
        (no_weights / "tokenizer.json").write_text(content)
    assert "tokenizer" in refuse()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"model_type": "qwen2", "hidden_size": "wide"}',
    ],
)
def test_unreadable_configuration(refuse, no_weights, content: str) -> None:
    (no_weights / "config.json").write_text(content)
    assert "config.json" in refuse()


def test_as_a_program(backbones, tmp_path: Path) -> None:
    """The same through the real entry: code 2, one line, nothing else."""
    backbone = Path(shutil.copytree(backbones["qwen2"], tmp_path / "backbone"))
    config = json.loads((backbone / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    words = command_line(tmp_path, backbone, enc_in=ROWS)
    run = subprocess.run(
        [sys.executable, "run_main.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.count("\n") == 1 and run.stderr.startswith("run_main.py: error: --enc_in: got 320, expected 3")
