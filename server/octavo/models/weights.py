"""Checkpoint tensors as rows of floats, whatever file they lie in. Knows formats, no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.checkpoint.gguf_config import checkpoint_name, interleaved_heads
from octavo.checkpoint.gguf_file import QUANT_TYPES, GGUFFile, GGUFTensor
from octavo.checkpoint.safetensors_file import check_safetensors

_FLOATS = ("F32", "F16", "BF16", "F64")
# Elements dequantised at a time; what numpy makes on the way stays in a core's cache.
_CACHED = 1 << 17
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTensor:
    """One tensor of a checkpoint, not read yet.

    ``read(start, stop)`` gives rows ``[stop - start, *shape[1:]]`` of a float dtype. ``whole``:
    rows must be read all at once. ``read_blocks`` gives rows as the file has them, uint8, where
    that is blocks of ``block_kind``.
    """

    name: str  # Hugging Face's name
    shape: tuple[int, ...]
    path: Path
    read: Callable[[int, int], Tensor]
    whole: bool = False
    block_kind: str | None = None  # q4_1, say
    read_blocks: Callable[[int, int], Tensor] | None = None


def safetensors_tensors(paths: tuple[Path, ...]) -> Iterator[CheckpointTensor]:
    """Tensors of (sharded) safetensors files, in file order. Raises `ValueError` naming a file
    that is cut short, and the tensor at fault."""
    for path in paths:
        header = check_safetensors(path)
        try:
            with safe_open(path, framework="pt") as file:
                for name in header:
                    yield _safetensor(file, name=name, info=header[name], path=path)
        except SafetensorError as error:
            raise ValueError(f"{path} is corrupt: {error}") from error


def _safetensor(file: Any, *, name: str, info: Mapping[str, Any], path: Path) -> CheckpointTensor:
    part = file.get_slice(name)

    def read(start: int, stop: int) -> Tensor:
        if info["dtype"] not in _FLOATS:
            raise ValueError(
                f"{path}: tensor {name} has dtype {info['dtype']}; known are {', '.join(_FLOATS)}"
            )
        rows: Tensor = part[start:stop]
        return rows

    return CheckpointTensor(name=name, shape=tuple(info["shape"]), path=path, read=read)


def gguf_tensors(
    paths: tuple[Path, ...], *, config: Mapping[str, Any]
) -> Iterator[CheckpointTensor]:
    """Tensors of (split) GGUF files under their Hugging Face names, dequantised as they are read,
    or as they are.

    Raises `ValueError` naming a file that is cut short, and the tensor at fault.
    """
    for path in paths:
        file = GGUFFile(path)
        for tensor in file.tensors.values():
            yield _gguf_tensor(file, tensor=tensor, config=config)


def _gguf_tensor(
    file: GGUFFile, *, tensor: GGUFTensor, config: Mapping[str, Any]
) -> CheckpointTensor:
    name = checkpoint_name(tensor.name)
    heads = interleaved_heads(name, config=config)

    def read(start: int, stop: int) -> Tensor:
        rows = _dequantised(file, tensor=tensor, start=start, stop=stop)
        if len(tensor.shape) == 1:
            rows = rows.reshape(-1)
        return _halves_from_pairs(rows, num_heads=heads) if heads else rows

    def read_blocks(start: int, stop: int) -> Tensor:
        rows = torch.from_numpy(file.rows(tensor, start=start, stop=stop))
        return _halves_from_pairs(rows, num_heads=heads) if heads else rows

    # A 1-d tensor is one row of the file, and a head's rows change places among themselves.
    whole = len(tensor.shape) == 1 or heads > 0
    kind = QUANT_TYPES.get(tensor.type_id)
    return CheckpointTensor(
        name=name,
        shape=tensor.shape,
        path=file.path,
        read=read,
        whole=whole,
        block_kind=None if kind is None else kind.name.lower(),
        read_blocks=read_blocks,
    )


def _dequantised(file: GGUFFile, *, tensor: GGUFTensor, start: int, stop: int) -> Tensor:
    if len(tensor.shape) == 1:
        start, stop = 0, 1
    raw = file.rows(tensor, start=start, stop=stop)
    kind = tensor.quant_type
    if kind.name in _PLAIN:
        return torch.from_numpy(raw).view(_PLAIN[kind.name])
    # Imported here because other formats must not pay for it at start-up.
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    number = GGMLQuantizationType(tensor.type_id)
    blocks = raw.reshape(-1, kind.nbytes)
    rows = torch.empty(stop - start, tensor.shape[-1])
    flat = rows.view(-1, kind.block).numpy()
    step = _CACHED // kind.block
    for at in range(0, len(blocks), step):
        # As one row: the package works row by row, in pieces too small to be quick.
        one_row = blocks[at : at + step].reshape(1, -1)
        flat[at : at + step] = dequantize(one_row, number).reshape(-1, kind.block)
    return rows


def _halves_from_pairs(rows: Tensor, *, num_heads: int) -> Tensor:
    """Rows of q or k back in the order whose halves rotate against each other."""
    size = rows.shape[0] // num_heads // 2
    by_pair = rows.reshape(num_heads, size, 2, *rows.shape[1:])
    return by_pair.transpose(1, 2).reshape(rows.shape)
