"""Packed attention: the bits of paged attention, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from octavo_kernels.packed_attention import packed_attention as dispatched
from octavo_kernels.packed_attention.gpu import packed_attention
from octavo_kernels.paged_attention.gpu import paged_attention
from octavo_kernels.testing import gpu_device, same_bits

DEVICE = gpu_device()


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def _starts(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)


def _inputs(**changes: Any) -> dict[str, Any]:
    given = {
        "q": _normal(9, 4, 32),
        "k": _normal(12, 2, 32, seed=1),
        "v": _normal(12, 2, 32, seed=2),
        "query_start_loc": _starts(4, 5),
        "key_start_loc": _starts(6, 6),
        "max_query_len": 5,
        "scale": 0.2,
    }
    return given | changes


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_bits_are_those_of_paged_attention(is_causal: bool) -> None:
    lengths, block = ((33, 70), (2, 150)), 32
    q = _normal(35, 4, 64)
    k, v = _normal(220, 2, 64, seed=1), _normal(220, 2, 64, seed=2)
    caches = [torch.zeros(10, 2, block, 64, dtype=q.dtype, device=DEVICE) for _ in "kv"]
    tables = torch.arange(10, dtype=torch.int32).reshape(2, 5)
    for row, begin in enumerate((0, 70)):
        for slot in range(lengths[row][1]):
            where = int(tables[row, slot // block])
            for cache, source in zip(caches, (k, v), strict=True):
                cache[where, :, slot % block] = source[begin + slot]
    paged = paged_attention(
        q,
        caches[0],
        caches[1],
        block_tables=tables.to(DEVICE),
        query_start_loc=_starts(33, 2),
        seq_lens=torch.tensor([70, 150], dtype=torch.int32, device=DEVICE),
        scale=0.125,
        is_causal=is_causal,
    )
    packed = packed_attention(
        q,
        k,
        v,
        query_start_loc=_starts(33, 2),
        key_start_loc=_starts(70, 150),
        max_query_len=33,
        scale=0.125,
        is_causal=is_causal,
    )
    assert same_bits(packed.flatten(1), paged)


def test_start_locations_beyond_the_tensors_are_clamped() -> None:
    given = _inputs(query_start_loc=_starts(4, 90), key_start_loc=_starts(6, 90))
    good = _inputs(query_start_loc=_starts(4, 5), key_start_loc=_starts(6, 6))
    assert same_bits(packed_attention(**given), packed_attention(**good))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": _normal(9, 3, 32)}, "query heads must be 1 to 64 times the 2 kv heads, got 3"),
        ({"q": _normal(9, 4, 64)}, "must agree"),
        ({"q": _normal(9, 4, 32).long()}, "q must be one of"),
        ({"v": _normal(12, 2, 32, dtype=torch.float16)}, "k and v must be torch.bfloat16"),
        ({"k_scale": torch.ones(2, device=DEVICE)}, "need torch.float8_e4m3fn"),
        ({"q": _normal(32, 4, 9).transpose(0, 2)}, "dense heads"),
        ({"v": _normal(12, 3, 32)[:, :2]}, "one row stride"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"sliding_window": -1}, "at least 0"),
        ({"sinks": torch.ones(3, device=DEVICE)}, r"sinks must be float32 \[4\]"),
        ({"rel_bias": torch.ones(4, 6, device=DEVICE)}, r"\[4, 2 \* span - 1\]"),
        ({"key_start_loc": _starts(6, 6).long()}, "key_start_loc must be contiguous int32"),
        ({"key_start_loc": _starts(12)}, r"must be \[R \+ 1\]"),
        ({"out": torch.empty(9, 4, 32, device=DEVICE)}, "out must be contiguous torch.bfloat16"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed_attention(**_inputs(**changes))


@pytest.mark.parametrize("head_dim", [24, 272])
def test_bad_head_sizes_are_refused(head_dim: int) -> None:
    tensors = {name: _normal(4, 1, head_dim) for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match=f"between 16 and 256, got {head_dim}"):
        packed_attention(**_inputs(**tensors))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU has no kernel")
def test_a_device_without_a_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="packed_attention has no kernel for device 'cpu'"):
        dispatched(**_inputs())
