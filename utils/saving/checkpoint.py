"""The checkpoint: the trained tensors, and beside them what it takes to use them again.

`checkpoint.safetensors` holds the tensors under the names of existing Time-LLM checkpoints, and in its header
the record (flags, columns, scaler, backbone, versions) as JSON and the prediction intervals, so that they cannot be
parted. The same record lies in `checkpoint.json` for people to read. A `checkpoint` file of older Time-LLM code loads too.
"""

import json
import math
import pickle
import platform
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from data_provider.data_loader import Series, SplitSeries, fingerprint
from data_provider.m4 import M4Series
from data_provider.table import Table, read_table
from layers.errors import input_error
from utils.results.bands import Intervals
from utils.saving.files import write_atomic, write_json
from utils.saving.record import LEGACY, TENSORS, Header, find_checkpoint, parse_record, read_header
from utils.saving.tensors import damage, write_tensors

RECORD = "checkpoint.json"
INTERVALS = "intervals"  # their name in the header
LIBRARIES = ("torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "numpy", "pandas")
FROZEN = ("llm_model.", "word_embeddings")  # what older checkpoints may hold besides the trained tensors
Shapes = dict[str, tuple[int, ...]]

# What torch.load raises of a file in which bytes are wrong.
DAMAGED = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError,
    AssertionError, AttributeError, OverflowError, MemoryError, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was opened: its header read and checked, its tensors not yet.

    Attributes:
        record: what training wrote beside the tensors; empty in a file of older code.
    """

    file: Path
    record: dict[str, Any]
    header: Header | None  # None: a file of older code, which has none

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Open the file `path`, or the one in that folder.

        Raises:
            InputError: there is none, or its header or record cannot be used.
        """
        file = find_checkpoint(path)
        if file.suffix != ".safetensors":
            return cls(file, {}, None)
        try:
            header = read_header(file)
        except (OSError, ValueError) as error:
            raise input_error(f"--checkpoint {file}", f"a damaged file ({error})", "a safetensors file") from error
        try:
            record = parse_record(header.metadata)
        except ValueError as error:
            got = "a record that cannot be read"
            raise input_error(f"--checkpoint {file}", got, "the one that training wrote") from error
        return cls(file, record, header)

    @property
    def flags(self) -> dict[str, Any]:
        """The flags of the training, as far as the record has them."""
        return self.record.get("flags", {})

    @property
    def prompt_text(self) -> str | None:
        """The data set's description in the training, where it was given or made."""
        text = self.flags.get("prompt_text")
        return text if isinstance(text, str) else None

    @property
    def backbone(self) -> dict[str, Any]:
        """Name, shape and fingerprint of the language model of the training."""
        return self.record.get("backbone", {})

    @property
    def trained_data(self) -> dict[str, Any]:
        """What the record says of the data whose rows the tensors were trained on: those of `--data_pretrain`, where it was
        given, else those that also validated; empty where it says nothing."""
        held = self.record.get("pretrain", self.record).get("data", {})
        return held if isinstance(held, dict) else {}

    @cached_property
    def intervals(self) -> Intervals | None:
        """The prediction intervals of the tensors, in the order of the columns that training forecast; None without.

        Raises:
            InputError: they cannot be read.
        """
        text = self.header.metadata.get(INTERVALS) if self.header else None
        if text is None:
            return None
        try:
            return Intervals.decode(text)
        except ValueError as error:
            raise input_error(f"--checkpoint {self.file}", str(error), "those that training wrote") from error

    def scaler(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        """The training's columns, and their mean and deviation `[N]` float64.

        Raises:
            InputError: the record lacks them.
        """
        names, scaler = self.record.get("columns"), self.record.get("scaler", {})
        lists = [names, scaler.get("mean"), scaler.get("deviation")]
        sound = all(isinstance(part, list) and len(part) == len(names or []) > 0 for part in lists)
        sound = sound and all(isinstance(name, str) for name in lists[0])
        numbers = [value for part in lists[1:] for value in part] if sound else []
        sound = sound and all(type(value) in (int, float) and abs(value) <= sys.float_info.max for value in numbers)
        if not (sound and {"flags", "data"} <= self.record.keys()):
            got = "a record without flags, data, columns or their scaler"
            raise input_error(f"--checkpoint {self.file}", got, "the one that training wrote")
        return lists[0], np.array(lists[1], dtype=np.float64), np.array(lists[2], dtype=np.float64)

    @property
    def forecast_columns(self) -> list[str]:
        """The columns that the training forecast, in the order of its prediction intervals; empty where that is unknown."""
        names, target = self.record.get("columns"), self.record.get("target")
        if self.flags.get("features") == "MS":
            return [target] if isinstance(target, str) else []
        return names if isinstance(names, list) else []

    def belongs_to(self, series: Series, fill: str | None = None) -> bool:
        """Whether the record is of a training on these rows that forecast these columns."""
        return bool(self.record) and self.forecast_columns == series.forecast_columns and self.trained_on(series, fill)

    def trained_on(self, data: Series | Table, fill: str | None = None) -> bool:
        """Whether the first rows of `data` are the training rows, see the function of that name."""
        return trained_on(self.record, data, fill)

    def check(self, expected: Shapes) -> None:
        """Set names and shapes against those of the model that the flags describe, from the header alone.

        Raises:
            InputError: tensors missing, unknown or of another shape.
        """
        if self.header is None:
            self.tensors(expected)
        else:
            _compare(self.file, self.header.shapes, expected)

    def tensors(self, expected: Shapes) -> dict[str, torch.Tensor]:
        """The trained tensors, on the CPU. Nothing is unpickled but tensors.

        Args:
            expected: name -> shape of every trained tensor of the model.

        Raises:
            InputError: unreadable, or tensors missing, unknown or of another shape.
        """
        tensors = _read_legacy(self.file) if self.header is None else self._read(self.header)
        _compare(self.file, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected)
        return tensors

    def _read(self, header: Header) -> dict[str, torch.Tensor]:
        # What this program wrote has a checksum; a bare safetensors file of tensors has none.
        wrong = damage(self.file) if header.metadata.keys() - {"format"} else None
        if wrong is not None:
            got = f"a damaged file: {wrong}"
            raise input_error(f"--checkpoint {self.file}", got, "what training wrote", "take another copy of it")
        try:
            with safe_open(self.file, framework="pt") as held:
                return {name: held.get_tensor(name) for name in held.keys()}
        except (SafetensorError, OSError) as error:
            raise input_error(f"--checkpoint {self.file}", f"a damaged file ({error})", "a safetensors file") from error


def trained_on(record: dict[str, Any], data: Series | Table, fill: str | None = None) -> bool:
    """Whether the first rows of `data` are the training rows of a record; the file may have grown since.

    Of a run with `--data_pretrain` they are those of `--data`, which scale what it validates, tests and forecasts.

    They are known by content, for names are often alike. Of a checkpoint of older code, which does
    not have the content's fingerprint, the name decides.

    Args:
        fill: `--fill_missing`, for a file that is read once more because `data` has not all columns.
    """
    held = record.get("data", {})
    mark, names = held.get("mark"), record.get("columns")
    if not isinstance(mark, dict) or type(mark.get("rows")) is not int or not isinstance(names, list):
        return held.get("file") == data.path.name
    rows, expected = mark["rows"], mark.get("sha256")
    if isinstance(data, M4Series):
        return data.fingerprint == expected
    if isinstance(data, SplitSeries) and data.columns == names and data.splits.train == rows:
        return data.fingerprint == expected
    table = data if isinstance(data, Table) else read_table(data.path, fill)
    if not 0 < rows <= len(table.dates) or any(name not in table.columns for name in names):
        return False
    return fingerprint(table.values[:rows, [table.columns.index(name) for name in names]]) == expected


def save_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], record: dict[str, Any], intervals: Intervals | None = None
) -> None:
    """Write the trained tensors, record and prediction intervals; an earlier checkpoint stays until this one is safe.

    Raises:
        StorageError: the file system refused.
    """
    record = record | {"versions": versions()}
    metadata = {"record": json.dumps(record, ensure_ascii=False)}
    if intervals is not None:
        metadata[INTERVALS] = intervals.encode()
    write_atomic(folder / TENSORS, lambda path: write_tensors(path, tensors, metadata))
    write_json(folder / RECORD, record)


def add_intervals(checkpoint: Checkpoint, intervals: Intervals) -> Checkpoint:
    """Write a checkpoint anew, with these prediction intervals; the one that was there stays until it is safe.

    Args:
        checkpoint: one with a record, that `save_checkpoint` wrote.

    Raises:
        InputError: its tensors cannot be read.
        StorageError: the file system refused.
    """
    assert checkpoint.header is not None, "a file of older code has no place for them"
    tensors = checkpoint.tensors(checkpoint.header.shapes)
    metadata = {name: text for name, text in checkpoint.header.metadata.items() if name != "sha256"}
    metadata[INTERVALS] = intervals.encode()
    write_atomic(checkpoint.file, lambda path: write_tensors(path, tensors, metadata))
    return Checkpoint.open(checkpoint.file)


def save_for_torch(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the trained tensors, which are those of the checkpoint `file`, as the state dict that `torch.load` reads, to
    `checkpoint` beside it; nothing is done where that has been done.

    Raises:
        StorageError: the file system refused.
    """
    target = file.with_name(LEGACY)
    if target.is_file() and target.stat().st_mtime_ns >= file.stat().st_mtime_ns:
        return

    def write(path: Path) -> None:
        with path.open("wb") as opened:  # given a name, torch would write it into the file
            torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, opened)

    write_atomic(target, write)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide about results."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def shapes_of(model: torch.nn.Module) -> Shapes:
    """Name -> shape of every trained tensor."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def value_count(shapes: Shapes) -> int:
    """Number of trained values."""
    return sum(math.prod(shape) for shape in shapes.values())


def _read_legacy(file: Path) -> dict[str, torch.Tensor]:
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        got, expected = "something else than tensors, or a damaged file", "safetensors or a state dict of tensors"
        raise input_error(f"--checkpoint {file}", got, expected) from error
    if isinstance(held, dict) and isinstance(held.get("module"), dict):  # DeepSpeed wraps it once more
        held = held["module"]
    named = held.items() if isinstance(held, dict) else ()
    tensors = {str(name).removeprefix("module."): value for name, value in named if torch.is_tensor(value)}
    return {name: t.float() for name, t in tensors.items() if not name.startswith(FROZEN)}


def _compare(file: Path, found: Shapes, expected: Shapes) -> None:
    what = f"--checkpoint {file}"
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise input_error(what, f"no tensor {name}", "one", _hint(name))
        if name not in expected:
            raise input_error(what, f"the unknown tensor {name}", f"those of the model: {', '.join(expected)}", _hint(name))
        if tuple(found[name]) != tuple(expected[name]):
            got = f"{name} of shape {list(found[name])}"
            raise input_error(what, got, f"{list(expected[name])} for these flags", _hint(name))


def _hint(name: str) -> str:
    """Which flags decide about a tensor."""
    flags = {
        "patch_embedding": "--patch_len --d_model",
        "mapping_layer": "--llm_model_path --prototypes",
        "prototypes": "--llm_model_path --prototypes",
        "reprogramming_layer": "--d_model --n_heads --d_ff --llm_model_path",
        "output_projection": "--d_ff --seq_len --patch_len --stride --pred_len",
    }
    return f"give the flags of its training ({flags.get(name.split('.')[0], 'see its checkpoint.json')})"
