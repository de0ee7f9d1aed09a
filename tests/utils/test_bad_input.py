"""Whatever is wrong with flags, files or a checkpoint: one line that names it, exit code 2, and no weight was loaded."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import layers.backbone
from tests.small_run import command_line, refusal, run_folder, train, write_csv
from utils.saving.checkpoint import Checkpoint


@pytest.fixture
def no_weights(backbones, monkeypatch, tmp_path: Path) -> Path:
    """A backbone whose weights cannot be loaded; who tries fails the test."""

    def fail(*args, **kwargs):
        raise AssertionError("weights were loaded")

    for name in ("_load", "_config"):
        monkeypatch.setattr(layers.backbone, name, fail)
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", fail)
    folder = Path(shutil.copytree(backbones["qwen2"], tmp_path / "backbone"))
    for shard in folder.glob("*.safetensors"):
        shard.write_bytes(b"\2\0\0\0\0\0\0\0{}")  # a header, and no tensor
    return folder


@pytest.fixture
def refuse(no_weights, tmp_path: Path, capsys) -> Callable[..., str]:

    def refused(**flags: object) -> str:
        line = refusal(command_line(tmp_path, no_weights, **flags), capsys)
        assert not run_folder(command_line(tmp_path, no_weights)).exists()
        return line

    return refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"bacth_size": 4}, ["--bacth_size", "--batch_size"]),
        ({"data_path": "missing.csv"}, ["--data_path", "missing.csv", "no such file"]),
        ({"data_path": "two\nlines.csv"}, ["--data_path", "two\\nlines.csv", "no such file"]),
        ({"features": "S", "target": "heat"}, ["--target", "'heat'", "load, flow, OT"]),
        ({"features": "MS", "target": "heat"}, ["--target", "'heat'", "load, flow, OT"]),
        ({"seq_len": 12}, ["--seq_len", "12", "--patch_len 16"]),
        ({"seq_len": 217, "label_len": 0}, ["--seq_len 217", "train", "224", "series.csv"]),
        ({"pred_len": 33}, ["--pred_len 33", "val", "32"]),
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
        ({"is_training": 0, "checkpoint": "a_test_mean-run"}, ["--checkpoint", "the mean of repeats has none"]),
        # What a model cannot do.
        ({"model": "DLinear", "llm_ablation": "none"}, ["--llm_ablation", "none", "expected off", "DLinear"]),
        ({"model": "LinearStack", "stack_windows": 400}, ["--stack_windows", "400", "at most 216", "series.csv"]),
        ({"skip": "stack", "data_pretrain": "ETTh1"}, ["--data_pretrain", "ETTh1", "linear stack"]),
        ({"skip_mode": "beside", "skip": "linear"}, ["--skip_mode", "beside", "residual", "--skip ridge or stack"]),
        ({"loss": "MASE"}, ["--loss", "MASE", "MSE, MAE or MAE+FFT", "m4"]),
        ({"model": "Ridge", "skip": "ridge"}, ["--skip", "ridge", "expected none", "Ridge"]),
        ({"model": "PatchTST", "load_in_4bit": True}, ["--load_in_4bit", "PatchTST"]),
        ({"model": "PatchTST", "max_sequences": 8}, ["--max_sequences", "8", "expected 0", "PatchTST"]),
        ({"model": "Autoformer", "features": "MS"}, ["--features", "MS", "M or S", "Autoformer"]),
        ({"model": "DLinear", "moving_avg": 24}, ["--moving_avg", "24", "odd"]),
        ({"llm_ablation": "random", "load_in_4bit": True}, ["--llm_ablation", "random", "--load_in_4bit"]),
        ({"model": "PatchTST", "n_heads": 3}, ["--n_heads", "3", "--d_model 8"]),
    ],
)  # fmt: skip
def test_flags(refuse, flags: dict, words: list[str]) -> None:
    line = refuse(**flags)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("row", "column", "value", "words"),
    [
        # One cell is changed; rows are counted as in an editor, the header is row 1.
        (1, 0, "day", ["date"]),
        (20, 2, "broken", ["row 20", "'flow'", "'broken'"]),
        (300, 3, "NaN", ["row 300", "'OT'"]),
        (7, 1, "", ["row 7", "'load'"]),
        (7, 1, "inf", ["row 7", "'load'"]),
        (9, 0, "some day", ["row 9", "'date'", "'some day'"]),
        (9, 0, "2019-01-01 00:00:00", ["row 9", "'date'", "2019-01-01 00:00:00"]),
        # The file ends there.
        (61, None, None, ["--seq_len 32", "val", "6"]),
        (1, None, None, ["rows"]),
        (0, None, None, ["empty"]),
    ],
)
def test_files(refuse, tmp_path: Path, row: int, column: int | None, value: str | None, words: list[str]) -> None:
    lines = [line.split(",") for line in write_csv(tmp_path / "series.csv").read_text().splitlines()]
    if column is None:
        lines = lines[:row]
    else:
        lines[row - 1][column] = value
    (tmp_path / "series.csv").write_text("".join(",".join(cells) + "\n" for cells in lines))
    line = refuse()
    assert "series.csv" in line and all(word in line for word in words), line


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, "no config.json"),
        *(("config.json", text, "config.json that cannot be used") for text in ("", "{", "[]")),
        ("config.json", '{"model_type": "gpt2"}', "a model of type gpt2"),
        ("config.json", '{"model_type": "qwen2", "hidden_size": "wide"}', "config.json"),
        *(("model.safetensors.index.json", t, "model.safetensors.index.json") for t in ("{", "{}", '{"weight_map": 3}')),
        ("tokenizer.json", None, "tokenizer"),
        ("tokenizer.json", "{}", "tokenizer"),
        ("tokenizer_config.json", None, "tokenizer_config.json"),
        ("*.safetensors", None, ".safetensors"),
        ("*.safetensors", "\2\0\0\0\0\0\0\0", "cut short or damaged"),
    ],
)  # fmt: skip
def test_half_a_language_model(refuse, no_weights, file: str, content: str | None, words: str) -> None:
    for path in list(no_weights.glob(file)) or [no_weights / file]:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
    assert words in refuse()


def test_the_machine(refuse, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refuse(device="cuda").startswith("--device: got cuda, and PyTorch finds no GPU")
    assert "--device cpu" in refuse(device="auto", load_in_4bit=True)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 535.104.05\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert "driver 535.104.05" in refuse(device="auto")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    with monkeypatch.context() as left:  # by `accelerate config`
        left.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        assert refuse(device="cpu").startswith("ACCELERATE_USE_DEEPSPEED: got true, expected no such variable")
    assert all("bitsandbytes" in refuse(**flags) for flags in ({"load_in_4bit": True}, {"optimizer": "adamw8bit"}))


def test_a_run_folder_that_is_read_only(small, capsys, monkeypatch) -> None:
    """A test says so at once, not when its figures are to be written; root, who runs tests, may write everywhere."""
    words = small(model="DLinear", max_iters=1)
    train(words, capsys)
    folder = run_folder(words)
    monkeypatch.setattr("os.access", lambda path, mode: path != folder)
    line = refusal([*words, "--is_training", "0"], capsys)
    assert line == f"--checkpoints {folder}: got no writing, expected a folder that can be written; name another"


def test_a_checkpoint_of_another_shape(small, capsys) -> None:
    """Which flag decides is told. A checkpoint of older code has no record: its tensors' shapes alone tell."""
    words = small(max_iters=1)
    train(words, capsys)
    file = run_folder(words) / "old.safetensors"
    save_file(load_file(run_folder(words) / "checkpoint.safetensors"), file)
    for flag, value, name in (
        ("pred_len", 9, "output_projection"), ("d_model", 16, "tokenConv"), ("n_heads", 4, "reprogramming_layer"),
        ("prototypes", "direct", "mapping_layer"), ("skip", "linear", "linear_map"),
    ):  # fmt: skip
        line = refusal([*words, "--is_training", "0", "--checkpoint", str(file), f"--{flag}", str(value)], capsys)
        assert f"--checkpoint {file}: got " in line and name in line and (flag in line or flag == "skip")


@pytest.mark.parametrize(
    ("trained", "others"),
    [
        # Where no tensor's shape tells the two apart, the record does.
        ({}, [{"use_prompt": 0}, {"prompt_lags": "peaks"}, {"prompt_text": "Loads."}, {"llm_ablation": "random"}]),
        ({"llm_ablation": "random", "skip": "linear"}, [{"llm_ablation": "off"}, {"skip": "ridge"}]),
        ({"model": "Autoformer"}, [{"label_len": 16}, {"factor": 3}]),
        ({"model": "DLinear"}, [{"moving_avg": 5}, *({"model": name} for name in ("Ridge", "PatchTST", "TimeLLM"))]),
    ],
)
def test_a_checkpoint_of_another_training(small, capsys, monkeypatch, trained: dict, others: list[dict]) -> None:
    words = small(max_iters=1, **trained)
    train(words, capsys)
    given = ["--is_training", "0", "--device", "cpu", "--plots", "0", "--checkpoint", str(run_folder(words))]
    for asked in others:
        ((flag, value),) = asked.items()
        line = refusal([*given, f"--{flag}", str(value)], capsys)
        assert line.startswith(f"--{flag}: got ") and str(value) in line.partition(", expected ")[0]
    if trained:
        return
    train([*given, "--label_len", "16"], capsys)  # which TimeLLM does not read
    # a checkpoint from before a flag was made has its default
    flags = {name: held for name, held in Checkpoint.open(run_folder(words)).flags.items() if name != flag}
    monkeypatch.setattr(Checkpoint, "flags", flags)
    assert f"--{flag}: got {value}, expected " in refusal([*words, "--is_training", "0", f"--{flag}", value], capsys)
