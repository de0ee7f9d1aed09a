"""Checkpoints of older code load; what is no checkpoint is refused in one line and never run."""

import os
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import run_main
from layers.errors import InputError
from tests.small_run import command_line, figures, run_folder, train, write_csv
from utils.checkpoint import find_checkpoint, read_checkpoint
from utils.recorded import recorded
from utils.same_data import trained_on

SHAPES = {"a.weight": (2, 3), "a.bias": (2,)}


@pytest.fixture(scope="module")
def trained(backbones, tmp_path_factory) -> list[str]:
    """The command line of a small run that was trained."""
    from utils.flags import parse_flags
    from utils.run import main

    words = command_line(tmp_path_factory.mktemp("trained"), backbones["qwen2"], max_iters=4)
    assert main(parse_flags(words)) == 0
    return words


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def refused(file: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_checkpoint(file, SHAPES)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("wrap", ["plain", "DeepSpeed", "DataParallel", "half"])
def test_legacy_checkpoint_gives_the_same_figures(trained, capsys, tmp_path: Path, wrap: str) -> None:
    test = [*trained, "--is_training", "0"]
    expected = figures(train(test, capsys))
    state = load_file(run_folder(trained) / "checkpoint.safetensors")
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


def test_a_checkpoint_elsewhere_is_used(trained, capsys, tmp_path: Path) -> None:
    test = [*trained, "--is_training", "0", "--checkpoints", str(tmp_path / "here")]
    elsewhere = [*test, "--checkpoint", str(run_folder(trained))]
    assert figures(train(elsewhere, capsys)) == figures(train([*trained, "--is_training", "0"], capsys))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--llm_layers", "2"], "--llm_layers: found 2, need 1"),
        (["--prompt_decimals", "2"], "--prompt_decimals: found 2, need None"),
        (["--prompt_text", "Loads."], "--prompt_text: found the description 'Loads.', need 'The data hold"),
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
    record = recorded(run_folder(trained))
    path = write_csv(tmp_path / "series.csv")
    assert trained_on(record, path)
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows, "2030-01-01 00:00:00,1,2,3"]))  # it has grown
    assert trained_on(record, path)
    path.write_text("\n".join([rows[0], "2019-12-31 23:00:00,1,2,3", *rows[2:]]))  # the same name, other values
    assert not trained_on(record, path)
    del record["data"]["mark"]  # older code: the name decides
    assert trained_on(record, path) and not trained_on(record, tmp_path / "other.csv")


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
    assert set(read_checkpoint(file, SHAPES)[0]) == set(SHAPES)
    save_file({"a.weight": torch.ones(2, 3)}, file)
    assert "found no tensor a.bias" in refused(file)
    save_file(tensors() | {"b": torch.ones(1)}, file)
    assert "the unknown tensor b" in refused(file)
    save_file(tensors() | {"a.weight": torch.ones(3, 2)}, file)
    assert "found a.weight of shape [3, 2], need [2, 3]" in refused(file)


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "checkpoint"])
@pytest.mark.parametrize(
    "spoil", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\0" * 200]
)
def test_damaged_file(tmp_path: Path, name: str, spoil) -> None:
    file = tmp_path / name
    if name == "checkpoint":
        torch.save(tensors(), file)
    else:
        save_file(tensors(), file)
    file.write_bytes(spoil(file.read_bytes()))
    refused(file)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_flipped_bits_of_a_legacy_file(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "checkpoint"
    torch.save(tensors(), file, _use_new_zipfile_serialization=zipped)
    good = file.read_bytes()
    for place in range(0, len(good), 3):
        for bit in (1, 32, 128):
            file.write_bytes(good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :])
            with suppress(InputError):  # anything else fails the test; a changed value cannot be told
                read_checkpoint(file, SHAPES)


@pytest.mark.parametrize("held", [[1, 2], {"a": 1}, torch.ones(3), {1: torch.ones(2)}])
def test_legacy_file_of_something_else(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "checkpoint")
    refused(tmp_path / "checkpoint")


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no checkpoint.safetensors .* --is_training 1"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoint").touch()
    assert find_checkpoint(tmp_path).name == "checkpoint"
    (tmp_path / "checkpoint.safetensors").touch()
    assert find_checkpoint(tmp_path).name == "checkpoint.safetensors"
