"""What can be measured of quant_matmul: tiles for the 8B shapes, per format and bucket of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from octavo_kernels.quant_matmul import gpu
from octavo_kernels.quant_matmul.weight import GROUP, Kind, QuantActivations, QuantWeight
from octavo_kernels.tuning import Choice, Tunable

_SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
_HEAD = (128256, 4096)
# kind, group (0: per channel), zero points, 8-bit activations
_FORMATS: tuple[tuple[Kind, int, bool, bool], ...] = (
    ("fp8", 0, False, False),
    ("int8", 0, False, False),
    ("int4", 128, False, False),
    ("int4", 128, True, False),
    ("fp8", 0, False, True),
    ("fp8", 128, False, True),
    ("int8", 0, False, True),
)
_TIMED_ROWS = {16: 16, 128: 2048}


def _weight(kind: Kind, n: int, k: int, group: int, paired: bool, device: str) -> QuantWeight:
    """Random codes; scales of about one (a zero point of 8)."""
    data = torch.randint(
        0, 120, (k // GROUP, n, 64 if kind == "int4" else GROUP), dtype=torch.uint8, device=device
    )
    rows = GROUP if kind == "fp8" and group else 1
    shape = (k // group if group else 1, n // rows)
    if paired:  # 0x3C00 is one in float16
        scale = torch.full(shape, 0x3C000008, dtype=torch.int32, device=device)
    else:
        dtype = torch.float16 if kind == "int4" else torch.float32
        scale = torch.ones(shape, dtype=dtype, device=device)
    return QuantWeight(
        kind=kind,
        data=data,
        scale=scale,
        n=n,
        k=k,
        group=group or k,
        rows=rows,
        paired=torch.float16 if paired else None,
    )


def _keys() -> dict[str, tuple[QuantWeight, int, bool]]:
    found = {}
    for kind, group, paired, quantised in _FORMATS:
        shapes = _SHAPES if quantised else (*_SHAPES, _HEAD)
        for n, k in shapes:
            weight = _weight(kind, n, k, group, paired, "meta")
            for bucket in _TIMED_ROWS:
                if (n, k) == _HEAD and bucket != 16:
                    continue  # a head sees one row for each request
                key = gpu.key_of(weight, bucket, quantised=quantised)
                found[key] = (weight, bucket, quantised)
    return found


_KEYS = _keys()


def _candidates(key: str) -> Iterable[Choice]:
    weight, bucket, quantised = _KEYS[key]
    first = gpu.default_choice(weight, bucket, quantised=quantised, wide=False)
    yield first
    for n, m, warps, stages, unroll, first_x in _tiles(weight.kind, bucket, quantised):
        choice = {
            "BLOCK_N": n,
            "BLOCK_M": m,
            "UNROLL": unroll,
            "X_FIRST": first_x,
            "num_warps": warps,
            "num_stages": stages,
        }
        # A tile of 128 x 128 has no registers left for scales that change in every pass.
        if choice != first and not (n * m > 128 * 64 and first["BLOCK_M"] == 64):
            yield choice


def _tiles(kind: Kind, bucket: int, quantised: bool) -> list[tuple[int, int, int, int, int, int]]:
    """BLOCK_N, BLOCK_M, warps, stages, UNROLL, X_FIRST."""
    if bucket == 16 and quantised and kind == "fp8":
        return [(64, 16, 4, 8, 1, 0), (64, 16, 4, 4, 2, 0), (128, 16, 8, 5, 1, 0)]
    if bucket == 16:
        tiles = [(32, 16, 4, 8, 1), (32, 16, 4, 4, 2), (32, 16, 4, 3, 4), (16, 16, 2, 4, 2)]
        tiles += [(64, 16, 8, 4, 2), (64, 16, 4, 5, 1), (64, 16, 4, 4, 2), (128, 16, 4, 3, 1)]
        return [*((*tile, 1) for tile in tiles), (64, 16, 4, 4, 1, 0)]
    tiles = [(128, 128, 8, 4, 1), (128, 64, 8, 4, 1), (64, 128, 4, 3, 1), (64, 64, 4, 4, 1)]
    return [(*tile, 0) for tile in tiles]


def _make(key: str, choice: Choice) -> Callable[[], Any]:
    like, bucket, quantised = _KEYS[key]
    num_rows, device = _TIMED_ROWS[bucket], "cuda"
    group = like.group if like.is_grouped else 0
    weight = _weight(like.kind, like.n, like.k, group, like.paired is not None, device)
    x: torch.Tensor | QuantActivations
    if quantised:
        x = QuantActivations(
            kind=like.kind,
            data=torch.randint(
                0, 120, (num_rows, like.k // GROUP, GROUP), dtype=torch.uint8, device=device
            ),
            scale=torch.ones(num_rows, like.scale.shape[0], device=device),
            k=like.k,
        )
    else:
        x = torch.randn(num_rows, like.k, dtype=torch.bfloat16, device=device)
    fixed: Mapping[str, int] = dict(choice)
    return lambda: gpu.quant_matmul(x, weight, choice=fixed)


TUNABLES = (
    Tunable(op="quant_matmul", keys=tuple(_KEYS), candidates=_candidates, make=_make, rotate=16),
)
