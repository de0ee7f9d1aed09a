"""Files are written whole, and a run's folder is one run's alone."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from layers.errors import InputError
from utils.errors import StorageError
from utils.saving.files import write_atomic, write_json, write_text, writing
from utils.saving.folder import FolderLock, check_space, move_aside, refuse_links
from utils.saving.tensors import DTYPES, damage, write_tensors


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
    with pytest.raises(StorageError, match="b cannot be written in .*a.json .Not a directory.$"), writing(path / "b"):
        (path / "b").mkdir()
    with pytest.raises(StorageError, match="has vanished"):
        write_text(tmp_path / "none" / "b", "")


def test_writing_replaces_a_link_and_does_not_follow_it(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.json").symlink_to(outside)
    (folder / f".metrics.json.{os.getpid()}.partial").symlink_to(outside)
    write_text(folder / "metrics.json", "theirs")
    assert outside.read_text() == "mine" and not (folder / "metrics.json").is_symlink()


@pytest.mark.parametrize("make", ["file", "folder", "nested"])
def test_a_folder_with_links_is_refused(tmp_path: Path, make: str) -> None:
    folder = tmp_path / "run"
    (folder / "plots").mkdir(parents=True)
    place = {"file": "train.log", "folder": "forecasts", "nested": "plots/a.png"}[make]
    (folder / place).symlink_to("../.." if make == "folder" else "/etc/passwd")
    for check in (refuse_links, FolderLock):
        with pytest.raises(InputError, match=f"{place}: got a symbolic link"):
            check(folder)


def test_move_aside_takes_the_next_free_number(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (tmp_path / "run.1").mkdir()
    (tmp_path / "run.2").symlink_to("nowhere")
    folder.mkdir()
    (folder / "checkpoint").write_text("old")
    assert move_aside(folder).name == "run.3"
    assert (tmp_path / "run.3/checkpoint").read_text() == "old" and not folder.exists()


def test_check_space_leaves_nothing_behind(tmp_path: Path) -> None:
    check_space(tmp_path, 10**6, "a state")
    line = "got .* free, expected .* for a state; free .* there, or name a folder on another disk"
    with pytest.raises(InputError, match=line):
        check_space(tmp_path, shutil.disk_usage(tmp_path).free + 2**30, "a state")
    assert not os.listdir(tmp_path)


def test_tensor_files_are_safetensors_files(tmp_path: Path) -> None:
    values = torch.arange(7) % 2
    tensors = {str(dtype): values.to(dtype) for dtype in DTYPES} | {
        "": torch.tensor(3.5), "empty": torch.zeros(0, 3), "turned": torch.arange(6.0).view(2, 3).t()
    }  # fmt: skip
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors, {"note": "0" * 64 + "ü"})
    assert damage(path) is None
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_a_run_goes_on_with_a_warning(tmp_path: Path, monkeypatch, number: int) -> None:
    monkeypatch.setattr("fcntl.lockf", failing(number))
    lock = FolderLock(tmp_path / "run")
    assert lock.warning == (
        f"WARNING: {tmp_path / 'run'} cannot be locked ({os.strerror(number)}): let no other run train in it meanwhile"
    )
    lock.release()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "got another run that trains in it"),
        (errno.EAGAIN, "got another run that trains in it"),
        (errno.EIO, "got .lock, which cannot be locked"),
    ],
)
def test_only_a_held_lock_means_another_run(tmp_path: Path, monkeypatch, number: int, words: str) -> None:
    monkeypatch.setattr("fcntl.lockf", failing(number))
    with pytest.raises(InputError, match=f"^--checkpoints {tmp_path / 'run'}: {words}"):
        FolderLock(tmp_path / "run")


def failing(number: int):
    def fail(*_args: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail
