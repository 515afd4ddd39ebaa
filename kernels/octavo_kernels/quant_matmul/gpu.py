"""Matmuls over quantised weights on a GPU: checks, tiles, launches; knows no checkpoint.

A row's bits depend on that row and the weight alone: K is walked in ascending order, 128 elements
(or the scale's group, if smaller) in the matrix unit from zero and then into one float32 sum.
Nothing here can change that: tiles, warps, stages and UNROLL only change speed. e4m3 times e4m3
always goes through wgmma (mma would widen to fp16 and keep other bits), so its tiles have 64 rows
of the weight or more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from octavo_kernels.device import capability
from octavo_kernels.launch import launch
from octavo_kernels.quant_matmul.quantise_kernel import quantise_rows
from octavo_kernels.quant_matmul.w4a16_kernel import w4a16
from octavo_kernels.quant_matmul.w8a8_kernel import w8a8
from octavo_kernels.quant_matmul.w8a16_kernel import w8a16
from octavo_kernels.quant_matmul.weight import GROUP, Kind, QuantActivations, QuantWeight
from octavo_kernels.tuning import Choice, choose

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_MATRIX_TYPE = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_TRITON_TYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_MANY_ROWS = 16384
BUCKETS = (16, 64, 128)  # rows; the last one serves all above


def default_choice(weight: QuantWeight, bucket: int, *, quantised: bool, wide: bool) -> Choice:
    """Tile and launch for a bucket of rows, where nothing was measured.

    wide says that activations have four bytes: their tiles must fit registers and shared memory.
    """
    if wide:
        return _tile(block_n=32, block_m=16, warps=4, stages=2)
    if bucket == 16:
        if quantised and weight.kind == "fp8":
            return _tile(block_n=64, block_m=16, warps=4, stages=5)
        # A warp reads all of x: where there are enough rows of weight, it takes 16 instead of 8.
        size = 64 if weight.n >= _MANY_ROWS else 32
        return _tile(block_n=size, block_m=16, warps=4, stages=5, x_first=1)
    if bucket == 64:
        return _tile(block_n=64, block_m=64, warps=4, stages=4)
    # Scales that change often take registers for a product of their own in every pass.
    if weight.is_grouped and (quantised or weight.group == 32):
        return _tile(block_n=128, block_m=64, warps=8, stages=4)
    return _tile(block_n=128, block_m=128, warps=8, stages=3)


def _tile(
    *, block_n: int, block_m: int, warps: int, stages: int, unroll: int = 1, x_first: int = 0
) -> Choice:
    return {
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "UNROLL": unroll,
        "X_FIRST": x_first,
        "num_warps": warps,
        "num_stages": stages,
    }


def bucket_of(num_rows: int) -> int:
    """The bucket whose kernels serve so many rows."""
    return next((b for b in BUCKETS if num_rows <= b), BUCKETS[-1])


def key_of(weight: QuantWeight, bucket: int, *, quantised: bool) -> str:
    """The tuned table's key: what decides a choice."""
    group = f":g{weight.group}" if weight.is_grouped else ""
    group += ":zero" if weight.paired is not None else ""
    activations = "a8" if quantised else "a16"
    return f"{weight.kind}{group}:{activations}:{weight.n}x{weight.k}:{bucket}"


def _refusal(name: str, tensor: Tensor, dtypes: object, shape: Sequence[int | str]) -> ValueError:
    return ValueError(
        f"quant_matmul needs {name} contiguous {dtypes} {list(shape)}, got {tensor.dtype}"
        f" {list(tensor.shape)} with strides {tensor.stride()} on {tensor.device.type}"
    )


def _check(name: str, tensor: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
    right = tensor.dtype in _FLOATS and tensor.shape == shape and tensor.is_contiguous()
    if not right or tensor.device != like.device:
        raise _refusal(name, tensor, f"float on {like.device}", shape)


def quantise(x: Tensor, kind: Kind, *, grouped: bool = False) -> QuantActivations:
    """x [T, K] (bf16, fp16, fp32) -> e4m3 or int8 codes with float32 scales, nearest, ties to even.

    One scale a row (largest magnitude / 448 or 127; 1 for a row of zeros), or with grouped one for
    every 128 elements. A row with NaN gets the scale NaN, one with infinity the scale infinity.
    """
    if kind not in _MATRIX_TYPE or (grouped and kind != "fp8"):
        raise ValueError(
            f"activations become fp8 (grouped or not) or int8, got {kind!r}, {grouped}"
        )
    if x.dim() != 2 or x.dtype not in _FLOATS or not x.is_contiguous() or not x.shape[-1]:
        raise _refusal("x", x, _FLOATS, ["T", "K > 0"])
    num_rows, k = x.shape
    num_groups = -(-k // GROUP)
    data = torch.empty((num_rows, num_groups, GROUP), dtype=torch.uint8, device=x.device)
    scale = torch.empty((num_rows, num_groups if grouped else 1), device=x.device)
    padded = triton.next_power_of_2(num_groups)
    launch(
        quantise_rows,
        (num_rows,),
        x,
        data.view(torch.int16),
        scale,
        K=k,
        KIND=kind,
        GROUPED=grouped,
        PADDED_G=padded,
        num_warps=max(1, min(16, padded // 8)),
    )
    return QuantActivations(kind=kind, data=data, scale=scale, k=k)


def quant_matmul(
    x: Tensor | QuantActivations,
    weight: QuantWeight,
    *,
    quantise_activations: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    choice: Mapping[str, int] | None = None,
) -> Tensor:
    """x [T, K] @ W[N, K]^T (+ bias [N]) (+ residual [T, N]) -> [T, N].

    x is bf16, fp16 or fp32, and weights are widened to its type (exactly, before their scale), or
    it is what `quantise` made (quantise_activations: makes it here), and the product is one of
    8-bit codes: fp8 or int8 weights only. Sums are float32 (int32 for int8 times int8). The result
    has out's type, else out_dtype, else x's (bf16 for codes). residual may be out. choice overrides
    the tuned tile. Raises ValueError for other types, shapes, strides or devices.
    """
    if quantise_activations and isinstance(x, Tensor):
        out_dtype = out_dtype or x.dtype
        if weight.kind == "int4":
            raise ValueError("int4 weights take float activations, not quantised ones")
        x = quantise(x, weight.kind, grouped=weight.is_grouped)
    quantised = isinstance(x, QuantActivations)
    data = x.data if isinstance(x, QuantActivations) else x
    _check_input(x, weight)
    num_rows = data.shape[0]
    shape = (num_rows, weight.n)
    if out is None:
        dtype = out_dtype or (torch.bfloat16 if quantised else data.dtype)
        out = torch.empty(shape, dtype=dtype, device=data.device)
    _check("out", out, data, shape)
    if bias is not None:
        _check("bias", bias, data, (weight.n,))
    if residual is not None:
        _check("residual", residual, data, shape)
    bucket = bucket_of(num_rows)
    if choice is None:
        wide = data.dtype == torch.float32
        choice = default = default_choice(weight, bucket, quantised=quantised, wide=wide)
        if not wide:
            choice = choose("quant_matmul", key_of(weight, bucket, quantised=quantised), default)
    _launch(x, weight, (bias, residual, out), dict(choice))
    return out


def _check_input(x: Tensor | QuantActivations, weight: QuantWeight) -> None:
    n, k = weight.n, weight.k
    if isinstance(x, QuantActivations):
        grouped = x.scale.shape[1] > 1
        if x.kind != weight.kind or x.k != k or grouped != weight.is_grouped:
            raise ValueError(
                f"quant_matmul needs {weight.kind} activations of K = {k}, "
                f"{'grouped' if weight.is_grouped else 'one scale a row'}, got {x.kind} of {x.k}"
                f" with scales {list(x.scale.shape)}"
            )
        data = x.data
    else:
        data = x
        if x.dim() != 2 or x.shape[1] != k or x.dtype not in _FLOATS or not x.is_contiguous():
            raise _refusal("x", x, _FLOATS, ["T", k])
    if data.device != weight.data.device:
        raise ValueError(f"x is on {data.device}, the weight [{n}, {k}] on {weight.data.device}")


def _launch(
    x: Tensor | QuantActivations,
    weight: QuantWeight,
    tail: tuple[Tensor | None, Tensor | None, Tensor],
    options: dict[str, int],
) -> None:
    num_rows = tail[2].shape[0]
    num_groups = weight.data.shape[0]
    wgmma = options["BLOCK_N"] >= 64 and options["num_warps"] >= 4 and not options["X_FIRST"]
    if isinstance(x, QuantActivations) and weight.kind == "fp8":
        if capability() < (8, 9):
            raise ValueError("this GPU multiplies no fp8: give float activations")
        if not wgmma:
            raise ValueError(f"fp8 activations need 64 rows of weight first, got {options}")
    if num_groups % options["UNROLL"]:
        options["UNROLL"] = 1
    tiles = triton.cdiv(num_rows, options["BLOCK_M"]) * triton.cdiv(weight.n, options["BLOCK_N"])
    common = {"N": weight.n, "GROUP_M": 8, **options}
    rows = {"ROWS": weight.rows, "GROUPED": weight.is_grouped}
    if isinstance(x, QuantActivations):
        kind = _MATRIX_TYPE[weight.kind]
        launch(
            w8a8,
            (tiles,),
            x.data.view(kind),
            x.scale,
            weight.data.view(kind),
            weight.scale,
            *tail,
            num_rows,
            NUM_G=num_groups,
            KIND=weight.kind,
            **rows,
            **common,
        )
        return
    words = weight.data.view(torch.int16)
    # PTX works on pairs of 16 bits; the interpreter has no PTX.
    fast = x.dtype != torch.float32 and not isinstance(w8a16, InterpretedFunction)
    common |= {"K": weight.k, "FAST": fast}
    if weight.kind == "int4":
        per = GROUP // weight.group if weight.is_grouped else 1
        num_scales = weight.scale.shape[0]
        args = (x, words, weight.scale, *tail, num_rows)
        paired = None if weight.paired is None else _TRITON_TYPE[weight.paired]
        launch(w4a16, (tiles,), *args, S=num_scales, PER=per, PAIRED=paired, **common)
    else:
        args = (x, words, weight.scale, *tail, num_rows)
        launch(w8a16, (tiles,), *args, KIND=weight.kind, **rows, **common)
