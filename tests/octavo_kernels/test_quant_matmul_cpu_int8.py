"""Int8 on the CPU: every path the same bits, whatever the batch; extremes; writing; refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from octavo_kernels import num_threads, set_num_threads
from octavo_kernels.quant_matmul.cpu_dot import PATHS, CpuPath, host_path, supported_paths
from octavo_kernels.quant_matmul.int8 import (
    Int8Weight,
    gated_int8,
    gather_rows_int8,
    matmul_int8,
    unpack,
    write_rows,
)
from octavo_kernels.quant_matmul.int8_packed import MAX_K, codes_of
from octavo_kernels.quant_matmul.int8_reference import matmul_int8_reference, quantise_tokens
from octavo_kernels.silu_mul import gelu_tanh_mul, silu_mul
from octavo_kernels.testing import same_bits


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = num_threads()
    yield
    if num_threads() != before:
        set_num_threads(before)


def _weight(rows: Tensor, *, is_gated: bool = False, path: CpuPath | None = None) -> Int8Weight:
    weight = Int8Weight.empty(rows.shape[0], rows.shape[1], is_gated=is_gated, path=path)
    write_rows(weight, rows, start=0)
    return weight


def _like(weight: Int8Weight, path: CpuPath) -> Int8Weight:
    """The same codes in another path's panels."""
    other = Int8Weight.empty(weight.n, weight.k, is_gated=weight.is_gated, path=path)
    codes, scale = codes_of(weight)
    write_rows(other, codes, start=0, scale=scale)
    return other


@pytest.mark.parametrize("path", supported_paths())
def test_every_path_gives_the_same_bits(path: CpuPath) -> None:
    torch.manual_seed(1)
    for n, k in ((1, 1), (97, 63), (130, 577)):
        rows = torch.randn(2 * n, k)
        rows[0] = torch.where(rows[0] > 0, 5.0, -5.0)  # codes of -127 and 127 alone
        plain, gated = _weight(rows), _weight(rows, is_gated=True)
        for num_rows in (1, 2, 7, 33):
            x = torch.randn(num_rows, k)
            x[0] = rows[0]  # and so the largest sums
            want, want_gated = matmul_int8(x, plain), gated_int8(x, gated)
            assert same_bits(matmul_int8(x, _like(plain, path)), want), (n, k, num_rows)
            assert same_bits(gated_int8(x, _like(gated, path)), want_gated), (n, k, num_rows)


def test_the_sum_is_exact_and_scaled_in_a_fixed_order() -> None:
    torch.manual_seed(2)
    x, rows = torch.randn(9, 1001), torch.randn(60, 1001)
    weight = _weight(rows)
    codes, scale = codes_of(weight)
    mine, row_scale = quantise_tokens(x)
    sums = (mine @ codes.double().t()).float()
    assert same_bits(matmul_int8(x, weight), sums * (row_scale.float() * scale))


def test_bits_depend_on_neither_threads_nor_batch_mates() -> None:
    torch.manual_seed(3)
    weight = _weight(torch.randn(500, 600))
    x, residual = torch.randn(40, 600), torch.randn(40, 500)
    want = matmul_int8(x, weight, residual=residual)
    for threads in (1, 2, 3):
        set_num_threads(threads)
        assert same_bits(matmul_int8(x, weight, residual=residual), want), threads
        for size in (1, 2, 3, 4, 5, 8, 17):
            part = matmul_int8(x[:size], weight, residual=residual[:size])
            assert same_bits(part, want[:size]), (threads, size)


def test_gated_is_matmul_then_the_gate() -> None:
    torch.manual_seed(4)
    rows, x = torch.randn(2 * 77, 90) / 10, torch.randn(21, 90)
    both, gated = matmul_int8(x, _weight(rows)), _weight(rows, is_gated=True)
    assert same_bits(gated_int8(x, gated), silu_mul(both))
    assert same_bits(gated_int8(x, gated, is_gelu=True), gelu_tanh_mul(both))


def test_bias_and_residual_are_added_after_the_scales_in_this_order() -> None:
    torch.manual_seed(5)
    x, weight = torch.randn(9, 65), _weight(torch.randn(50, 65))
    bias, residual = torch.randn(50), torch.randn(9, 50)
    want = matmul_int8(x, weight) + bias + residual
    assert same_bits(matmul_int8(x, weight, bias=bias, residual=residual), want)


@pytest.mark.parametrize("path", supported_paths())
@pytest.mark.parametrize("width", [1, 16, 64, 131])
def test_extreme_rows_harm_no_other(path: CpuPath, width: int) -> None:
    torch.manual_seed(6)
    weight = _like(_weight(torch.randn(70, width)), path)
    x = torch.randn(20, width)
    want = matmul_int8(x, weight)
    last = width - 1
    x[0], x[1], x[2, last], x[3, 0], x[4, last] = 0.0, -0.0, 1e36, 1e-40, float("nan")
    x[5, 0], x[6, last], x[7] = float("inf"), float("-inf"), float("nan")
    x[8], x[9] = 1e-41, -1e36
    got = matmul_int8(x, weight)
    assert same_bits(got[10:], want[10:])
    assert got[4:8].isnan().all()
    assert torch.equal(got[:2], torch.zeros(2, 70))
    exact = matmul_int8_reference(x, *codes_of(weight))
    for row in (2, 3, 9):
        torch.testing.assert_close(got[row].double(), exact[row], rtol=1e-6, atol=1e-30)
    assert got[8].abs().max() < 1e-30
    assert same_bits(matmul_int8(x[2:3], weight), got[2:3])


def test_the_result_is_near_the_unquantised_product() -> None:
    torch.manual_seed(7)
    x, rows = torch.randn(16, 576), torch.randn(200, 576).double()
    exact = x.double() @ rows.t()
    error = (matmul_int8(x, _weight(rows)) - exact).norm() / exact.norm()
    # A step of 2 * 3.5 / 254 on each side gives a relative error of 0.8 % of each.
    assert error < 0.015


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("path", supported_paths())
def test_writing_in_parts_of_any_size_gives_the_same_weight(path: CpuPath, is_gated: bool) -> None:
    torch.manual_seed(8)
    rows = torch.randn(332, 21)
    whole = _weight(rows, is_gated=is_gated, path=path)
    parts = Int8Weight.empty(332, 21, is_gated=is_gated, path=path)
    for start, end in ((200, 332), (0, 7), (7, 103), (103, 200)):
        write_rows(parts, rows[start:end].double(), start=start)
    for name in ("data", "scale", "base"):
        assert same_bits(getattr(parts, name), getattr(whole, name)), name
    step = rows.abs().amax(1, keepdim=True) / 127
    assert ((unpack(whole) - rows).abs() <= step * 0.501).all()
    assert whole.num_bytes >= 332 * 21


def test_ready_codes_are_kept_as_they_are() -> None:
    torch.manual_seed(9)
    codes = torch.randint(-128, 128, (50, 33), dtype=torch.int8)
    scale = torch.rand(50, dtype=torch.float16) + 0.01
    weight = Int8Weight.empty(50, 33)
    write_rows(weight, codes, start=0, scale=scale)
    assert torch.equal(codes_of(weight)[0], codes)
    x = torch.randn(5, 33)
    want = matmul_int8_reference(x, codes, scale.float())
    torch.testing.assert_close(matmul_int8(x, weight).double(), want, rtol=1e-6, atol=1e-6)
    got = gather_rows_int8(weight, torch.tensor([49, 0, 0]))
    assert same_bits(got, (codes * scale.float()[:, None])[[49, 0, 0]])


def test_the_deepest_sums_do_not_overflow() -> None:
    weight = Int8Weight.empty(3, MAX_K)
    write_rows(
        weight,
        torch.full((3, MAX_K), -128, dtype=torch.int8),
        start=0,
        scale=torch.ones(3),
    )
    x = torch.ones(2, MAX_K)
    x[1] = -1
    want = torch.tensor(127.0 * 128 * MAX_K) * (torch.ones(()) / torch.tensor(127.0))
    assert same_bits(matmul_int8(x, weight), torch.stack([-want, want])[:, None].expand(2, 3))


def test_refusals_name_what_was_got() -> None:
    weight, gated = _weight(torch.randn(10, 8)), _weight(torch.randn(10, 8), is_gated=True)
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"x contiguous float32 \['T', 8\], got .* \[3, 7\]"):
        matmul_int8(torch.randn(3, 7), weight)
    with pytest.raises(ValueError, match="x contiguous float32 .* got torch.float64"):
        gated_int8(x.double(), gated)
    with pytest.raises(ValueError, match="bias contiguous"):
        matmul_int8(x, weight, bias=torch.randn(9))
    with pytest.raises(ValueError, match="residual contiguous"):
        matmul_int8(x, weight, residual=torch.randn(10, 3).T)
    with pytest.raises(ValueError, match=r"out contiguous float32 \[3, 5\]"):
        gated_int8(x, gated, out=torch.empty(3, 10))
    with pytest.raises(ValueError, match="no kernel for device 'meta'; it has cpu, and for cuda"):
        matmul_int8(x.to("meta"), weight)
    out = torch.empty(3, 10)
    with pytest.raises(ValueError, match="residual that is also its out"):
        matmul_int8(x, weight, residual=out, out=out)
    with pytest.raises(ValueError, match="takes a plain weight, got a gated one"):
        matmul_int8(x, gated)
    with pytest.raises(ValueError, match="takes a gated weight, got a plain one"):
        gated_int8(x, weight)
    with pytest.raises(ValueError, match=r"ids in \[0, 10\), got -1..3"):
        gather_rows_int8(weight, torch.tensor([3, -1]))
    with pytest.raises(ValueError, match="plain weight and ids .* got gated"):
        gather_rows_int8(gated, torch.tensor([3]))


def test_what_cannot_be_written_is_refused() -> None:
    weight = Int8Weight.empty(10, 8)
    with pytest.raises(ValueError, match=r"rows 8..11 do not fit a weight of 10 rows"):
        write_rows(weight, torch.randn(3, 8), start=8)
    with pytest.raises(ValueError, match=r"must be \[n, 8\], got \[3, 7\]"):
        write_rows(weight, torch.randn(3, 7), start=0)
    with pytest.raises(ValueError, match="floats without scale or int8 with one, got torch.int8"):
        write_rows(weight, torch.zeros(3, 8, dtype=torch.int8), start=0)
    with pytest.raises(ValueError, match=r"must be \[3\], got \[4\]"):
        codes = torch.zeros(3, 8, dtype=torch.int8)
        write_rows(weight, codes, start=0, scale=torch.ones(4))
    for bad in (float("nan"), float("inf")):
        rows = torch.randn(3, 8)
        rows[1, 2] = bad
        with pytest.raises(ValueError, match="must be finite, row 1 of these is not"):
            write_rows(weight, rows, start=0)
    for n, k, is_gated in ((0, 8, False), (8, 0, False), (3, 8, True), (1, MAX_K + 1, False)):
        with pytest.raises(ValueError, match="an int8 weight needs"):
            Int8Weight.empty(n, k, is_gated=is_gated)
    with pytest.raises(ValueError, match="this machine's paths are .*generic, got 'sse'"):
        Int8Weight.empty(8, 8, path="sse")  # type: ignore[arg-type]


def test_paths_are_ordered_and_end_with_one_for_any_machine() -> None:
    assert host_path() == supported_paths()[0]
    assert supported_paths()[-1] == "generic"
    assert list(supported_paths()) == [path for path in PATHS if path in supported_paths()]
