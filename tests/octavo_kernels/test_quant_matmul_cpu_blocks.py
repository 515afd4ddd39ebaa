"""Blocks on the CPU: files' blocks kept, every path the same bits, extremes, writing, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo_kernels import num_threads, set_num_threads
from octavo_kernels.quant_matmul.block_reference import matmul_blocks_reference, quantised_rows
from octavo_kernels.quant_matmul.blocks import (
    BlockRows,
    BlockWeight,
    Kind,
    dequantise,
    gated_blocks,
    gated_rows,
    gather_rows,
    matmul_blocks,
    quantise_rows,
    rms_norm_rows,
    warm,
    write_blocks,
    write_rows,
)
from octavo_kernels.quant_matmul.cpu_dot import CpuPath, host_path, supported_paths
from octavo_kernels.rms_norm import rms_norm
from octavo_kernels.silu_mul import gelu_tanh_mul, silu_mul
from octavo_kernels.testing import same_bits

KINDS: tuple[Kind, ...] = get_args(Kind)
FILED: tuple[Kind, ...] = ("q4_0", "q4_1", "q8_0")
# Bits of a code, the code of zero, elements of a block.
FORMS = {"q4_0": (4, 8, 32), "q4_1": (4, 0, 32), "q8_0": (8, 128, 32), "q8_64": (8, 128, 64)}
# The kinds without minima share a path's code but for avx2, which sums their codes in its own way.
WAYS = [
    (kind, path)
    for kind in KINDS
    for path in supported_paths()
    if kind != "q4_0" or path in ("avx2", host_path())
]


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = num_threads()
    yield
    if num_threads() != before:
        set_num_threads(before)


def _weight(kind: Kind, rows: Tensor) -> BlockWeight:
    weight = BlockWeight.empty(kind, *rows.shape)
    write_rows(weight, rows, start=0)
    return weight


def _random_codes(kind: Kind, n: int, k: int) -> BlockWeight:
    """A weight of any codes, the extreme ones too, which no quantiser makes."""
    weight = BlockWeight.empty(kind, n, k)
    bits, _, block = FORMS[kind]
    codes = 2 * block * bits
    weight.data[..., :codes].random_(0, 256)
    halves = weight.data[..., codes:]
    halves.copy_(torch.randn(*halves.shape[:2], halves.shape[2] // 2).half().view(torch.uint8))
    return weight


@pytest.mark.parametrize("kind", FILED)
def test_a_files_blocks_are_kept(kind: Kind) -> None:
    quants = pytest.importorskip("gguf.quants")
    number = getattr(pytest.importorskip("gguf").GGMLQuantizationType, kind.upper())
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((75, 96), dtype=np.float32)
    raw = quants.quantize(plain, number)
    weight = BlockWeight.empty(kind, 75, 96)
    for start, end in ((40, 75), (0, 5), (5, 40)):
        write_blocks(weight, torch.from_numpy(raw[start:end]), start=start)
    want = torch.from_numpy(quants.dequantize(raw, number))
    assert torch.equal(dequantise(weight), want)
    ids = torch.tensor([74, 0, 16, 15, 0])
    assert torch.equal(gather_rows(weight, ids), want[ids])


@pytest.mark.parametrize("kind", FILED)
def test_any_files_blocks_become_those_of_64(kind: Kind) -> None:
    quants = pytest.importorskip("gguf.quants")
    number = getattr(pytest.importorskip("gguf").GGMLQuantizationType, kind.upper())
    for k in (32, 96, 192):
        plain = np.random.default_rng(k).standard_normal((50, k), dtype=np.float32)
        raw = quants.quantize(plain, number)
        weight, wide = BlockWeight.empty("q8_64", 50, k), BlockWeight.empty("q8_64", 50, k)
        for start, end in ((40, 50), (0, 5), (5, 40)):
            write_blocks(weight, torch.from_numpy(raw[start:end]), start=start)
        write_rows(wide, torch.from_numpy(quants.dequantize(raw, number)), start=0)
        assert same_bits(weight.data, wide.data)


def test_blocks_of_64_are_rounded_as_defined() -> None:
    torch.manual_seed(11)
    scales = 10.0 ** torch.randint(-9, 8, (300, 1))  # below float16's normal numbers, and beyond
    rows = torch.randn(300, 3 * 64) * scales
    rows[7], rows[8, 70:80], rows[9, 3] = 0.0, -0.0, float("nan")
    parts = rows.view(300, 3, 64)
    scale = (parts.abs().amax(2, keepdim=True) / 127).half().float()
    codes = (parts * (1 / scale)).round().clamp(-128, 127).nan_to_num(0)
    want = torch.where(scale.isfinite(), codes * scale, torch.nan)
    got = dequantise(_weight("q8_64", rows)).view_as(want)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert want.isfinite().any() and want.isnan().any() and (want.abs() < 1e-6).any()


@pytest.mark.parametrize(("kind", "path"), WAYS)
def test_every_path_sums_a_chain_over_blocks(kind: Kind, path: CpuPath) -> None:
    torch.manual_seed(1)
    for n, k in ((1, 1), (33, 70), (50, 288)):
        weight = _random_codes(kind, n, k)
        for num_rows in (1, 2, 7, 33):
            x = torch.randn(num_rows, k)
            x[0] = torch.where(x[0] > 0, 3.0, -3.0)  # codes of -127 and 127 alone
            x[-1] = 3.0  # and so the largest sums
            got = matmul_blocks(x, weight, path=path)
            assert same_bits(got, _chain(x, weight)), (n, k, num_rows)


def _chain(x: Tensor, weight: BlockWeight) -> Tensor:
    """The definition, in longdouble where a product of two float32 is exact."""
    bits, zero, size = FORMS[weight.kind]
    rows = quantised_rows(x, block=size)
    codes, scale = (part.numpy().astype(np.longdouble) for part in rows)
    data = weight.data.numpy()
    panels, blocks, _ = data.shape
    num_codes = 2 * size * bits  # bytes of 16 outputs
    words = data[..., :num_codes].reshape(panels, blocks, -1, 16, 4)
    if bits == 4:
        words = np.concatenate((words & 15, words >> 4), axis=2)
    w = words.transpose(1, 0, 3, 2, 4).reshape(blocks, panels * 16, size)[:, : weight.n]
    halves = data[..., num_codes:].reshape(panels, blocks, -1, 32).transpose(1, 0, 3, 2)
    halves = np.ascontiguousarray(halves.reshape(blocks, panels, 16, 2, -1).swapaxes(3, 4))
    halves = halves.view(np.float16).reshape(blocks, panels * 16, -1)[:, : weight.n]
    sums = np.zeros((x.shape[0], weight.n), np.float32)
    for block in range(blocks):
        mine = codes[:, block]
        whole = mine @ (w[block].astype(np.longdouble) - zero).T
        step = scale[:, block].astype(np.float32) * halves[block, :, 0].astype(np.float32)
        sums = (whole * step + sums).astype(np.float32)
        if zero == 0:
            total = (mine.sum(1, keepdims=True) * scale[:, block]).astype(np.float32)
            least = halves[block, :, 1].astype(np.longdouble)
            sums = (least * total + sums).astype(np.float32)
    return torch.from_numpy(sums)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_on_neither_threads_nor_batch_mates(kind: Kind) -> None:
    torch.manual_seed(3)
    weight = _weight(kind, torch.randn(500, 600))
    x, residual = torch.randn(40, 600), torch.randn(40, 500)
    want = matmul_blocks(x, weight, residual=residual)
    for threads in (1, 2, 3):
        set_num_threads(threads)
        assert same_bits(matmul_blocks(x, weight, residual=residual), want), threads
        for size in (1, 2, 3, 4, 5, 8, 12, 13, 16, 17, 25):
            part = matmul_blocks(x[:size], weight, residual=residual[:size])
            assert same_bits(part, want[:size]), (threads, size)


def _records(rows: BlockRows) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [T, B, 32], scales and last words [T, B], from the layout that `cpu_records` tells."""
    num_rows, block = rows.num_rows, rows.block
    blocks, size = -(-rows.k // block), block + 8
    chunks = -(-num_rows // 12)
    edges = [chunk * num_rows // chunks for chunk in range(chunks + 1)]
    pieces = [
        rows.data[start * blocks * size : end * blocks * size].view(blocks, end - start, size)
        for start, end in zip(edges, edges[1:], strict=False)
    ]
    found = torch.cat(pieces, 1).transpose(0, 1).contiguous()
    words = found.view(torch.int32)
    codes, scale = found[..., :block].view(torch.int8), words[..., -2].view(torch.float32)
    return codes, scale, words[..., -1]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_quantised_as_defined(kind: Kind) -> None:
    torch.manual_seed(8)
    for num_rows, k in ((1, 5), (3, 70), (12, 576), (13, 576), (16, 576), (50, 131)):
        x = torch.randn(num_rows, k)
        codes, scale = quantised_rows(x, block=FORMS[kind][2])
        got, got_scale, last = _records(quantise_rows(x, kind=kind))
        assert torch.equal(got.double(), codes), (num_rows, k)
        assert torch.equal(got_scale, scale[..., 0].float())
        total = got.int().sum(2)
        if kind == "q4_1":
            assert same_bits(last.view(torch.float32), total.float() * got_scale)
        else:
            assert torch.equal(last, total * -FORMS[kind][1])


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_rows_give_the_bits_of_floats(kind: Kind) -> None:
    torch.manual_seed(9)
    for n, k in ((64, 90), (2048, 576)):
        weight, gain = _weight(kind, torch.randn(n, k) / 10), torch.randn(k)
        for num_rows in (0, 1, 5, 16, 17, 40):
            x = torch.randn(num_rows, k)
            normed = rms_norm(x, gain, eps=1e-5)
            rows = rms_norm_rows(x, gain, eps=1e-5, kind=kind)
            assert same_bits(rows.data, quantise_rows(normed, kind=kind).data)
            assert same_bits(matmul_blocks(rows, weight), matmul_blocks(normed, weight))
            gated = gated_blocks(rows, weight)
            assert same_bits(gated, gated_blocks(normed, weight))
            for after in KINDS:
                want = quantise_rows(gated, kind=after)
                for given in (rows, normed):
                    got = gated_rows(given, weight, kind=after)
                    assert same_bits(got.data, want.data) and got.k == n // 2


def test_gated_rows_of_any_width_and_gate() -> None:
    torch.manual_seed(10)
    # A panel of both, blocks that gate panels share (all or some kinds'), whole blocks
    for half in (7, 48, 96, 128):
        weight, x = _weight("q4_1", torch.randn(2 * half, 40)), torch.randn(20, 40)
        after: Kind
        for after in ("q8_0", "q8_64"):
            want = quantise_rows(gated_blocks(x, weight, is_gelu=True), kind=after)
            got = gated_rows(x, weight, kind=after, is_gelu=True)
            assert same_bits(got.data, want.data)


@pytest.mark.parametrize("half", [77, 80])
def test_gated_is_matmul_then_the_gate(half: int) -> None:
    torch.manual_seed(4)
    weight, x = _weight("q4_1", torch.randn(2 * half, 90) / 10), torch.randn(30, 90)
    for rows in (x, x[:1], x[:0]):
        both = matmul_blocks(rows, weight)
        assert same_bits(gated_blocks(rows, weight), silu_mul(both))
        assert same_bits(gated_blocks(rows, weight, is_gelu=True), gelu_tanh_mul(both))


def test_bias_and_residual_are_added_after_the_sum_in_this_order() -> None:
    torch.manual_seed(5)
    x, weight = torch.randn(9, 65), _weight("q4_1", torch.randn(50, 65))
    bias, residual = torch.randn(50), torch.randn(9, 50)
    want = matmul_blocks(x, weight) + bias + residual
    assert same_bits(matmul_blocks(x, weight, bias=bias, residual=residual), want)


@pytest.mark.parametrize(("kind", "path"), WAYS)
def test_extreme_rows_harm_no_other(kind: Kind, path: CpuPath) -> None:
    torch.manual_seed(6)
    for width in (1, 16, 64, 131):
        weight = _weight(kind, torch.randn(70, width))
        x = torch.randn(20, width)
        want = matmul_blocks(x, weight, path=path)
        last = width - 1
        x[0], x[1], x[2, last], x[3, 0], x[4, last] = 0.0, -0.0, 3e37, 1e-40, float("nan")
        x[5, 0], x[6, last], x[7] = float("inf"), float("-inf"), float("nan")
        x[8], x[9] = 1e-41, -3.4e38
        got = matmul_blocks(x, weight, path=path)
        assert same_bits(got[10:], want[10:])
        assert got[4:8].isnan().all()
        assert torch.equal(got[[0, 1, 8]], torch.zeros(3, 70))
        exact = matmul_blocks_reference(x, dequantise(weight), block=FORMS[kind][2])
        for row in (2, 3):
            close = {"rtol": 1e-5, "atol": float(x[row].abs().max()) * 1e-5}
            torch.testing.assert_close(got[row].double(), exact[row], **close)


@pytest.mark.parametrize("kind", KINDS)
def test_written_rows_are_the_nearest_codes(kind: Kind) -> None:
    torch.manual_seed(7)
    rows = torch.randn(40, 80)
    block = FORMS[kind][2]
    rows[3, :64], rows[4], rows[5, 40:50] = 0.0, 0.25, 1e-9
    weight = _weight(kind, rows.double())
    got = dequantise(weight)
    parts = torch.nn.functional.pad(rows, (0, -80 % block)).view(40, -1, block)
    # Half a step, and what rounding the scale and the minimum to float16 moves the last code by.
    span = parts.amax(2) - parts.amin(2) if kind == "q4_1" else 2 * parts.abs().amax(2)
    steps = {"q4_0": 16, "q4_1": 15}.get(kind, 254)
    bound = span / steps * (0.51 if kind == "q4_1" else 1.01) + parts.abs().amax(2) * 2e-3 + 1e-7
    if steps == 254:
        bound = span / steps * 0.51 + parts.abs().amax(2) * 6e-4 + 1e-7
    errors = torch.nn.functional.pad((got - rows).abs(), (0, -80 % block))
    assert (errors.view(40, -1, block).amax(2) <= bound).all()
    assert torch.equal(got[3, :64], torch.zeros(64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_float16_cannot_scale_is_nan_and_alone(kind: Kind) -> None:
    size = FORMS[kind][2]
    rows = torch.ones(20, 2 * size)
    rows[0, 3], rows[1, size + 8], rows[2, 0] = float("nan"), float("inf"), 3e38
    got = dequantise(_weight(kind, rows))
    nans = [got[0, :size], got[1, size:], got[2, :size]]
    assert all(part.isnan().all() for part in nans)
    assert got[0, size:].isfinite().all() and got[3:].isfinite().all()


def test_large_weights_start_as_zeros_too() -> None:
    weight = BlockWeight.empty("q8_0", 6000, 1000)  # 6 MB: on huge pages
    assert not weight.data.any() and weight.num_bytes == weight.data.numel() == 6000 * 32 * 34
    write_rows(weight, torch.ones(1, 1000), start=5999)
    got = matmul_blocks(torch.ones(1, 1000), weight)[0, 5998:]
    torch.testing.assert_close(got, torch.tensor([0.0, 1000.0]), rtol=1e-3, atol=0.0)


def test_a_server_of_blocks_can_be_warmed() -> None:
    warm("q4_1")


def test_refusals_name_what_was_got() -> None:
    weight = _weight("q4_1", torch.randn(10, 64))
    x = torch.randn(3, 64)
    with pytest.raises(ValueError, match=r"x contiguous float32 \['T', 64\], got .* \[3, 7\]"):
        matmul_blocks(torch.randn(3, 7), weight)
    with pytest.raises(ValueError, match="x contiguous float32 .* got torch.float64"):
        matmul_blocks(x.double(), weight)
    with pytest.raises(ValueError, match="bias contiguous"):
        matmul_blocks(x, weight, bias=torch.randn(9))
    with pytest.raises(ValueError, match="residual contiguous"):
        matmul_blocks(x, weight, residual=torch.randn(10, 3).T)
    with pytest.raises(ValueError, match="no kernel for device 'meta'"):
        matmul_blocks(x.to("meta"), weight)
    out = torch.empty(3, 10)
    with pytest.raises(ValueError, match="residual that is also its out"):
        matmul_blocks(x, weight, residual=out, out=out)
    with pytest.raises(ValueError, match="as many of each, got 9 rows"):
        gated_blocks(x, _weight("q4_1", torch.randn(9, 64)))
    with pytest.raises(ValueError, match="this machine's paths are .*generic, got 'avx9'"):
        matmul_blocks(x, weight, path="avx9")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"quantised for q4_1, got rows of 64 .* zero 8"):
        matmul_blocks(quantise_rows(x, kind="q4_0"), weight)
    with pytest.raises(ValueError, match="x contiguous float32 of 2 dimensions, got .*float64"):
        quantise_rows(x.double(), kind="q4_1")
    with pytest.raises(ValueError, match=r"weight \[64\], got \[63\]"):
        rms_norm_rows(x, torch.ones(63), eps=1e-5, kind="q4_1")
    with pytest.raises(ValueError, match="no kernel for device 'meta'"):
        rms_norm_rows(x.to("meta"), torch.ones(64), eps=1e-5, kind="q4_1")
    with pytest.raises(ValueError, match=r"ids in \[0, 10\), got -1..3"):
        gather_rows(weight, torch.tensor([3, -1]))
    with pytest.raises(ValueError, match=r"rows 8..11 do not fit a weight of 10 rows"):
        write_rows(weight, torch.randn(3, 64), start=8)
    with pytest.raises(ValueError, match=r"are \[n, 2 blocks of 20\] uint8, got .* \[3, 36\]"):
        write_blocks(weight, torch.zeros(3, 36, dtype=torch.uint8), start=0)
    with pytest.raises(ValueError, match=r"got rows of 64 for weights in blocks of 32"):
        matmul_blocks(quantise_rows(x, kind="q8_0"), _weight("q8_64", torch.randn(10, 64)))
    with pytest.raises(ValueError, match=r"2 blocks of 18 or 20 or 34\] uint8, got .* \[3, 66\]"):
        write_blocks(BlockWeight.empty("q8_64", 3, 64), torch.zeros(3, 66).byte(), start=0)
    with pytest.raises(ValueError, match=r"one of q4_0, q4_1, q8_0, q8_64, got 'q5_0'"):
        BlockWeight.empty("q5_0", 2, 2)  # type: ignore[arg-type]
