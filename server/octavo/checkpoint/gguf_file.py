"""Reads GGUF: metadata and where each tensor's bytes lie. Knows bytes; knows nothing of models.

The header alone is parsed here, in milliseconds; the `gguf` package's reader makes an array object
per vocabulary entry, which costs seconds on every start.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# Scalar type number -> struct code; 8 (string) and 9 (array) are no scalars.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_ALIGNMENT = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantType:
    """How one GGUF tensor type stores numbers: ``block`` elements in ``nbytes`` bytes."""

    name: str
    block: int
    nbytes: int


QUANT_TYPES: Mapping[int, QuantType] = {
    0: QuantType(name="F32", block=1, nbytes=4),
    1: QuantType(name="F16", block=1, nbytes=2),
    2: QuantType(name="Q4_0", block=32, nbytes=18),
    3: QuantType(name="Q4_1", block=32, nbytes=20),
    8: QuantType(name="Q8_0", block=32, nbytes=34),
    12: QuantType(name="Q4_K", block=256, nbytes=144),
    13: QuantType(name="Q5_K", block=256, nbytes=176),
    14: QuantType(name="Q6_K", block=256, nbytes=210),
    30: QuantType(name="BF16", block=1, nbytes=2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFTensor:
    """One tensor's place in a file. ``shape`` is row-major, as torch has it."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int  # bytes from the beginning of the file
    path: Path

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        kind = self.quant_type
        return self.shape[-1] // kind.block * kind.nbytes

    @property
    def quant_type(self) -> QuantType:
        """Raises `ValueError` naming the tensor when its type is not one we read."""
        kind = QUANT_TYPES.get(self.type_id)
        if kind is None:
            known = ", ".join(k.name for k in QUANT_TYPES.values())
            raise ValueError(
                f"{self.path}: tensor {self.name} has GGUF type {self.type_id}; known are {known}"
            )
        return kind


class GGUFFile:
    """One GGUF file: ``metadata`` (plain Python values) and ``tensors`` by name.

    Arrays of numbers are numpy arrays, arrays of strings lists. Raises `ValueError` naming the
    file, and the tensor whose bytes are missing when the file is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        self._size = path.stat().st_size
        if self._size == 0:
            raise ValueError(f"{path} is empty, not a GGUF file")
        with path.open("rb") as handle:
            # Pages of the header are all that is read here; private, as torch wants memory it could
            # write to.
            self._buffer = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        self._at = 0
        self._where = "its header"
        try:
            self._read_header()
        except (struct.error, IndexError, OverflowError) as error:
            raise ValueError(
                f"{path} is truncated or corrupt: it ends (at {self._size} bytes) inside "
                f"{self._where}"
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is corrupt: text that is not UTF-8 in {self._where}"
            ) from error

    def close(self) -> None:
        self._buffer.close()

    def rows(self, tensor: GGUFTensor, *, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Raw bytes ``[stop - start, row_bytes]`` of some rows, a view on the mapped file."""
        stride = tensor.row_bytes
        view = np.frombuffer(
            self._buffer,
            dtype=np.uint8,
            count=(stop - start) * stride,
            offset=tensor.offset + start * stride,
        )
        return view.reshape(stop - start, stride)

    def _unpack(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._buffer, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise IndexError
        self._at += count
        return self._buffer[self._at - count : self._at]

    def _string(self) -> str:
        return self._take(self._unpack("Q")).decode()

    def _read_header(self) -> None:
        if self._take(4) != b"GGUF":
            raise ValueError(f"{self.path} is not a GGUF file: it does not begin with 'GGUF'")
        version = self._unpack("I")
        if version not in (2, 3):
            raise ValueError(f"{self.path}: GGUF version must be 2 or 3, got {version}")
        num_tensors, num_entries = self._unpack("Q"), self._unpack("Q")
        for _ in range(num_entries):
            self._where = "its metadata"
            key = self._string()
            self._where = f"metadata {key}"
            self.metadata[key] = self._value(self._unpack("I"))
        self._where = "the list of tensors"
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"{self.path}: general.alignment must be positive, got {alignment!r}")
        data_start = -(-self._at // alignment) * alignment
        for name, shape, type_id, offset in infos:
            self._place(name, shape=shape, type_id=type_id, offset=data_start + offset)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dims = self._unpack("I")
        if num_dims > _MAX_DIMS:
            raise ValueError(f"{self.path} is corrupt: tensor {name} has {num_dims} dimensions")
        shape = tuple(reversed([self._unpack("Q") for _ in range(num_dims)]))
        return name, shape, self._unpack("I"), self._unpack("Q")

    def _place(self, name: str, *, shape: tuple[int, ...], type_id: int, offset: int) -> None:
        """Checks the tensor's extent against the file, so that no later read can run past it."""
        tensor = GGUFTensor(name=name, shape=shape, type_id=type_id, offset=offset, path=self.path)
        self.tensors[name] = tensor
        if type_id not in QUANT_TYPES:
            return  # refused by name when the loader asks for it
        if not shape or shape[-1] % tensor.quant_type.block:
            raise ValueError(
                f"{self.path} is corrupt: tensor {name} of shape {shape} cannot be stored as "
                f"{tensor.quant_type.name}"
            )
        end = offset + tensor.num_rows * tensor.row_bytes
        if end > self._size:
            raise ValueError(
                f"{self.path} is truncated: tensor {name} ends at byte {end}, "
                f"the file at {self._size}"
            )

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"{self.path} is corrupt: {self._where} has unknown type {kind}")
        item, count = self._unpack("I"), self._unpack("Q")
        if item in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[item] if _SCALARS[item] != "?" else "?")
            return np.frombuffer(self._take(count * dtype.itemsize), dtype=dtype)
        if item == _STRING:
            return list(self._strings(count))
        raise ValueError(f"{self.path} is corrupt: {self._where} is an array of type {item}")

    def _strings(self, count: int) -> Iterator[str]:
        """Vocabularies have 10^5 entries: a loop without the bookkeeping of `_string`."""
        length_at: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from
        buffer, at = self._buffer, self._at
        for _ in range(count):
            (length,) = length_at(buffer, at)
            if length > self._size - at:
                raise IndexError
            yield buffer[at + 8 : at + 8 + length].decode()
            at += 8 + length
        self._at = at


def fingerprint(path: Path) -> str:
    """Names a file's content cheaply: its size, time of change and first 64 KiB, hashed."""
    status = path.stat()
    with path.open("rb") as handle:
        digest = hashlib.sha256(handle.read(1 << 16))
    digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]
