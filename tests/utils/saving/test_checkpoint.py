"""Checkpoints of older code load; what is no checkpoint is refused in one line and never run."""

import base64
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import run_main
from data_provider.data_factory import series_from_args
from data_provider.table import read_table
from layers.errors import InputError
from tests.small_run import command_line, figures, run_folder, train, write_csv
from utils.flags import parse_flags
from utils.results.bands import Intervals
from utils.saving.checkpoint import Checkpoint, save_checkpoint

SHAPES = {"a.weight": (2, 3), "a.bias": (2,)}
HELD = {name: torch.randn(shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def trained(backbones, tmp_path_factory) -> list[str]:
    words = command_line(tmp_path_factory.mktemp("trained"), backbones["qwen2"], max_iters=4, plots=0)
    assert run_main.main(words) == 0
    return words


@pytest.fixture(scope="module")
def scores(trained) -> tuple[str, str]:
    """MSE and MAE of its test, to the digits that a test prints."""
    held = json.loads((run_folder(trained) / "metrics.json").read_text())["test"]
    return f"{held['mse']:.7f}", f"{held['mae']:.7f}"


def refused(file: Path) -> str:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(file).tensors(SHAPES)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("wrap", ["DeepSpeed", "DataParallel", "double"])
def test_a_checkpoint_of_the_published_code_gives_the_same_figures(trained, scores, capsys, tmp_path, wrap: str) -> None:
    checkpoint = Checkpoint.open(run_folder(trained))
    state = checkpoint.tensors(checkpoint.shapes)
    state["llm_model.layers.0.mlp.up_proj.weight"] = torch.randn(4, 4)
    state["word_embeddings"] = torch.randn(9, 4)
    if wrap == "double":  # other number types are read as float32
        state = {name: tensor.double() for name, tensor in state.items()}
    if wrap == "DataParallel":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"module": state} if wrap == "DeepSpeed" else state, tmp_path / "checkpoint")
    place = tmp_path / "checkpoint" if wrap == "double" else tmp_path  # the file, or its folder
    lines = train([*trained, "--is_training", "0", "--checkpoint", str(place)], capsys)
    assert figures(lines) == scores and not any(line.startswith("WARNING") for line in lines)


def test_a_checkpoint_of_an_earlier_version_is_used(trained, capsys, tmp_path: Path) -> None:
    """Its header has a checksum, and prediction intervals as base64, which are calibrated anew."""
    expected = train([*trained, "--is_training", "0"], capsys)
    checkpoint = Checkpoint.open(run_folder(trained))
    record = {name: value for name, value in checkpoint.record.items() if name != "intervals"}
    offsets = base64.b64encode(np.ones(99, "<f4").tobytes()).decode()
    metadata = {"sha256": hashlib.sha256().hexdigest(), "record": json.dumps(record), "intervals": offsets}
    save_file(checkpoint.tensors(checkpoint.shapes), tmp_path / "checkpoint.safetensors", metadata)
    lines = train(["--is_training", "0", "--device", "cpu", "--checkpoint", str(tmp_path)], capsys)
    assert not any(line.startswith("WARNING") for line in lines) and any("calibrated on" in line for line in lines)
    told = [[line for line in of if line.startswith(("Prediction intervals: ", "Test MSE"))] for of in (lines, expected)]
    assert told[0] == told[1] and len(told[0]) == 2


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    """Also by the library alone; the same content makes the same bytes."""
    held = HELD | {"a.weight": torch.randn(3, 2).t()}
    offsets = np.random.default_rng(0).standard_normal((11, 2, 4)).astype("f4")
    offsets[0, 0] = np.nan
    files = set()
    for _ in range(4):  # the library writes several entries of a header in any order
        save_checkpoint(tmp_path, held, {"columns": ["ü"]}, Intervals((80.0,), offsets, 20))
        files.add((tmp_path / "checkpoint.safetensors").read_bytes())
    checkpoint, alone = Checkpoint.open(tmp_path), load_file(tmp_path / "checkpoint.safetensors")
    found, intervals = checkpoint.tensors(SHAPES), checkpoint.intervals
    assert len(files) == 1 and alone.keys() == {*SHAPES, "intervals.offsets"}
    assert all(torch.equal(found[name], held[name]) and torch.equal(alone[name], held[name]) for name in SHAPES)
    assert intervals is not None and (intervals.levels, intervals.windows) == ((80.0,), 20)
    np.testing.assert_array_equal(intervals.offsets, offsets)
    written = json.loads((tmp_path / "checkpoint.json").read_text("utf-8"))
    assert written["columns"] == ["ü"] and written["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert checkpoint.record == written | {"intervals": {"levels": [80.0], "windows": 20}}


def test_mixed_precision_is_inherited_and_compared(trained, scores, backbones, capsys, tmp_path) -> None:
    words = command_line(tmp_path, backbones["qwen2"], max_iters=4, plots=0, use_amp=True)
    mixed = figures(train(words, capsys))
    assert mixed != scores and float(mixed[0]) == pytest.approx(float(scores[0]), rel=0.05)
    bare = ["--is_training", "0", "--device", "cpu", "--checkpoint", str(run_folder(words))]
    assert figures(train(bare, capsys)) == mixed
    for other, given, held in (([*bare, "--use_amp", "False"], False, True), ([*trained, "--use_amp"], True, False)):
        assert run_main.main([*other, "--is_training", "0"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"run_main.py: error: --use_amp: got {given}, expected {held}, with which ")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--llm_layers", "2"], "--llm_layers: got 2, expected 1"),
        (["--prompt_decimals", "2", "--do_predict"], "--prompt_decimals: got 2, expected None"),
        (["--prompt_text", "Loads."], "--prompt_text: got the description 'Loads.', expected 'The data hold"),
    ],
)
def test_another_model_than_the_trained_one_is_refused(trained, capsys, flags, named) -> None:
    before = (run_folder(trained) / "metrics.json").read_bytes()
    assert run_main.main([*trained, "--is_training", "0", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"run_main.py: error: {named}") and err.count("\n") == 1
    assert (run_folder(trained) / "metrics.json").read_bytes() == before


def test_the_same_data_are_known_by_content(trained, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(run_folder(trained))
    path = write_csv(tmp_path / "series.csv")
    rows = path.read_text().splitlines()

    def trained_on(lines: list[str], features: str) -> bool:
        path.write_text("\n".join(lines))
        args = parse_flags([*trained, "--root_path", str(tmp_path), "--features", features])
        (answer,) = {checkpoint.trained_on(data) for data in (read_table(path), series_from_args(args))}
        return answer

    grown = [*rows, *(f"2030-01-01 00:{minute:02}:00,1,2,3" for minute in range(9))]
    for features in ("M", "S"):  # S: the series has not all columns, so the file is read once more
        assert trained_on(rows, features) and trained_on(grown, features)
        assert not trained_on([rows[0], "2019-12-31 23:00:00,1,2,3", *rows[2:]], features)  # the same name, other values
        assert not trained_on([rows[0].replace("load", "heat"), *rows[1:]], features)
        assert not trained_on(rows[:200], features)
    del checkpoint.record["data"]["mark"]  # older code: the name decides
    assert trained_on(rows[:200], "M") and not checkpoint.trained_on(read_table(write_csv(tmp_path / "other.csv")))


class Malicious:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_malicious_pickle_is_refused_and_not_run(trained, capsys, tmp_path: Path) -> None:
    sign, file = tmp_path / "executed", tmp_path / "checkpoint"
    torch.save(load_file(run_folder(trained) / "checkpoint.safetensors") | {"x": Malicious(f"touch {sign}")}, file)
    assert run_main.main([*trained, "--is_training", "0", "--checkpoint", str(file)]) == 2
    out, err = capsys.readouterr()
    assert not sign.exists() and out == ""
    assert err.count("\n") == 1 and err.startswith("run_main.py: error: --checkpoint ") and str(file) in err


def test_what_is_no_checkpoint_of_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got no checkpoint, expected checkpoint.safetensors .* --is_training 1"):
        Checkpoint.open(tmp_path)
    legacy, file = tmp_path / "checkpoint", tmp_path / "checkpoint.safetensors"
    for value in ([1, 2], {"a": 1}, torch.ones(3), {1: torch.ones(2)}):
        torch.save(value, legacy)
        refused(legacy)
    torch.save(HELD, legacy)
    assert Checkpoint.open(tmp_path).file == legacy
    save_file(HELD, file)
    assert Checkpoint.open(tmp_path).file == file and set(Checkpoint.open(file).tensors(SHAPES)) == set(SHAPES)
    for path in (legacy, file):
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", b"\0" * 200):
            path.write_bytes(damaged)
            refused(path)
    for wrong, told in (
        ({"a.weight": torch.ones(2, 3)}, "got no tensor a.bias, expected [2] for these flags"),
        (HELD | {"b": torch.ones(1)}, "got the unknown tensor b, expected those of the model: a.weight, a.bias"),
        (HELD | {"a.weight": torch.ones(3, 2)}, "got a.weight of shape [3, 2], expected [2, 3]"),
    ):
        save_file(wrong, file)
        assert told in refused(file)
