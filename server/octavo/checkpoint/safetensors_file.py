"""Checks safetensors files before they are read. Knows their header; reads no tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MAX_HEADER = 100 << 20  # bytes; the format's own limit


def check_safetensors(path: Path) -> Mapping[str, Any]:
    """Header of a safetensors file: name -> ``{"dtype", "shape", "data_offsets"}``.

    Raises `ValueError` naming the file, and the tensor whose bytes are missing when it is cut
    short (the safetensors library names none).
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > _MAX_HEADER:
            raise ValueError(f"{path} is not a safetensors file")
        if 8 + length > size:
            raise ValueError(f"{path} is truncated: its header ends at byte {8 + length} of {size}")
        text = handle.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        ends = {name: int(info["data_offsets"][1]) for name, info in header.items()}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is corrupt: its header is not what safetensors has") from error
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        if 8 + length + end > size:
            raise ValueError(
                f"{path} is truncated: tensor {name} ends at byte {8 + length + end}, "
                f"the file at {size}"
            )
    return header  # type: ignore[no-any-return]
