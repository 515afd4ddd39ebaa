"""Vector operations lane by lane against numpy and torch."""

import numpy as np
import pytest
import torch

from octavo_kernels.parallel import Kernel, kernel
from octavo_kernels.simd import (
    exp,
    exp_flushed,
    first_lanes,
    get_bf16,
    get_f16,
    load_bf16,
    load_f16,
    load_f32,
    load_f32_masked,
    put_bf16,
    put_f16,
    put_f32,
    reduce_add,
    reduce_max,
    store_bf16,
    store_f16,
    store_f32,
    store_f32_masked,
)
from octavo_kernels.testing import same_bits


@kernel
def _exp(part: int, num_parts: int, x: int, y: int, n: int) -> None:
    for i in range(0, n, 16):
        store_f32(y + 4 * i, exp(load_f32(x + 4 * i)))


@kernel
def _exp_flushed(part: int, num_parts: int, x: int, y: int, n: int) -> None:
    for i in range(0, n, 16):
        store_f32(y + 4 * i, exp_flushed(load_f32(x + 4 * i)))


def _apply(run: Kernel, x: np.ndarray) -> np.ndarray:
    padded = np.resize(x, -(-x.size // 16) * 16)
    y = np.empty_like(padded)
    run(1, padded.ctypes.data, y.ctypes.data, padded.size)
    return y[: x.size]


def _ulps(got: np.ndarray, x: np.ndarray) -> float:
    want = np.exp(x.astype(np.float64))
    unit = np.spacing(want.astype(np.float32)).astype(np.float64)
    return float((np.abs(got - want) / unit).max())


def test_exp_is_within_two_ulp_everywhere() -> None:
    x = np.linspace(-103.0, 88.72, 400_001).astype(np.float32)
    assert _ulps(_apply(_exp, x), x) <= 2.0


def test_exp_at_the_ends() -> None:
    x = np.array([-np.inf, np.inf, np.nan, 0.0, -0.0, -200.0, 200.0], np.float32)
    np.testing.assert_array_equal(
        _apply(_exp, x), np.array([0, np.inf, np.nan, 1, 1, 0, np.inf], np.float32)
    )


def test_exp_flushed_is_within_two_ulp_or_exactly_zero() -> None:
    x = np.linspace(-87.0, 0.0, 200_001).astype(np.float32)
    assert _ulps(_apply(_exp_flushed, x), x) <= 2.0
    low = np.array([-np.inf, -1e30, -88.0, -87.5, 0.0, np.nan], np.float32)
    np.testing.assert_array_equal(
        _apply(_exp_flushed, low), np.array([0, 0, 0, 0, 1, np.nan], np.float32)
    )


@kernel
def _to_half(part: int, num_parts: int, x: int, bf16: int, f16: int, n: int) -> None:
    for i in range(0, n, 16):
        store_bf16(bf16 + 2 * i, load_f32(x + 4 * i))
        store_f16(f16 + 2 * i, load_f32(x + 4 * i))


@kernel
def _from_half(part: int, num_parts: int, bf16: int, f16: int, x: int, y: int, n: int) -> None:
    for i in range(0, n, 16):
        store_f32(x + 4 * i, load_bf16(bf16 + 2 * i))
        store_f32(y + 4 * i, load_f16(f16 + 2 * i))


@kernel
def _halves_one_by_one(
    part: int, num_parts: int, bf16: int, f16: int, bf16_out: int, f16_out: int, n: int
) -> None:
    for i in range(n):
        put_bf16(bf16_out + 2 * i, get_bf16(bf16 + 2 * i))
        put_f16(f16_out + 2 * i, get_f16(f16 + 2 * i))


def test_sixteen_bit_conversions_equal_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator, dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)
    x = torch.cat([x, torch.randn(1 << 14, generator=generator)])
    x = x[~x.isnan()]
    x = x[: x.numel() // 16 * 16].contiguous()
    n = x.numel()
    bf16, f16 = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.float16)
    _to_half(1, x.data_ptr(), bf16.data_ptr(), f16.data_ptr(), n)
    assert same_bits(bf16, x.bfloat16()) and same_bits(f16, x.half())
    wide_b, wide_f = torch.empty(n), torch.empty(n)
    _from_half(1, bf16.data_ptr(), f16.data_ptr(), wide_b.data_ptr(), wide_f.data_ptr(), n)
    assert same_bits(wide_b, bf16.float()) and same_bits(wide_f, f16.float())
    again_b, again_f = torch.empty_like(bf16), torch.empty_like(f16)
    _halves_one_by_one(
        1, bf16.data_ptr(), f16.data_ptr(), again_b.data_ptr(), again_f.data_ptr(), n
    )
    assert same_bits(again_b, bf16) and same_bits(again_f, f16)


@kernel
def _masked_copy(part: int, num_parts: int, x: int, y: int, count: int) -> None:
    mask = first_lanes(count)
    store_f32_masked(y, load_f32_masked(x, mask), mask)


@pytest.mark.parametrize("count", [-3, 0, 1, 7, 15, 16, 99])
def test_masked_lanes_are_not_touched(count: int) -> None:
    x, y = torch.arange(1.0, 17.0), torch.full((16,), -1.0)
    _masked_copy(1, x.data_ptr(), y.data_ptr(), count)
    kept = max(0, min(count, 16))
    assert torch.equal(y[:kept], x[:kept]) and bool((y[kept:] == -1).all())


@kernel
def _reduce(part: int, num_parts: int, x: int, y: int) -> None:
    put_f32(y, reduce_add(load_f32(x)))
    put_f32(y + 4, reduce_max(load_f32(x)))


def test_reductions_fold_halves() -> None:
    x, y = torch.randn(16, generator=torch.Generator().manual_seed(0)), torch.empty(2)
    _reduce(1, x.data_ptr(), y.data_ptr())
    total = x.clone()
    while total.numel() > 1:
        total = total[: total.numel() // 2] + total[total.numel() // 2 :]
    assert same_bits(y, torch.stack([total[0], x.max()]))
