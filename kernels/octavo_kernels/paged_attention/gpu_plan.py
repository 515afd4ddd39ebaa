"""The work of one attention step on a GPU, made on the device once and shared by all layers.

Two kernels divide a step's requests, and give a row the same bits, so the division is about speed
alone. Requests with few rows (query_len * G <= DECODE_ROWS, G query heads a kv head) are *decoded*:
one unit of work is one partition of keys for all rows of one (request, kv head). The others are
*prefilled*: one unit is one tile of rows against all keys they see. (With a float32 cache all are:
without tensor cores the bits depend on the tile.) Requests of no tokens get nothing.
All sizes a launch depends on are host bounds; what the device decides is read there, so that a
captured CUDA graph stays valid for any lengths within the bounds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_kernels import device
from octavo_kernels.launch import launch
from octavo_kernels.paged_attention import numerics, plan_kernel
from octavo_kernels.tuning import Choice, choose

DECODE_ROWS = 64  # rows of the decode kernel's tile
PREFILL_ROWS = 128  # rows of a prefill tile, heads included
_MAX_PARTIAL_ROWS = 1 << 17
_INTERPRETED = 3  # multiprocessors of Triton's interpreter
_SHARED_BYTES = 228 << 10  # of a multiprocessor, 1 KiB a program included
_MUCH_SHARED = 160 << 10  # of a program: less has no room for a third stage
_CHUNK = 32  # programs, or prefill tiles, that one program of the plan kernel places


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Who computes what. Made by `make_plan`; every tensor lies on the device.

    Decode. `requests` [R, 8] int32, one row a decoded request, in request order:
      request, first query token, query_len, seq_len, first (partition that any row sees),
      own (first partition that the decode kernel computes; the ones before it are computed by the
      shared-prefix kernel), end (past the last partition), partial_start.
    Units are ordered by request, kv head, partition. `programs` [P + 1, 4] int32 says where each
    program of the persistent grid begins: row of `requests`, kv head, partition, tiles of all units
    before. Program i runs from its own beginning to the next one's.
    A request of one partition is written to the output at once. Another one's partials wait in
    `partials_m`, `partials_l` [S] and `partials` [S, HP] float32 (HP = head size padded to a power
    of two; unnormalised, in base 2 as in `numerics`): row
      partial_start + (kv_head * (end - first) + partition - first) * query_len * G + token * G + g
    and are folded in ascending order by whoever finishes last, as `arrivals` [R * K] int32 tells
    (entry: row of `requests` * K + kv head; counts the units done, own <= partition < end).

    Prefill. `tiles` [C, 2] int32: request, its first query token, longest first; `num_tiles` [1].
      A tile has `block_q` query tokens. C is 0 where no request can need one.
    """

    num_requests: int
    num_tokens: int
    max_query_len: int
    max_seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    cache_dtype: torch.dtype
    sliding_window: int
    partition: int
    block_q: int
    requests: Tensor
    num_decoded: Tensor  # [1] int32
    programs: Tensor
    arrivals: Tensor
    partials_m: Tensor
    partials_l: Tensor
    partials: Tensor
    tiles: Tensor
    num_tiles: Tensor

    @property
    def num_programs(self) -> int:
        """Programs of the decode kernel; 0 where no request can be decoded."""
        return self.programs.shape[0] - 1

    @property
    def is_split(self) -> bool:
        """Whether a request may have several partitions."""
        return self.partials.shape[0] > 0


def make_plan(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    *,
    num_tokens: int,
    max_query_len: int,
    max_seq_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    sliding_window: int = 0,
    cache_dtype: torch.dtype,
    per_sm: int | None = None,
    max_partitions: int | None = None,
    shared_partitions: Tensor | None = None,
) -> AttentionPlan:
    """Divides a step among programs; one launch, nothing is read back.

    query_start_loc [R + 1], seq_lens [R] int32 on the device. num_tokens, max_query_len and
    max_seq_len bound what they hold: longer requests are cut off, never read past the bound.
    cache_dtype: what the decode kernel will read; with head_dim it decides its grid.
    per_sm: programs of it on a multiprocessor, to try (default: the measured choice).
    max_partitions: a bound on the partitions of all decoded requests together (default: as many as
    R requests of max_seq_len have). Requests that find no room for their partials are prefilled:
    the same bits, slower. A good bound saves memory, and the prefill launch; a broken one may
    leave rows unwritten.
    shared_partitions [R] int32: leading partitions whose partials another kernel computes.
    """
    num_requests = seq_lens.shape[0]
    check_lengths(query_start_loc, seq_lens, shared_partitions)
    _check_sizes(num_heads, num_kv_heads, num_tokens, max_query_len, max_seq_len, sliding_window)
    group = num_heads // num_kv_heads
    partition, block_q = numerics.PARTITION, PREFILL_ROWS // group
    num_partitions = num_requests * -(-max_seq_len // partition)
    num_partitions = min(num_partitions, max_partitions or num_partitions)
    decode_rows = 0 if cache_dtype == torch.float32 else DECODE_ROWS
    rows_bound = min(max_query_len, decode_rows // group) * num_heads
    needed_rows = num_partitions * rows_bound if max_seq_len > partition else 0
    partial_rows = min(needed_rows, _MAX_PARTIAL_ROWS)
    has_tiles = max_query_len * group > decode_rows or needed_rows > partial_rows
    capacity = min(-(-num_tokens // block_q) + num_requests, num_tokens) if has_tiles else 0
    num_programs = _processors(seq_lens) if rows_bound and num_requests else 0
    if num_programs:
        num_programs *= per_sm or decode_choice(head_dim, cache_dtype)["per_sm"]

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=seq_lens.device)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=seq_lens.device)

    plan = AttentionPlan(
        num_requests=num_requests, num_tokens=num_tokens, max_query_len=max_query_len,
        max_seq_len=max_seq_len, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, cache_dtype=cache_dtype, sliding_window=sliding_window,
        partition=partition, block_q=block_q,
        requests=ints(num_requests, 8), num_decoded=ints(1), programs=ints(num_programs + 1, 4),
        arrivals=ints(num_requests * num_kv_heads), partials_m=floats(partial_rows),
        partials_l=floats(partial_rows), partials=floats(partial_rows, padded(head_dim)),
        tiles=ints(capacity, 2), num_tiles=ints(1),
    )  # fmt: skip
    launch(
        plan_kernel.divide,
        (2 + num_programs // _CHUNK + -(-capacity // _CHUNK),),
        query_start_loc, seq_lens, shared_partitions, plan.requests, plan.num_decoded,
        plan.programs, plan.arrivals, plan.tiles, plan.num_tiles,
        num_requests, num_tokens, max_query_len, max_seq_len, num_programs, partial_rows, capacity,
        num_kv_heads, block_q,
        G=group, DECODE_ROWS=decode_rows, TILE=numerics.tile_size(head_dim), PARTITION=partition,
        WINDOW=sliding_window, CHUNK=_CHUNK, BLOCK_R=64, num_warps=4,
    )  # fmt: skip
    return plan


def padded(head_dim: int) -> int:
    """The head size as the tensor cores see it: the next power of two."""
    return 1 << (head_dim - 1).bit_length()


@functools.cache
def decode_choice(head_dim: int, cache_dtype: torch.dtype) -> Choice:
    """How the decode kernel is launched, which decides no bits.

    per_sm: programs on a multiprocessor; stages: tiles on their way or in use; fused: whether the
    last program of a (request, kv head) folds its partials, or a kernel of its own does; keep_q:
    whether queries stay in registers from tile to tile.
    """
    size = cache_dtype.itemsize
    candidates = decode_candidates(head_dim, size)
    default = candidates[0]
    if device.shared_bytes() < _MUCH_SHARED:
        default = next(choice for choice in candidates if choice["stages"] == 2)
    return choose("paged_attention_decode", decode_key(head_dim, size), default)


def decode_candidates(head_dim: int, itemsize: int) -> tuple[Choice, ...]:
    """Choices that fit a Hopper GPU's shared memory, the default first."""
    width, tile = padded(head_dim), numerics.tile_size(head_dim)
    scratch = 4 * DECODE_ROWS * width
    found: list[Choice] = []
    for per_sm, stages in ((2, 3), (1, 4), (1, 3), (1, 2), (2, 2), (2, 4)):
        # Tiles in the cache's own dtype are read by the tensor cores where they arrive; others
        # are widened on the way, which frees their place a stage earlier.
        buffers = stages if itemsize > 1 else stages - 1
        widened = 2 * tile * width if itemsize < 2 else 0
        needed = buffers * 2 * tile * width * itemsize + max(scratch, widened)
        if per_sm * (needed + 1024) <= _SHARED_BYTES:
            kept = (0, 1) if itemsize < 2 or head_dim > 128 else (1, 0)
            found += [
                {"per_sm": per_sm, "stages": stages, "fused": fused, "keep_q": keep_q}
                for keep_q in kept
                for fused in (1, 0)
            ]
    return tuple(found)


def decode_key(head_dim: int, itemsize: int) -> str:
    """What the shipped table calls a head size and the bytes of a cached element."""
    return f"H{head_dim} {itemsize}B"


def _processors(tensor: Tensor) -> int:
    """Multiprocessors that tensor's kernels run on."""
    return device.num_multiprocessors() if tensor.device.type != "cpu" else _INTERPRETED


def _check_sizes(
    num_heads: int,
    num_kv_heads: int,
    num_tokens: int,
    max_query_len: int,
    max_seq_len: int,
    sliding_window: int,
) -> None:
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"query heads must be a multiple of {num_kv_heads}, got {num_heads}")
    if num_heads > num_kv_heads * PREFILL_ROWS:
        raise ValueError(
            f"at most {PREFILL_ROWS} query heads a kv head, got {num_heads // num_kv_heads}"
        )
    if min(num_tokens, max_query_len, max_seq_len, sliding_window) < 0:
        raise ValueError(
            "num_tokens, max_query_len, max_seq_len and sliding_window must be at least 0, got "
            f"{num_tokens}, {max_query_len}, {max_seq_len}, {sliding_window}"
        )


def check_lengths(query_start_loc: Tensor, seq_lens: Tensor, shared: Tensor | None = None) -> None:
    """Raises ValueError for shapes, dtypes or strides that the kernels would misread."""
    num_requests = seq_lens.shape[0]
    if query_start_loc.shape != (num_requests + 1,) or seq_lens.dim() != 1:
        raise ValueError(
            f"query_start_loc [R + 1] and seq_lens [R] must agree, got "
            f"{tuple(query_start_loc.shape)} and {tuple(seq_lens.shape)}"
        )
    if shared is not None and shared.shape != (num_requests,):
        raise ValueError(f"shared_partitions must be [{num_requests}], got {tuple(shared.shape)}")
    for name, tensor in (
        ("query_start_loc", query_start_loc),
        ("seq_lens", seq_lens),
        ("shared_partitions", shared),
    ):
        if tensor is not None and not (tensor.dtype == torch.int32 and tensor.is_contiguous()):
            raise ValueError(f"{name} must be contiguous int32, got {tensor.dtype}")
