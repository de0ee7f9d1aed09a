"""Named tensors in a safetensors file that carries its own checksum.

The format is that of the safetensors library, which reads these files. They are written here because
the library would hold every tensor in memory twice while it writes: here one tensor at a time is
brought to the CPU. The SHA-256 of the whole file, taken with zeros in the digest's place, stands first
in the header.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
_NO_DIGEST = "0" * 64
_START = re.compile(rb'\{"__metadata__":\{"sha256":"([0-9a-f]{64})"')
_CHUNK = 2**22


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata; the same ones give the same bytes.

    Raises:
        OSError: as the file system says.
    """
    # Widest elements first: every tensor is then aligned to its own.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, dict] = {"__metadata__": {"sha256": _NO_DIGEST, **metadata}}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    with path.open("xb") as file:
        file.write(head)
        for name in names:
            data = memoryview(_bytes(tensors[name]))
            file.write(data)
            digest.update(data)
        file.seek(head.index(_NO_DIGEST.encode()))
        file.write(digest.hexdigest().encode())


def _bytes(tensor: torch.Tensor):
    """A tensor's memory, on the CPU, as an array of bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def damage(path: Path) -> str | None:
    """What is wrong with a file of `write_tensors`; None where every byte is as it was written."""
    try:
        with path.open("rb") as file:
            length = file.read(8)
            size = int.from_bytes(length, "little")
            if len(length) < 8 or size > path.stat().st_size - 8:
                return "it is cut short"
            head = file.read(size)
            found = _START.match(head)
            if found is None:
                return "its header is damaged"
            start, stop = found.span(1)
            digest = hashlib.sha256(length + head[:start] + _NO_DIGEST.encode() + head[stop:])
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None if digest.hexdigest() == found[1].decode() else "its checksum does not match"
