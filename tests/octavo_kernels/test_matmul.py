"""The order of a matmul's sums, whatever runs it; packing; refusals."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from octavo_kernels import num_threads, set_num_threads
from octavo_kernels.matmul import PackedWeight, gather_rows, matmul, pack_rows_, unpack
from octavo_kernels.testing import same_bits


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = num_threads()
    yield
    if num_threads() != before:
        set_num_threads(before)


def _weight(n: int, k: int, dtype: torch.dtype = torch.float32) -> PackedWeight:
    packed = PackedWeight.empty(n, k, dtype=dtype)
    pack_rows_(packed, torch.randn(n, k), start=0)
    return packed


def _narrow(packed: PackedWeight, width: int) -> PackedWeight:
    """The same weight in panels of another width."""
    panels = -(-packed.n // width)
    plain = torch.zeros(panels * width, packed.k)
    plain[: packed.n] = unpack(packed)
    data = plain.view(panels, width, packed.k).transpose(1, 2).contiguous().to(packed.data.dtype)
    return PackedWeight(data=data, n=packed.n, k=packed.k)


def test_an_output_is_one_chain_of_fused_multiply_adds() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(5, 203), _weight(51, 203)
    # A product of two float32 is exact in longdouble, its sum all but; rounding each is the fma.
    wide_x, wide_w = x.numpy().astype(np.longdouble), unpack(weight).numpy().astype(np.longdouble)
    chain = np.zeros((5, 51), np.float32)
    for k in range(203):
        chain = (wide_x[:, k : k + 1] * wide_w[:, k] + chain).astype(np.float32)
    assert same_bits(matmul(x, weight), torch.from_numpy(chain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_depend_on_neither_threads_nor_panel_width(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    # Deep enough that a panel is passed in slices of k.
    x, weight, residual = torch.randn(37, 4000), _weight(211, 4000, dtype), torch.randn(37, 211)
    want = matmul(x, weight, residual=residual)
    for threads in (1, 2, 3):
        set_num_threads(threads)
        assert same_bits(matmul(x, weight, residual=residual), want), threads
    for width in (16, 48):
        assert same_bits(matmul(x, _narrow(weight, width), residual=residual), want), width


def test_bias_and_residual_are_added_after_the_sum_in_this_order() -> None:
    torch.manual_seed(3)
    x, weight, bias, residual = (
        torch.randn(9, 65),
        _weight(50, 65),
        torch.randn(50),
        torch.randn(9, 50),
    )
    want = matmul(x, weight) + bias + residual
    assert same_bits(matmul(x, weight, bias=bias, residual=residual), want)


def test_packing_in_parts_of_any_size_gives_the_same_weight() -> None:
    torch.manual_seed(4)
    rows = torch.randn(331, 20)
    whole, parts = (PackedWeight.empty(331, 20, dtype=torch.float32) for _ in range(2))
    pack_rows_(whole, rows, start=0)
    for start, end in ((200, 331), (0, 7), (7, 103), (103, 200)):
        pack_rows_(parts, rows[start:end].double(), start=start)
    assert same_bits(parts.data, whole.data)
    assert same_bits(unpack(whole), rows)


def test_large_weights_start_as_zeros_too() -> None:
    weight = PackedWeight.empty(3000, 700, dtype=torch.float32)  # 8 MB: on huge pages
    assert not weight.data.any()
    pack_rows_(weight, torch.ones(1, 700), start=2999)
    assert torch.equal(matmul(torch.ones(1, 700), weight)[0, 2998:], torch.tensor([0.0, 700.0]))


def test_infinities_and_nans_stay_in_their_row() -> None:
    torch.manual_seed(5)
    x, weight = torch.randn(20, 64), _weight(100, 64)
    want = matmul(x, weight)
    x[3, 5], x[11, 0] = float("nan"), float("inf")
    got = matmul(x, weight)
    assert got[3].isnan().all() and got[11].isinf().all()
    kept = [row for row in range(20) if row not in (3, 11)]
    assert same_bits(got[kept], want[kept])


def test_refusals_name_what_was_got() -> None:
    weight = _weight(10, 8)
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"x contiguous float32 \['T', 8\], got .* \[3, 7\]"):
        matmul(torch.randn(3, 7), weight)
    with pytest.raises(ValueError, match="x contiguous float32 .* got torch.float64"):
        matmul(x.double(), weight)
    with pytest.raises(ValueError, match="bias contiguous"):
        matmul(x, weight, bias=torch.randn(9))
    with pytest.raises(ValueError, match="residual contiguous"):
        matmul(x, weight, residual=torch.randn(10, 3).T)
    with pytest.raises(ValueError, match="no kernel for device 'meta'; it has cpu, and for cuda"):
        matmul(x.to("meta"), weight)
    out = torch.empty(3, 10)
    with pytest.raises(ValueError, match="residual that is also its out"):
        matmul(x, weight, residual=out, out=out)
    with pytest.raises(ValueError, match=r"ids in \[0, 10\), got -1..3"):
        gather_rows(weight, torch.tensor([3, -1]))
    with pytest.raises(ValueError, match=r"ids in \[0, 10\), got 0..10"):
        gather_rows(weight, torch.tensor([0, 10]))
    with pytest.raises(ValueError, match=r"rows 8..11 do not fit a weight of 10 rows"):
        pack_rows_(weight, torch.randn(3, 8), start=8)
    with pytest.raises(ValueError, match="a packed weight is one of"):
        PackedWeight.empty(2, 2, dtype=torch.float64)
