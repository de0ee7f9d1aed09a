"""Checkpoints of older code load; what is no checkpoint is refused in one line and never run."""

import base64
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
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


@pytest.fixture(scope="module")
def trained(backbones, tmp_path_factory) -> list[str]:
    """The command line of a small run that was trained."""
    words = command_line(tmp_path_factory.mktemp("trained"), backbones["qwen2"], max_iters=4)
    assert run_main.main(words) == 0
    return words


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def refused(file: Path) -> str:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(file).tensors(SHAPES)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("wrap", ["plain", "DeepSpeed", "DataParallel", "half"])
def test_legacy_checkpoint_gives_the_same_figures(trained, capsys, tmp_path: Path, wrap: str) -> None:
    test = [*trained, "--is_training", "0"]
    expected = figures(train(test, capsys))
    checkpoint = Checkpoint.open(run_folder(trained))
    state = checkpoint.tensors(checkpoint.shapes)
    state["llm_model.layers.0.mlp.up_proj.weight"] = torch.randn(4, 4)
    state["word_embeddings"] = torch.randn(9, 4)
    if wrap == "half":  # other number types are read as float32
        state = {name: tensor.double() for name, tensor in state.items()}
    if wrap == "DataParallel":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"module": state} if wrap == "DeepSpeed" else state, tmp_path / "checkpoint")
    for place in (tmp_path, tmp_path / "checkpoint"):  # the folder, or the file
        lines = train([*test, "--checkpoint", str(place)], capsys)
        assert figures(lines) == expected and not any(line.startswith("WARNING") for line in lines)


def test_a_checkpoint_of_an_earlier_version_is_used(trained, capsys, tmp_path: Path) -> None:
    """Its header has a checksum, and prediction intervals as base64, which are calibrated anew."""
    expected = train([*trained, "--is_training", "0"], capsys)
    checkpoint = Checkpoint.open(run_folder(trained))
    record = {name: value for name, value in checkpoint.record.items() if name != "intervals"}
    offsets = base64.b64encode(np.ones(99, "<f4").tobytes()).decode()
    metadata = {"sha256": hashlib.sha256().hexdigest(), "record": json.dumps(record), "intervals": offsets}
    file = tmp_path / "checkpoint.safetensors"
    save_file(checkpoint.tensors(checkpoint.shapes), file, metadata)
    assert Checkpoint.open(tmp_path).intervals is None
    lines = train(["--is_training", "0", "--device", "cpu", "--checkpoint", str(tmp_path)], capsys)
    assert figures(lines) == figures(expected) and not any(line.startswith("WARNING") for line in lines)
    assert any("calibrated on" in line for line in lines)
    assert [line for line in lines if line.startswith("Prediction intervals: ")] == [
        line for line in expected if line.startswith("Prediction intervals: ")
    ]


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    """Also by the library alone; the same content makes the same bytes."""
    held = tensors() | {"a.weight": torch.randn(3, 2).t()}
    offsets = np.random.default_rng(0).standard_normal((11, 2, 4)).astype("f4")
    offsets[0, 0] = np.nan
    files = []
    for number in range(4):  # the library writes several entries of a header in any order
        (tmp_path / str(number)).mkdir()
        save_checkpoint(tmp_path / str(number), held, {"columns": ["ü"]}, Intervals((80.0,), offsets, 20))
        files.append((tmp_path / str(number) / "checkpoint.safetensors").read_bytes())
    assert len(set(files)) == 1
    checkpoint = Checkpoint.open(tmp_path / "0")
    found, intervals = checkpoint.tensors(SHAPES), checkpoint.intervals
    alone = load_file(tmp_path / "0" / "checkpoint.safetensors")
    assert alone.keys() == {*SHAPES, "intervals.offsets"}
    assert all(torch.equal(found[name], held[name]) and torch.equal(alone[name], held[name]) for name in SHAPES)
    assert intervals is not None and (intervals.levels, intervals.windows) == ((80.0,), 20)
    np.testing.assert_array_equal(intervals.offsets, offsets)
    written = json.loads((tmp_path / "0" / "checkpoint.json").read_text("utf-8"))
    assert written["columns"] == ["ü"] and written["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert checkpoint.record == written | {"intervals": {"levels": [80.0], "windows": 20}}


def test_a_checkpoint_elsewhere_is_used(trained, capsys, tmp_path: Path) -> None:
    test = [*trained, "--is_training", "0", "--checkpoints", str(tmp_path / "here")]
    elsewhere = [*test, "--checkpoint", str(run_folder(trained))]
    assert figures(train(elsewhere, capsys)) == figures(train([*trained, "--is_training", "0"], capsys))


def test_a_test_asks_nothing_of_the_training_windows(trained, capsys, tmp_path: Path) -> None:
    """Also where they are fewer than a batch: 100 rows have 31 training windows, --batch_size is 32 when left out."""
    test = [*trained, "--is_training", "0"]
    assert figures(train([*test, "--batch_size", "186"], capsys)) == figures(train(test, capsys))
    write_csv(tmp_path / "short.csv", rows=100)
    elsewhere = ["--root_path", str(tmp_path), "--data_path", "short.csv"]
    zero_shot = ["--is_training", "0", "--device", "cpu", "--checkpoint", str(run_folder(trained)), *elsewhere]
    assert "test 13" in train(zero_shot, capsys)


@pytest.fixture
def any_precision():
    """Accelerate holds the precision of the first run in a process for all that follow."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_mixed_precision_is_inherited_and_compared(trained, backbones, any_precision, capsys, tmp_path: Path) -> None:
    words = command_line(tmp_path, backbones["qwen2"], max_iters=2, use_amp=True)
    lines = train(words, capsys)
    bare = ["--is_training", "0", "--device", "cpu", "--checkpoint", str(run_folder(words))]
    assert parse_flags(bare).use_amp is True
    assert figures(train(bare, capsys)) == figures(lines)
    for other, given, held in (([*bare, "--use_amp", "False"], False, True), ([*trained, "--use_amp"], True, False)):
        assert run_main.main([*other, "--is_training", "0"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"run_main.py: error: --use_amp: got {given}, expected {held}, with which ")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--llm_layers", "2"], "--llm_layers: got 2, expected 1"),
        (["--prompt_decimals", "2"], "--prompt_decimals: got 2, expected None"),
        (["--prompt_text", "Loads."], "--prompt_text: got the description 'Loads.', expected 'The data hold"),
    ],
)
@pytest.mark.parametrize("predict", [[], ["--do_predict"]])
def test_another_model_than_the_trained_one_is_refused(trained, capsys, flags, named, predict) -> None:
    before = (run_folder(trained) / "metrics.json").read_bytes()
    assert run_main.main([*trained, "--is_training", "0", *flags, *predict]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"run_main.py: error: {named}") and err.count("\n") == 1
    assert (run_folder(trained) / "metrics.json").read_bytes() == before


def test_the_same_data_are_known_by_content(trained, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(run_folder(trained))
    path = write_csv(tmp_path / "series.csv")
    rows = path.read_text().splitlines()

    def trained_on(lines: list[str], features: str) -> bool:
        """Asked with the table of the file, and with the series that a run reads from it."""
        path.write_text("\n".join(lines))
        args = parse_flags([*trained, "--root_path", str(tmp_path), "--features", features])
        answers = {checkpoint.trained_on(data) for data in (read_table(path), series_from_args(args))}
        assert len(answers) == 1
        return answers.pop()

    grown = [*rows, *(f"2030-01-01 00:{minute:02}:00,1,2,3" for minute in range(9))]
    for features in ("M", "S"):  # S: the series has not all columns, so the file is read once more
        assert trained_on(rows, features) and trained_on(grown, features)
        assert not trained_on([rows[0], "2019-12-31 23:00:00,1,2,3", *rows[2:]], features)  # the same name, other values
        assert not trained_on([rows[0].replace("load", "heat"), *rows[1:]], features)
        assert not trained_on(rows[:200], features)
    del checkpoint.record["data"]["mark"]  # older code: the name decides
    write_csv(tmp_path / "other.csv")
    assert trained_on(rows[:200], "M") and not checkpoint.trained_on(read_table(tmp_path / "other.csv"))


class Malicious:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_malicious_pickle_is_refused_and_not_run(trained, capsys, tmp_path: Path, form: str) -> None:
    sign = tmp_path / "executed"
    state = load_file(run_folder(trained) / "checkpoint.safetensors") | {"x": Malicious(f"touch {sign}")}
    file = tmp_path / "checkpoint"
    if form == "torch":
        torch.save(state, file)
    else:
        file.write_bytes(pickle.dumps(state))
    assert run_main.main([*trained, "--is_training", "0", "--checkpoint", str(file)]) == 2
    out, err = capsys.readouterr()
    assert not sign.exists() and out == ""
    assert err.count("\n") == 1 and err.startswith("run_main.py: error: --checkpoint ") and str(file) in err
    os.system(f"touch {sign}")  # noqa: S605 - the command is one that would have left its sign
    assert sign.exists()


def test_other_names_and_shapes(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    save_file(tensors(), file)
    assert set(Checkpoint.open(file).tensors(SHAPES)) == set(SHAPES)
    save_file({"a.weight": torch.ones(2, 3)}, file)
    assert "got no tensor a.bias, expected one" in refused(file)
    save_file(tensors() | {"b": torch.ones(1)}, file)
    assert "got the unknown tensor b, expected those of the model: a.weight, a.bias" in refused(file)
    save_file(tensors() | {"a.weight": torch.ones(3, 2)}, file)
    assert "got a.weight of shape [3, 2], expected [2, 3]" in refused(file)


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "checkpoint"])
@pytest.mark.parametrize("spoil", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\0" * 200])
def test_damaged_file(tmp_path: Path, name: str, spoil) -> None:
    file = tmp_path / name
    if name == "checkpoint":
        torch.save(tensors(), file)
    else:
        save_file(tensors(), file)
    file.write_bytes(spoil(file.read_bytes()))
    refused(file)


@pytest.mark.parametrize("held", [[1, 2], {"a": 1}, torch.ones(3), {1: torch.ones(2)}])
def test_legacy_file_of_something_else(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "checkpoint")
    refused(tmp_path / "checkpoint")


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got no checkpoint, expected checkpoint.safetensors .* --is_training 1"):
        Checkpoint.open(tmp_path)
    (tmp_path / "checkpoint").touch()
    assert Checkpoint.open(tmp_path).file.name == "checkpoint"
    save_file(tensors(), tmp_path / "checkpoint.safetensors")
    assert Checkpoint.open(tmp_path).file.name == "checkpoint.safetensors"
