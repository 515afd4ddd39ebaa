"""What to measure of linear: tiles for decode and prefill, and where cuBLAS is faster yet.

Tiles first; then, in another process, the two ops named cublas, which measure cuBLAS, held to the
same bits, against the tiles of the table. The calls timed follow one another in a graph, on weights
of their own, so that an early launch ("PDL": 1) shows what it gains: the next one's weights come
while one ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from octavo_kernels.matmul import cublas
from octavo_kernels.matmul.gpu import (
    BUCKETS,
    SHARED_BYTES,
    by_cublas,
    by_tile,
    default_tile,
    make_tile,
    shared_bytes,
    tile_for,
    tuned_key,
)
from octavo_kernels.matmul.gpu_hopper import hopper_shared_bytes, make_hopper_tile
from octavo_kernels.tuning import Choice, Tunable

_SHAPES_8B = ((6144, 4096), (4096, 4096), (4096, 14336), (28672, 4096), (128256, 4096))
_SHAPES_SMALL = ((4096, 1024), (1024, 2048), (1024, 3072), (6144, 1024), (151936, 1024))
_GATED = ((28672, 4096), (6144, 1024))
_ROWS = {8: 1, BUCKETS[-1]: 2048}  # rows timed for a bucket, where not the bucket's size
_ROTATE = 8
# (BLOCK_N, BLOCK_K, warps, stages, SWAP): weights are streamed once, so what counts is bytes in
# flight on a multiprocessor: (stages - 1) tiles of each of the programs that fit there.
_STREAMING = (
    (16, 128, 2, 8, 0),
    (16, 256, 2, 3, 0),
    (16, 256, 2, 5, 0),
    (16, 256, 2, 6, 0),
    (16, 512, 2, 3, 0),
    (16, 512, 2, 4, 0),
    (16, 512, 4, 4, 0),
    (32, 128, 2, 5, 0),
    (32, 128, 4, 6, 0),
    (32, 256, 2, 3, 0),
    (32, 256, 2, 4, 0),
    (32, 256, 2, 5, 0),
    (32, 256, 4, 4, 0),
    (32, 512, 4, 3, 0),
    (32, 512, 4, 4, 0),
    (64, 128, 4, 4, 0),
    (64, 256, 4, 3, 0),
    (64, 256, 4, 4, 0),
    (16, 128, 1, 6, 1),
    (16, 256, 1, 4, 1),
    (16, 256, 1, 5, 1),
    (16, 256, 1, 6, 1),
    (16, 512, 1, 3, 1),
    (16, 512, 1, 4, 1),
    (32, 128, 2, 5, 1),
    (32, 128, 2, 8, 1),
    (32, 256, 2, 3, 1),
    (32, 256, 2, 4, 1),
    (32, 256, 2, 5, 1),
    (32, 512, 2, 3, 1),
    (32, 512, 2, 4, 1),
    (64, 64, 4, 8, 1),
    (64, 128, 4, 4, 1),
    (64, 128, 4, 6, 1),
    (64, 256, 4, 3, 1),
    (64, 256, 4, 4, 1),
    (128, 64, 4, 5, 1),
    (128, 128, 4, 3, 1),
    (128, 128, 4, 4, 1),
    (128, 128, 8, 4, 1),
)
# Of those, what was best somewhere: measured with early launches too.
_EARLY = (
    (16, 256, 1, 5, 1),
    (16, 256, 1, 6, 1),
    (16, 512, 2, 4, 0),
    (32, 256, 2, 5, 1),
    (32, 512, 2, 4, 1),
    (64, 64, 4, 8, 1),
    (64, 128, 4, 6, 1),
    (128, 128, 4, 4, 1),
)
# Hopper's ring: weight rows of a wgmma; (bytes, BLOCK_K). Half of the shared memory leaves room for
# a second program, or for the next launch, which fills its ring early.
_HOPPER_ROWS = (8, 16, 24, 32, 40, 48, 56, 64)
_HALF, _WHOLE = 112 * 1024, 224 * 1024
_HOPPER_RINGS = ((_HALF, 64), (_HALF, 128), (_HALF, 256), (_WHOLE, 128), (_WHOLE, 256))
_MULTIPROCESSORS = 132
_HEAD_ROWS = 100_000  # weights of as many rows are a head's
# (BLOCK_M, BLOCK_N, warps, stages) at BLOCK_K 64 for 128 and 256 rows, then for many
_MIDDLE = (
    (64, 32, 4, 5),
    (64, 64, 4, 5),
    (64, 128, 4, 3),
    (64, 128, 4, 5),
    (64, 256, 4, 4),
    (128, 32, 4, 5),
    (128, 64, 4, 4),
    (128, 64, 4, 6),
    (128, 128, 4, 4),
    (128, 128, 8, 4),
    (128, 256, 8, 3),
    (256, 64, 8, 4),
    (256, 128, 8, 3),
)
_MANY = (
    (128, 128, 4, 3),
    (128, 128, 4, 4),
    (128, 128, 8, 4),
    (128, 256, 8, 3),
    (128, 256, 8, 4),
    (256, 64, 8, 4),
    (256, 128, 8, 3),
    (256, 128, 8, 4),
)


def _parts(key: str) -> tuple[int, int, torch.dtype, int]:
    shape, dtype, bucket = key.split("/")
    n, k = map(int, shape.split("x"))
    return n, k, getattr(torch, dtype), int(bucket)


def _streaming(
    bucket: int, k: int, gated: bool, tiles: Iterable[tuple[int, int, int, int, int]]
) -> Iterable[Choice]:
    for block_n, block_k, warps, stages, swap in tiles:
        if gated and block_n > 64:
            continue
        # 8 rows only as the flat operand; no tile longer than what it walks, and none whose x
        # alone fills the registers.
        rows = bucket if swap else max(bucket, 16)
        if block_k > k or rows * block_k > 8192 * max(warps // 2, 1):
            continue
        yield make_tile(rows, block_n, block_k, warps=warps, stages=stages, swap=swap)


def _hopper(bucket: int, n: int, k: int, gated: bool) -> Iterable[Choice]:
    """Rings over the tiles that spread the rows most evenly, and over those of 64 rows."""
    columns = n // 2 if gated else n
    tall = [(rows, 2) for rows in _HOPPER_ROWS if gated or rows >= 40]
    shapes = tall if gated else [*tall, *((rows, 1) for rows in _HOPPER_ROWS)]
    widths = {shape: shape[0] if gated else shape[0] * shape[1] for shape in shapes}
    shapes.sort(key=lambda shape: _cost(columns, bucket, widths[shape]))
    for shape in dict.fromkeys((*shapes[:3], (64, 2 if gated else 1))):
        rows, parts = shape
        for ring, block_k in _HOPPER_RINGS:
            one = make_hopper_tile(bucket, rows, block_k, stages=1, parts=parts)
            stages = min(ring // hopper_shared_bytes(one), -(-k // block_k))
            if stages < 3 or (block_k == 64 and bucket < 32):
                continue
            tile = {**one, "STAGES": stages}
            yield tile
            yield {**tile, "PDL": 1}
            if ring == _HALF and columns > widths[shape] * _MULTIPROCESSORS:
                yield {**tile, "HOPPER": 2}


def _cost(columns: int, bucket: int, width: int) -> float:
    """Of the busiest multiprocessor: weight rows, and as a part of those x, which comes from L2."""
    most = -(-columns // (width * _MULTIPROCESSORS)) * width
    return most * (1 + bucket / width / 4)


def _wide(tiles: Iterable[tuple[int, int, int, int]], bucket: int, gated: bool) -> Iterable[Choice]:
    for block_m, block_n, warps, stages in tiles:
        if gated:
            block_n //= 2
        if block_m > bucket:
            continue
        yield make_tile(block_m, block_n, 64, warps=warps, stages=stages)
        yield make_tile(block_m, block_n, 64, warps=warps, stages=stages, tma=1)
        if bucket == BUCKETS[-1]:
            yield make_tile(block_m, block_n, 64, warps=warps, stages=stages, group=16, tma=1)
        elif stages <= 4 and block_n <= 128:
            yield make_tile(block_m, block_n, 128, warps=warps, stages=3)


def _tiles(key: str, gated: bool) -> list[Choice]:
    n, k, dtype, bucket = _parts(key)
    if bucket <= 64:
        early = [{**t, "PDL": 1} for t in _streaming(bucket, k, gated, _EARLY)]
        ring = [] if dtype == torch.float32 else _hopper(bucket, n, k, gated)
        more: Iterable[Choice] = [*_streaming(bucket, k, gated, _STREAMING), *early, *ring]
    else:
        more = _wide(_MANY if bucket == BUCKETS[-1] else _MIDDLE, bucket, gated)
    found = [default_tile(n, k, dtype, bucket, gated)]
    for tile in more:
        taken = shared_bytes(tile, gated, is_widened=n >= _HEAD_ROWS)
        if tile not in found and taken <= SHARED_BYTES:
            found.append(tile)
    return found


def _make(key: str, choice: Choice, gated: bool) -> Callable[[], Any]:
    n, k, dtype, bucket = _parts(key)
    rows = _ROWS.get(bucket, bucket)
    x = torch.randn(rows, k, device="cuda", dtype=dtype)
    weight = torch.randn(n, k, device="cuda", dtype=dtype)
    is_cublas = "cublas" in choice  # which never writes logits: those are float32
    out_dtype = torch.float32 if n >= _HEAD_ROWS and not is_cublas else dtype
    out = torch.empty(rows, n // 2 if gated else n, device="cuda", dtype=out_dtype)
    activation = "silu_mul" if gated else None
    if not choice.get("cublas"):
        tile = choice if "BLOCK_M" in choice else tile_for(n, k, dtype, rows, gated=gated)
        early = bool(tile.get("PDL", 0))
        return lambda: by_tile(x, weight, tile, activation=activation, out=out, use_pdl=early)
    if not cublas.is_held():
        raise ValueError("cuBLAS is not held to the same bits in this process")
    return lambda: by_cublas(x, weight, activation=activation, out=out)


def _keys(gated: bool, buckets: Sequence[int]) -> tuple[str, ...]:
    """The 8B shapes by bucket, then the small ones: a tuner short of time leaves out the last."""
    pairs = [(shape, b) for b in buckets for shape in _SHAPES_8B]
    pairs += [(shape, b) for b in (8, 16, 256) if b in buckets for shape in _SHAPES_SMALL]
    # A head multiplies the rows that sample, never a whole prompt.
    pairs = [(shape, b) for shape, b in pairs if b <= 256 or shape[0] < _HEAD_ROWS]
    kept = [(shape, b) for shape, b in pairs if not gated or shape in _GATED]
    return tuple(tuned_key(n, k, torch.bfloat16, b) for (n, k), b in kept)


def _tile_tunable(gated: bool) -> Tunable:
    return Tunable(
        op="gated_linear" if gated else "linear",
        keys=_keys(gated, BUCKETS),
        candidates=lambda key: _tiles(key, gated),
        make=lambda key, choice: _make(key, choice, gated),
        rotate=_ROTATE,
    )


def _cublas_tunable(gated: bool) -> Tunable:
    return Tunable(
        op="gated_linear_cublas" if gated else "linear_cublas",
        keys=_keys(gated, BUCKETS[3:]),
        candidates=lambda key: ({"cublas": 0}, {"cublas": 1}),
        prepare=cublas.hold_to_same_bits,
        make=lambda key, choice: _make(key, choice, gated),
        rotate=_ROTATE,
    )


TUNABLES = (
    _tile_tunable(False),
    _tile_tunable(True),
    _cublas_tunable(False),
    _cublas_tunable(True),
)
