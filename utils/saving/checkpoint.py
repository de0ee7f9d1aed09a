"""The checkpoint: the trained tensors, and beside them what it takes to use them again.

`checkpoint.safetensors` holds the tensors under the names of existing Time-LLM checkpoints, the prediction intervals as
one more tensor, and in its header the record (flags, columns, scaler, backbone, versions) as JSON. The same record lies
in `checkpoint.json` for people to read. The file `checkpoint` of the published code loads too.
"""

import json
import math
import pickle
import platform
import struct
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from data_provider.data_factory import series_flags
from data_provider.data_loader import FileSeries, Series, fingerprint
from data_provider.m4 import M4Series
from data_provider.table import Table, read_table
from layers.errors import input_error
from utils.results.bands import Intervals, probabilities
from utils.saving.files import NEWEST, OFFSETS, RECORD, TENSORS, find_checkpoint, read_header, write_atomic, write_json

LIBRARIES = ("torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "numpy", "pandas")
NOT_TRAINED = ("llm_model.", "word_embeddings", OFFSETS, NEWEST)  # what a file may hold besides the trained tensors
DECIDE = {  # the flags that decide about a tensor
    "patch_embedding": "--patch_len --d_model",
    "mapping_layer": "--llm_model_path --prototypes",
    "prototypes": "--llm_model_path --prototypes",
    "reprogramming_layer": "--d_model --n_heads --d_ff --llm_model_path",
    "output_projection": "--d_ff --seq_len --patch_len --stride --pred_len",
    "head_share": "--skip_mode",
    "notes": "--text_path and so on",
    "stack": "--stack_windows --features, and as many columns",
    "maps": "--stack_windows",
    "weights": "--features, and as many columns",
    "deviations": "--features, and as many columns",
}
Shapes = dict[str, tuple[int, ...]]

# What torch.load raises of a file in which bytes are wrong.
DAMAGED = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError,
    AssertionError, AttributeError, OverflowError, MemoryError, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was opened: its header is read, its tensors are not yet.

    Attributes:
        record: what training wrote beside the tensors; empty in a file of the published code.
        shapes: of the trained tensors by their names; None: a file of the published code, which has no header.
    """

    file: Path
    record: dict[str, Any]
    shapes: Shapes | None

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Open the file `path`, or the one in that folder.

        Raises:
            InputError: there is none, or its header cannot be read.
        """
        file = find_checkpoint(path)
        try:
            record, shapes = read_header(file) if file.suffix == ".safetensors" else ({}, None)
        except (OSError, ValueError) as error:
            raise input_error(f"--checkpoint {file}", error, "a safetensors file", "take another copy of it") from error
        return cls(file, record, shapes)

    @property
    def flags(self) -> dict[str, Any]:
        return self.record.get("flags", {})

    @property
    def backbone(self) -> dict[str, Any]:
        """Name, shape and fingerprint of the language model of the training."""
        return self.record.get("backbone", {})

    @property
    def trained_data(self) -> dict[str, Any]:
        """The data whose rows the tensors were trained on: those of `--data_pretrain`, where it was given."""
        return self.record.get("pretrain", self.record).get("data", {})

    @property
    def forecast_columns(self) -> list[str]:
        """The columns that the training forecast, in the order of its prediction intervals; empty where that is unknown."""
        if self.flags.get("features") == "MS":
            return [self.record["target"]]
        return self.record.get("columns", [])

    @cached_property
    def intervals(self) -> Intervals | None:
        """The prediction intervals of the tensors, in the order of `forecast_columns`; None without."""
        held = self.record.get("intervals")
        if held is None:
            return None
        tensors, levels = load_file(self.file), tuple(held["levels"])
        offsets = [
            tensors[name].numpy().copy() for name in (OFFSETS, NEWEST) if name in tensors
        ]  # not the whole file's space
        if len(offsets[0]) == len(probabilities(levels)):  # an older file's bands reach to their forecasts
            offsets[0] = np.pad(offsets[0], ((0, 2), (0, 0), (0, 0)))
        newest = Intervals(levels, offsets[1], held["newest_windows"]) if offsets[1:] else None
        return Intervals(levels, offsets[0], held["windows"], newest)

    def scaler(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        """The training's columns, and their mean and deviation `[N]` float64, of a checkpoint that has a record."""
        mean, std = (np.array(self.record["scaler"][part], dtype=np.float64) for part in ("mean", "deviation"))
        return self.record["columns"], mean, std

    def trained_on(self, data: Series | Table, args: Namespace | None = None) -> bool:
        """Whether the first rows of `data` are the training rows; the file may have grown since.

        Of a run with `--data_pretrain` they are those of `--data`, which scale what it validates, tests and forecasts.
        They are known by content, for names are often alike; of a file of older code, which does not have the content's
        fingerprint, the name decides.

        Args:
            args: the run's flags, for a file that is read once more because `data` has not all columns.
        """
        held, names = self.record.get("data", {}), self.record.get("columns")
        if "mark" not in held or names is None:
            return held.get("file") == data.path.name
        rows, expected = held["mark"]["rows"], held["mark"]["sha256"]
        if isinstance(data, M4Series) or (
            isinstance(data, FileSeries) and data.columns == names and data.splits.train == rows
        ):
            return data.fingerprint == expected
        table = data if isinstance(data, Table) else read_table(data.path, **series_flags(args or Namespace(), read_table))
        if not 0 < rows <= len(table.dates) or any(name not in table.columns for name in names):
            return False
        return fingerprint(table.values[:rows, [table.columns.index(name) for name in names]]) == expected

    def belongs_to(self, series: Series, args: Namespace | None = None) -> bool:
        """Whether the record is of a training on these rows that forecast these columns."""
        return bool(self.record) and self.forecast_columns == series.forecast_columns and self.trained_on(series, args)

    def tensors(self, expected: Shapes) -> dict[str, torch.Tensor]:
        """The trained tensors, on the CPU. Nothing is unpickled but tensors.

        Args:
            expected: name -> shape of every trained tensor of the model.

        Raises:
            InputError: unreadable, or tensors missing, unknown or of another shape.
        """
        try:
            held = load_file(self.file) if self.shapes else torch.load(self.file, map_location="cpu", weights_only=True)
        except DAMAGED as error:
            raise input_error(
                f"--checkpoint {self.file}",
                "something else than tensors, or a damaged file",
                "safetensors or a state dict of tensors",
            ) from error
        if isinstance(held, dict) and isinstance(held.get("module"), dict):  # DeepSpeed wraps it once more
            held = held["module"]
        named = held.items() if isinstance(held, dict) else ()
        tensors = {str(name).removeprefix("module."): value.float() for name, value in named if torch.is_tensor(value)}
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(NOT_TRAINED)}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in sorted(expected.keys() | found.keys()):
            if name not in expected:
                got, wanted = f"the unknown tensor {name}", f"those of the model: {', '.join(expected)}"
            else:
                got = f"{name} of shape {list(found[name])}" if name in found else f"no tensor {name}"
                wanted = f"{list(expected[name])} for these flags"
            if found.get(name) != expected.get(name):
                hint = f"give the flags of its training ({DECIDE.get(name.split('.')[0], 'see its checkpoint.json')})"
                raise input_error(f"--checkpoint {self.file}", got, wanted, hint)
        return tensors


def save_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], record: dict[str, Any], intervals: Intervals | None = None
) -> None:
    """Write the trained tensors, record and prediction intervals; an earlier checkpoint stays until this one is safe.

    Raises:
        StorageError: the file system refused.
    """
    libraries = {name: version(name) for name in LIBRARIES if find_spec(name)}
    record = record | {"versions": {"python": platform.python_version()} | libraries}
    _write(folder / TENSORS, tensors, record, intervals)
    write_json(folder / RECORD, record)


def add_intervals(checkpoint: Checkpoint, intervals: Intervals) -> Checkpoint:
    """Write a checkpoint of this program anew, with these prediction intervals; the old one stays until it is safe.

    Raises:
        InputError: its tensors cannot be read.
        StorageError: the file system refused.
    """
    assert checkpoint.shapes is not None, "a file of the published code has no place for them"
    _write(checkpoint.file, checkpoint.tensors(checkpoint.shapes), checkpoint.record, intervals)
    return Checkpoint.open(checkpoint.file)


def _write(file: Path, tensors: Mapping[str, torch.Tensor], record: dict[str, Any], intervals: Intervals | None) -> None:
    content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    if intervals is not None:
        record = record | {"intervals": {"levels": list(intervals.levels), "windows": intervals.windows}}
        content[OFFSETS] = torch.from_numpy(intervals.offsets)
        if intervals.newest is not None:
            record["intervals"]["newest_windows"] = intervals.newest.windows
            content[NEWEST] = torch.from_numpy(intervals.newest.offsets)
    # One entry: the library writes several in another order each time.
    write_atomic(file, lambda path: path.write_bytes(save(content, {"record": json.dumps(record, ensure_ascii=False)})))


def write_torch(path: Path, value: object) -> None:
    """Write what `torch.load` reads, atomically; tensors of a GPU come to the CPU one at a time.

    Raises:
        StorageError: the file system refused.
    """

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # given a name, torch would write it into the file
            try:
                torch.save(value, file)
            except RuntimeError as error:  # its own, about a file that ended where the disk was full
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    write_atomic(path, write)


def shapes_of(model: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def value_count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
