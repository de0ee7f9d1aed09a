"""The state file: what goes in comes out to the last bit, no damage goes unseen; files are written whole."""

import errno
import os
import random
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.optim import AdamW8bit

from layers.errors import InputError, StorageError
from utils.saving.files import write_atomic, write_json, write_text
from utils.saving.folder import lock_folder, move_aside
from utils.saving.state import Progress, Saver, compare, find_state, state_files

IDENTITY = {"--seed": 1, "the data's number of rows": 10, "the data's columns": ["a", "ü"]}


class Run:
    def __init__(self, folder: Path, seed: int = 0, optimizer: str = "adam"):
        torch.manual_seed(seed)
        # 8-bit moments are for tensors of 4096 values or more.
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Dropout(0.5), torch.nn.Linear(80, 64))
        kinds = {"adam": lambda values: torch.optim.Adam(values, lr=0.1, fused=True), "adamw8bit": AdamW8bit}
        self.optimizer = kinds[optimizer](self.model.parameters())
        args = Namespace(save_steps=1, seed=3, train_epochs=9, patience=3, optimizer=optimizer)
        cpu = torch.device("cpu")
        self.saver = Saver(folder, args, self.model, self.optimizer, Accelerator(cpu=True), cpu, IDENTITY, {})
        self.progress = Progress(loss_sum=1 / 3)
        self.lines: list[str] = []

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.model(torch.ones(2, 64)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.progress.iteration += 1
        self.progress.history.append({"epoch": self.progress.iteration, "name": "x"})
        return loss.item()

    def step_and_save(self) -> None:
        self.step()
        self.saver.save(self.progress)

    def resume(self) -> "Run":
        saved, lines = find_state(self.saver.folder)
        self.lines += lines
        self.progress = self.saver.resume(saved, self.lines.append)
        return self


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path)
    made.step_and_save(), made.step_and_save()
    return made


@pytest.mark.parametrize("optimizer", ["adam", "adamw8bit"])
def test_a_resumed_run_goes_on_as_if_never_interrupted(tmp_path: Path, optimizer: str) -> None:
    """The same losses, dropout's draws among them, and states of the same bytes."""
    resumed, whole = (Run(tmp_path / name, seed, optimizer) for seed, name in ((5, "parts"), (0, "whole")))
    whole.saver.folder.mkdir(), resumed.saver.folder.mkdir()
    whole.step_and_save()
    (tmp_path / "parts" / "state.1.pt").write_bytes((tmp_path / "whole" / "state.1.pt").read_bytes())
    losses = [whole.step() for _ in range(2)]
    whole.saver.save(whole.progress)
    resumed.resume()
    assert resumed.lines == ["Resuming from state.1.pt: epoch 1, iteration 1"]
    assert str(resumed.saver.folder) not in Path("/proc/self/maps").read_text()  # else the disk would keep the file
    assert [resumed.step() for _ in range(2)] == losses and resumed.progress == whole.progress
    resumed.saver.save(resumed.progress)
    assert (tmp_path / "parts" / "state.2.pt").read_bytes() == (tmp_path / "whole" / "state.2.pt").read_bytes()


@pytest.mark.parametrize("kind", ["cut", "flip"])
def test_a_damaged_state_is_named_and_the_one_before_it_used(run: Run, kind: str) -> None:
    newest, before = state_files(run.saver.folder)
    good, chance = newest.read_bytes(), random.Random(4)
    for place in [0, 1, 30, len(good) - 1, *(chance.randrange(len(good)) for _ in range(16))]:
        flipped = bytearray(good)
        flipped[place] ^= 1 << chance.randrange(8)
        newest.write_bytes(good[:place] if kind == "cut" else bytes(flipped))
        resumed = Run(run.saver.folder, seed=3).resume()
        if resumed.lines[0].startswith("WARNING"):
            assert f"{newest.name} is damaged" in resumed.lines[0] and resumed.saver.last == before
            assert resumed.progress.iteration == 1
        else:  # a bit of the zip that nothing reads, such as a date
            assert kind == "flip" and resumed.progress == run.progress
            assert all(map(torch.equal, resumed.model.parameters(), run.model.parameters()))
    newest.write_bytes(b"")
    resumed = Run(run.saver.folder).resume()
    resumed.step_and_save()  # the damaged one goes before the good one
    assert [path.name for path in state_files(run.saver.folder)] == ["state.2.pt", before.name]
    resumed.step_and_save()  # the newest two are kept
    assert [path.name for path in state_files(run.saver.folder)] == ["state.3.pt", "state.2.pt"]


def test_a_full_disk_loses_nothing(run: Run) -> None:
    """A third state takes the place of the older one; where there is no room for it, the newer one stays."""
    folder = run.saver.folder
    (folder / f".state.3.pt.{os.getpid()}.partial").symlink_to("/dev/full")  # as full as a disk can be
    with pytest.raises(StorageError, match="is full .*; free some room there, then the same command with .* state.2.pt"):
        run.step_and_save()
    assert Run(folder, seed=8).resume().progress.iteration == 2


def test_another_runs_state_is_one_line(run: Run) -> None:
    state, _ = find_state(run.saver.folder)
    compare(state, IDENTITY)
    compare(state, IDENTITY | {"--recipe": "own"})  # the default of a flag that the state does not know
    with pytest.raises(InputError, match="--resume: got --recipe published, expected --recipe None"):
        compare(state, IDENTITY | {"--recipe": "published"})
    line = "--resume: got --seed 2; the data's columns None, expected --seed 1; the data's columns .*, with which .* saved"
    with pytest.raises(InputError, match=line) as error:
        compare(state, IDENTITY | {"--seed": 2, "the data's columns": None})
    assert "rows" not in str(error.value)


def test_each_process_has_its_own_generator(run: Run) -> None:
    """N have saved and M resume: those without one draw their own numbers, the same in every attempt."""

    def draws(rank: int) -> float:
        resumed = Run(run.saver.folder, seed=rank + 7)
        resumed.saver.accelerator = Namespace(device=torch.device("cpu"), process_index=rank)
        resumed.resume()
        return torch.rand(()).item()

    found = [draws(rank) for rank in (0, 1, 2)]
    assert len(set(found)) == 3 and [draws(rank) for rank in (0, 1, 2)] == found


def test_a_failed_write_leaves_the_file_before_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"ü": 1})
    before = path.read_bytes()

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match=r"a.json cannot be written: the disk of .* is full \(.* free\)$"):
        write_atomic(path, fail)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(StorageError, match="b cannot be written in .*a.json .Not a directory.$"):
        write_text(path / "b", "")
    with pytest.raises(StorageError, match="has vanished"):
        write_text(tmp_path / "none" / "b", "")


def test_an_earlier_folder_takes_the_next_free_number_and_unfinished_files_go(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (tmp_path / "run.1").mkdir()
    (tmp_path / "run.2").symlink_to("nowhere")
    folder.mkdir()
    (folder / "checkpoint").write_text("old")
    assert move_aside(folder).name == "run.3"
    assert (tmp_path / "run.3/checkpoint").read_text() == "old" and not folder.exists()
    (tmp_path / "run.3" / ".state.1.pt.1.partial").write_text("half")
    os.close(lock_folder(tmp_path / "run.3")[0])
    assert set(os.listdir(tmp_path / "run.3")) == {".lock", "checkpoint"}
