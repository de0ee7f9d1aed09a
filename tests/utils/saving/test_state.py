"""The state file: what goes in comes out to the last bit, and no damage goes unseen."""

import json
import random
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from layers.errors import InputError
from utils.errors import RunError
from utils.saving.saver import resume_command
from utils.saving.state import Progress, compare, find_state, pack, restore, save_state, state_files
from utils.saving.tensors import write_tensors

CPU = torch.device("cpu")
IDENTITY = {"--seed": 1, "the data's number of rows": 10, "the data's columns": ["a", "ü"]}


def make(seed: int = 0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 3))
    return model, torch.optim.Adam(model.parameters(), lr=0.1, fused=True)


def step(model, optimizer) -> float:
    optimizer.zero_grad()
    loss = model(torch.ones(2, 5)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item() + random.random() + float(np.random.rand())


@pytest.fixture
def saved(tmp_path: Path):
    """A folder with two states, and the losses of the three steps after the second."""
    model, optimizer = make()
    progress, last = Progress(loss_sum=torch.tensor(1 / 3, dtype=torch.float64), history=[{"epoch": 1}]), None
    for progress.iteration in (1, 2):
        step(model, optimizer)
        last = save_state(tmp_path, pack(model, optimizer, progress, IDENTITY, CPU), last)
    return tmp_path, [step(model, optimizer) for _ in range(3)]


def test_a_restored_run_resumes_as_if_never_interrupted(saved) -> None:
    folder, expected = saved
    model, optimizer = make(seed=5)
    state, lines = find_state(folder)
    progress = restore(state, model, optimizer, CPU)
    found = progress.iteration, float(progress.loss_sum), progress.best_vali_loss
    assert not lines and found == (2, 1 / 3, float("inf"))
    assert progress.history == [{"epoch": 1}]
    assert [step(model, optimizer) for _ in range(3)] == expected


def test_only_the_newest_two_are_kept_and_a_restored_model_does_not_hold_the_file(saved) -> None:
    folder, _ = saved
    model, optimizer = make()
    state, _ = find_state(folder)
    restore(state, model, optimizer, CPU)
    path = state.path
    for _ in range(3):
        path = save_state(folder, pack(model, optimizer, Progress(), IDENTITY, CPU), path)
    assert [p.name for p in state_files(folder)] == ["state.5.safetensors", "state.4.safetensors"]
    assert str(folder) not in Path("/proc/self/maps").read_text()


def damaged_files(content: bytes, kind: str):
    """20 truncations, or 20 flipped bits: at the ends, in the header, in the digest, in the data."""
    header = int.from_bytes(content[:8], "little")
    chance = random.Random(4)
    places = [0, 1, 7, 8, 9, 24, 40, 8 + header - 1, 8 + header, len(content) - 1]
    places += [chance.randrange(len(content)) for _ in range(10)]
    for place in places:
        if kind == "cut":
            yield content[:place]
        else:
            flipped = bytearray(content)
            flipped[place] ^= 1 << chance.randrange(8)
            yield bytes(flipped)


@pytest.mark.parametrize("kind", ["cut", "flip"])
def test_a_damaged_state_is_named_and_the_one_before_it_used(saved, kind: str) -> None:
    folder, _ = saved
    newest, before = state_files(folder)
    good, count = newest.read_bytes(), 0
    for content in damaged_files(good, kind):
        newest.write_bytes(content)
        state, lines = find_state(folder)
        assert state.path == before and len(lines) == 1 and f"{newest.name} is damaged" in lines[0]
        assert restore(state, *make(), CPU).iteration == 1
        count += 1
    assert count == 20
    newest.write_bytes(good)
    assert find_state(folder)[0].path == newest


def test_the_damaged_one_goes_before_the_good_one(saved) -> None:
    folder, _ = saved
    newest, before = state_files(folder)
    newest.write_bytes(b"")
    state, _ = find_state(folder)
    path = save_state(folder, pack(*make(), Progress(), IDENTITY, CPU), state.path)
    assert state_files(folder) == [path, before]


def test_the_line_to_resume_works_from_any_folder(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "time llm"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.orig_argv", ["python", "run_main.py", "--des", "two words"])
    line = resume_command(Namespace(is_training=1, resume=False))
    assert line == f"cd '{folder}' && python run_main.py --des 'two words' --resume"
    assert resume_command(Namespace(is_training=0, resume=False)).endswith("--des 'two words'")


def test_what_differs_is_named(saved) -> None:
    state, _ = find_state(saved[0])
    compare(state, IDENTITY)
    line = (
        "--resume: got --seed 2; the data's columns None, expected --seed 1; the data's columns .*, with which .* was saved"
    )
    with pytest.raises(InputError, match=line) as error:
        compare(state, IDENTITY | {"--seed": 2, "the data's columns": None})
    assert "rows" not in str(error.value)


def test_a_value_that_is_not_finite_is_never_saved(saved) -> None:
    folder, _ = saved
    model, optimizer = make()
    with torch.no_grad():
        model[0].weight[1, 1] = float("nan")
    with pytest.raises(RunError, match="0.weight has become NaN or infinite"):
        save_state(folder, pack(model, optimizer, Progress(), IDENTITY, CPU), None)
    assert len(state_files(folder)) == 2


def test_a_state_has_the_names_that_states_have_always_had() -> None:
    progress = Progress(epoch=3, best_vali_loss=0.5, epochs_without_improvement=2)
    held = progress.to_json()
    assert held == {
        "epoch": 3, "iteration": 0, "loss_sum": 0.0, "best": 0.5, "worse": 2, "skipped": 0, "skipped_in_a_row": 0,
        "max_sequences": 0, "evaluation_sequences": 0, "loss_scale": 65536.0, "good_steps": 0, "history": [],
    }  # fmt: skip
    assert Progress.from_json(held) == progress
    del held["evaluation_sequences"]  # earlier versions had one number for both
    assert Progress.from_json(held | {"max_sequences": 8}).evaluation_sequences == 8


def test_a_foreign_header_is_no_state(saved) -> None:
    folder, _ = saved
    good, _ = find_state(folder)
    path = folder / "state.9.safetensors"

    def found(held: str):
        path.unlink(missing_ok=True)
        write_tensors(path, {"model.x": torch.ones(1)}, {"state": held})
        return find_state(folder)

    sound = {"version": 1, "identity": {}, "progress": Progress().to_json(), "random": {}, "optimizer": []}
    assert found(json.dumps(sound))[0].path == path
    wrong = [{"version": 2}, {"identity": 3}, {"progress": {"epoch": "x"}}, {"random": []}, {"optimizer": {}}]
    wrong.append({"progress": sound["progress"] | {"iteration": float("inf")}})
    for held in ("[]", "{}", "nonsense", "[" * 100_000, *(json.dumps(sound | part) for part in wrong)):
        state, lines = found(held)
        assert state == good and "its header cannot be used" in lines[0]
    shutil.copy(good.path, folder / "state.old.safetensors")
    assert len(state_files(folder)) == 3


def test_a_flag_that_is_newer_than_a_state_had_its_default_then(saved) -> None:
    """Else a new flag would keep every earlier run from resuming."""
    state, _ = find_state(saved[0])
    compare(state, IDENTITY | {"--lradj": "type1"})
    with pytest.raises(InputError, match="--resume: got --lradj COS, expected --lradj type1, with which"):
        compare(state, IDENTITY | {"--lradj": "COS"})
