"""Quantised matmuls: formats, conversions and the same bits under every tile and batch.

Runs in Triton's interpreter; on a GPU the sizes grow and the matrix unit's own order is tested.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo_kernels.launch import collecting
from octavo_kernels.quant_matmul import gpu, quant_matmul
from octavo_kernels.quant_matmul.reference import dequantise, quantise_reference
from octavo_kernels.quant_matmul.weight import (
    QuantActivations,
    QuantWeight,
    pack_codes,
    pack_fp8,
    pack_fp8_blocks,
    pack_int4,
    pack_int8,
)
from octavo_kernels.testing import gpu_device, same_bits

DEVICE = gpu_device()
PACKS: dict[str, Callable[[Tensor], QuantWeight]] = {
    "fp8": pack_fp8,
    "fp8_blocks": pack_fp8_blocks,
    "int8": pack_int8,
    "int4_32": partial(pack_int4, group=32),
    "int4_64_zero": partial(pack_int4, group=64, symmetric=False),
    "int4_128_zero": partial(pack_int4, group=128, symmetric=False, scale_dtype=torch.bfloat16),
}
EIGHT_BITS = ("fp8", "fp8_blocks", "int8")
MODES = [(name, False) for name in PACKS] + [(name, True) for name in EIGHT_BITS]
# BLOCK_N, BLOCK_M, UNROLL, X_FIRST, warps, stages; 64 rows of weight first and 4 warps are wgmma
TILES = [
    (16, 16, 1, 1, 2, 4),
    (32, 16, 2, 0, 2, 3),
    (32, 16, 1, 1, 4, 5),
    (64, 16, 1, 0, 4, 4),
    (64, 64, 2, 0, 4, 2),
    (128, 128, 1, 0, 8, 3),
]
if DEVICE == "cpu":
    TILES = TILES[1:5]  # the interpreter knows no warps and no stages


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def tile(n: int, m: int, unroll: int, x_first: int, warps: int, stages: int) -> dict[str, int]:
    return {
        "BLOCK_N": n,
        "BLOCK_M": m,
        "UNROLL": unroll,
        "X_FIRST": x_first,
        "num_warps": warps,
        "num_stages": stages,
    }


def tiles_for(name: str, quantised: bool) -> list[dict[str, int]]:
    least = 64 if quantised and name.startswith("fp8") else 16
    return [tile(*sizes) for sizes in TILES if sizes[0] >= least]


# -- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(5, 96), (130, 300), (1, 128)])
@pytest.mark.parametrize("name", PACKS)
def test_a_packed_weight_is_the_weight_within_half_a_step(name: str, n: int, k: int) -> None:
    weight = normal(n, k)
    got = dequantise(PACKS[name](weight)).float()
    error = (got - weight).abs()
    size = weight.abs().amax(1, keepdim=True)
    if name.startswith("fp8"):  # half of 2**-3 relative, or half of 2**-9 of the row's scale
        size = weight.abs().max() if "blocks" in name else size
        assert bool((error <= weight.abs() / 16 * 1.01 + size / 448 * 2**-10).all())
    else:
        steps = {"int8": 254.0, "int4_32": 14.0}.get(name, 15.0)
        # With zero points a range may be twice the largest value; and the scale is rounded.
        assert bool((error <= size / steps * (2.2 if "zero" in name else 1.02)).all())


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_every_8_bit_code_is_widened_exactly(kind: Any) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0 if kind == "fp8" else 127  # NaN is no weight
    typed = codes.view(torch.float8_e4m3fn if kind == "fp8" else torch.int8)
    weight = pack_codes(
        kind, typed.view(1, 256).repeat(16, 1).to(DEVICE), torch.ones(16, device=DEVICE)
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = gpu.quant_matmul(
            torch.eye(256, dtype=dtype, device=DEVICE), weight, out_dtype=torch.float32
        )
        assert torch.equal(got[:, 3].cpu(), typed.float()), dtype


@pytest.mark.parametrize("zero", [None, 0, 5, 16])
def test_every_4_bit_code_is_widened_exactly(zero: int | None) -> None:
    codes = torch.randint(
        0, 16, (16, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    scale = torch.full((16, 4), 0.375, dtype=torch.float16)
    zeros = None if zero is None else torch.full((16, 4), zero)
    if zeros is not None:
        zeros[:, 3] = 7
        scale[4] = 2.0
    weight = pack_codes(
        "int4",
        codes.to(DEVICE),
        scale.to(DEVICE),
        zero=None if zeros is None else zeros.to(DEVICE),
        group=32,
    )
    spread = 8 if zeros is None else zeros.repeat_interleave(32, 1)
    want = (codes.float() - spread) * scale.float().repeat_interleave(32, 1)
    assert torch.equal(dequantise(weight).float().cpu(), want)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = gpu.quant_matmul(
            torch.eye(128, dtype=dtype, device=DEVICE), weight, out_dtype=torch.float32
        )
        assert torch.equal(got.t().cpu(), want), dtype


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_quantised_activations_are_the_nearest_codes(kind: Any) -> None:
    x = normal(6, 300) * torch.logspace(-4, 3, 300, device=DEVICE)
    x[1] = 0.0
    x[2, :200] = torch.linspace(-448, 448, 200, device=DEVICE)  # a scale near one: many ties
    x[2, 200] = 448.0
    # Every code and the midpoints between neighbours, subnormal ones too, at scale one.
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x[3] = 0.0
    x[3, :127] = codes.to(DEVICE)
    x[3, 127:253] = -((codes[1:] + codes[:-1]) / 2).to(DEVICE)
    for grouped in (False, True) if kind == "fp8" else (False,):
        got = gpu.quantise(x, kind, grouped=grouped)
        want, scale = quantise_reference(x, kind, grouped=grouped)
        assert same_bits(got.scale, scale[:, :: 128 if grouped else 300].float().contiguous())
        weight = pack_codes(kind, want.t()[:, :6].contiguous().to(_type_of(kind)), want[0, :300])
        assert weight.n == 300
        back = _codes_of(got)
        assert torch.equal(back, want.float()), (kind, grouped)


def _type_of(kind: str) -> torch.dtype:
    return torch.float8_e4m3fn if kind == "fp8" else torch.int8


def _codes_of(x: QuantActivations) -> Tensor:
    """Values of the codes, [T, K] float32."""
    num_rows = x.data.shape[0]
    pairs = x.data.view(num_rows, -1, 64, 2)
    flat = torch.cat([pairs[..., 0], pairs[..., 1]], 2).reshape(num_rows, -1)[:, : x.k]
    return flat.contiguous().view(_type_of(x.kind)).float()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, interpreting
def test_a_row_of_nan_or_infinity_spoils_itself_alone() -> None:
    weight = pack_fp8(normal(32, 128))
    x = normal(4, 128).to(torch.bfloat16)
    clean = gpu.quant_matmul(x, weight, quantise_activations=True)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    got = gpu.quant_matmul(x, weight, quantise_activations=True)
    assert not bool(got[1:3].isfinite().any())
    assert same_bits(got[[0, 3]], clean[[0, 3]])


# -- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "quantised"), MODES)
def test_tiles_do_not_change_bits(name: str, quantised: bool) -> None:
    _check_tiles(name, quantised, num_rows=19, n=40, k=256, dtype=torch.bfloat16)


AT_SIZE = [(name, a8, 1024, 14336, torch.bfloat16) for name, a8 in MODES]
AT_SIZE += [(name, a8, 1536, 576, torch.float16) for name, a8 in MODES if "zero" not in name]


@pytest.fixture(scope="module")
def compiled() -> None:
    """Fills the disk cache by many processes: one by one, compiling takes minutes."""
    from octavo_kernels.compiling import compile_all, distinct  # not for the interpreter

    with collecting() as found:
        for name, a8, n, k, dtype in AT_SIZE:
            weight = PACKS[name](torch.empty(n, k, device="meta"))
            x = torch.empty(300, k, dtype=dtype, device="meta")
            for choice in tiles_for(name, a8):
                gpu.quant_matmul(
                    x, weight, quantise_activations=a8, out_dtype=torch.float32, choice=choice
                )
            for num_rows in (16, 64, 300):
                gpu.quant_matmul(x[:num_rows], weight, quantise_activations=a8)
    major, minor = torch.cuda.get_device_capability()
    assert compile_all(distinct(found), capability=10 * major + minor) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("name", "quantised", "n", "k", "dtype"), AT_SIZE)
def test_tiles_and_batches_do_not_change_bits_at_size(
    name: str, quantised: bool, n: int, k: int, dtype: torch.dtype
) -> None:
    """The decode tiles are mma, the others wgmma: the sum of 128 elements must be the same."""
    weight, x = _check_tiles(name, quantised, num_rows=300, n=n, k=k, dtype=dtype)
    whole = gpu.quant_matmul(x, weight, quantise_activations=quantised)
    for num_rows in (1, 2, 15, 16, 17, 64, 65, 128, 129, 299):
        part = gpu.quant_matmul(x[300 - num_rows :], weight, quantise_activations=quantised)
        assert same_bits(part, whole[300 - num_rows :]), num_rows


def _check_tiles(
    name: str, quantised: bool, *, num_rows: int, n: int, k: int, dtype: torch.dtype
) -> tuple[QuantWeight, Tensor]:
    weights, x = normal(n, k), normal(num_rows, k, seed=1).to(dtype)
    if DEVICE == "cpu":  # the interpreter's sums have no order: let them be exact
        weights, x = (weights * 3).round().clamp(-7, 7), x.round()
        weights[:, ::32] = 7
    weight = PACKS[name](weights)
    want = None
    for choice in tiles_for(name, quantised):
        got = gpu.quant_matmul(
            x, weight, quantise_activations=quantised, out_dtype=torch.float32, choice=choice
        )
        want = got if want is None else want
        assert same_bits(got, want), choice
    return weight, x


# -- the rest of the contract --------------------------------------------------------------------


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize("quantised", [False, True])
def test_half_precision_scales_are_widened(name: str, quantised: bool) -> None:
    packed, x = PACKS[name](normal(150, 256)), normal(3, 256).to(torch.bfloat16)
    half = packed.scale.half()
    got, want = (
        gpu.quant_matmul(
            x,
            dataclasses.replace(packed, scale=scale),
            quantise_activations=quantised,
            out_dtype=torch.float32,
        )
        for scale in (half, half.float())
    )
    assert same_bits(got, want)


def test_a_residual_may_be_the_output() -> None:
    weight = pack_int8(normal(40, 96))
    x, residual = normal(3, 96).half(), normal(3, 40).half()
    want = gpu.quant_matmul(x, weight, residual=residual)
    assert gpu.quant_matmul(x, weight, residual=residual, out=residual) is residual
    assert same_bits(residual, want)


def test_nothing_is_written_past_the_rows() -> None:
    weight = pack_int4(normal(40, 96), group=32)
    out = torch.full((5, 40), 7.0, device=DEVICE)
    gpu.quant_matmul(normal(3, 96), weight, out=out[:3])
    assert bool((out[3:] == 7.0).all())
    assert not bool((out[:3] == 7.0).any())


def test_once_quantised_activations_serve_several_weights() -> None:
    x = normal(3, 256).to(torch.bfloat16)
    for name in EIGHT_BITS:
        weight = PACKS[name](normal(48, 256))
        codes = gpu.quantise(x, weight.kind, grouped=weight.is_grouped)
        want = gpu.quant_matmul(x, weight, quantise_activations=True)
        assert same_bits(gpu.quant_matmul(codes, weight), want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: gpu.quant_matmul(normal(2, 64), w["fp8"]), r"x contiguous.*'T', 128"),
        (lambda w: gpu.quant_matmul(normal(2, 128).double(), w["fp8"]), "got torch.float64"),
        (lambda w: gpu.quant_matmul(normal(128, 2).t(), w["fp8"]), "with strides"),
        (
            lambda w: gpu.quant_matmul(normal(2, 128), w["int4_32"], quantise_activations=True),
            "int4 weights take float activations",
        ),
        (
            lambda w: gpu.quant_matmul(gpu.quantise(normal(2, 128), "int8"), w["fp8"]),
            "needs fp8 activations",
        ),
        (
            lambda w: gpu.quant_matmul(
                normal(2, 128), w["fp8"], bias=torch.zeros(3, device=DEVICE)
            ),
            "bias contiguous",
        ),
        (lambda w: gpu.quantise(normal(2, 128), "int8", grouped=True), "fp8"),
        (lambda w: pack_int4(normal(2, 128), group=16), "groups have"),
        (lambda w: pack_codes("fp8", normal(2, 128), normal(2)), "codes must be"),
        (lambda w: pack_fp8(normal(2, 3, 4)), "float matrix"),
    ],
)
def test_what_no_kernel_has_is_refused(call: Callable[[Any], Any], message: str) -> None:
    weights = {name: pack(normal(16, 128)) for name, pack in PACKS.items()}
    with pytest.raises(ValueError, match=message):
        call(weights)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's refusal")
def test_there_is_no_cpu_kernel() -> None:
    with pytest.raises(ValueError, match="it has cuda"):
        quant_matmul(normal(2, 128), pack_fp8(normal(16, 128)))
