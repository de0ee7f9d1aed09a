"""Files are written whole, and a run's folder is one run's alone."""

import errno
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from accelerate import Accelerator

from layers.errors import InputError, StorageError
from tests.realdata import ROOT
from utils.saving.files import write_atomic, write_json, write_text
from utils.saving.folder import FolderLock, move_aside, open_folder


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


def test_move_aside_takes_the_next_free_number(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (tmp_path / "run.1").mkdir()
    (tmp_path / "run.2").symlink_to("nowhere")
    folder.mkdir()
    (folder / "checkpoint").write_text("old")
    assert move_aside(folder).name == "run.3"
    assert (tmp_path / "run.3/checkpoint").read_text() == "old" and not folder.exists()


def test_a_second_run_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lock = FolderLock(folder)
    (folder / ".state.1.pt.1.partial").write_text("being written")
    claim = "import sys; from pathlib import Path; from utils.saving.folder import FolderLock; FolderLock(Path(sys.argv[1]))"
    command = [sys.executable, "-c", claim, str(folder)]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"--checkpoints {folder}: got another run that trains in it, expected none; wait" in second.stderr
    assert (folder / ".state.1.pt.1.partial").is_file()
    lock.release()
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert os.listdir(folder) == [".lock"]  # what the first has left unfinished is gone


def test_a_disk_that_is_too_small_is_told_before_training(tmp_path: Path) -> None:
    args = Namespace(resume=False, torch_checkpoint=1, optimizer="adam", save_steps=None)
    line = "got .* GB free, expected 36000000.0 GB for two states of 12000000.0 GB and three checkpoints .*; free .* there"
    with pytest.raises(InputError, match=line):
        open_folder(args, tmp_path / "run", {}, 10**15, Accelerator(cpu=True))
