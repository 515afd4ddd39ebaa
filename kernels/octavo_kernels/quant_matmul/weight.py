"""Quantised weights and activations, and how float weights become them; knows no kernel.

Codes are stored for the kernels' sake, not in matrix order. K is cut into groups of 128 (the last
one padded with codes of zero), and each group into planes of consecutive k: two planes of 64 for
8-bit codes, four of 32 for 4-bit ones. The 16-bit word j of a row of a group holds element j of
every plane, the first plane in its lowest bits. A word so loaded falls apart into operands of the
matrix unit with k in natural order, in registers, whatever the tile. Words of neighbouring rows of
one group are neighbours in memory: `data` is [G, N, 128] bytes (64 for 4 bits), G = ceil(K / 128).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "GROUP",
    "QuantActivations",
    "QuantWeight",
    "interleave",
    "pack_codes",
    "pack_fp8",
    "pack_fp8_blocks",
    "pack_int4",
    "pack_int8",
]

Kind = Literal["fp8", "int8", "int4"]
GROUP = 128  # elements of K that one pass of a kernel's loop takes; decides bits
E4M3_MAX = 448.0
INT4_GROUPS = (32, 64, 128)
_PLANES = {"fp8": 2, "int8": 2, "int4": 4}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantWeight:
    """A weight [N, K] as codes: w[n, k] = (code - zero) * scale.

    data: [G, N, 128 or 64] bytes, laid out as the module says: e4m3 codes, int8 codes in two's
    complement, or 4-bit codes 0..15. scale: [S, R] floats where row s serves `group` elements of K
    (S = 1 and group = K for a scale per channel) and column r serves `rows` rows of the weight.
    An int4 weight has zero 8, unless `paired` (float16 or bfloat16): then scale is int32, a zero
    point in 0..16 in its low half and the bits of a scale of that type in its high half.
    NaN is no e4m3 weight: kernels read 480 in its place.
    """

    kind: Kind
    data: Tensor
    scale: Tensor
    n: int
    k: int
    group: int
    rows: int = 1
    paired: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.kind not in _PLANES:
            raise ValueError(f"a quantised weight is {', '.join(_PLANES)}, got {self.kind!r}")
        width = 64 if self.kind == "int4" else GROUP
        num_groups = -(-self.k // GROUP)
        _require("data", self.data, (torch.uint8,), (num_groups, self.n, width))
        groups = (*INT4_GROUPS, self.k) if self.kind == "int4" else (GROUP, self.k)
        if self.group not in groups:
            raise ValueError(f"{self.kind} scales serve {groups} elements of K, got {self.group}")
        num_scales = -(-self.k // self.group)
        types = _FLOATS if self.paired is None else (torch.int32,)
        _require("scale", self.scale, types, (num_scales, -(-self.n // self.rows)))
        halves = (torch.float16, torch.bfloat16)
        if self.paired is not None and (self.kind != "int4" or self.paired not in halves):
            raise ValueError(
                f"zero points go with int4 codes and scales of {halves}, got {self.kind} and"
                f" {self.paired}"
            )

    @property
    def is_grouped(self) -> bool:
        """Whether the scale changes along K."""
        return self.scale.shape[0] > 1

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(part.numel() * part.element_size() for part in (self.data, self.scale))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantActivations:
    """Activations [T, K] as 8-bit codes: x[t, k] = code * scale.

    data: [T, G, 128] uint8 holding e4m3 or int8 codes, each group interleaved as 8-bit weights are.
    scale: [T, 1] float32, or [T, G] where every 128 elements have their own (fp8 only).
    """

    kind: Kind
    data: Tensor
    scale: Tensor
    k: int

    def __post_init__(self) -> None:
        if self.kind not in ("fp8", "int8"):
            raise ValueError(f"activations are fp8 or int8, got {self.kind!r}")
        num_rows, num_groups = self.data.shape[0], -(-self.k // GROUP)
        _require("data", self.data, (torch.uint8,), (num_rows, num_groups, GROUP))
        is_grouped = self.kind == "fp8" and self.scale.dim() == 2 and self.scale.shape[1] > 1
        _require("scale", self.scale, (torch.float32,), (num_rows, num_groups if is_grouped else 1))


def _require(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> None:
    if tensor.dtype not in dtypes or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {' or '.join(map(str, dtypes))} {list(shape)}, got"
            f" {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
        )


def interleave(codes: Tensor, kind: Kind) -> Tensor:
    """Codes [R, K] uint8 -> [R, G, 128 or 64] uint8: groups of K, planes side by side in words.

    K must be a multiple of 128.
    """
    planes = _PLANES[kind]
    split = codes.view(codes.shape[0], -1, planes, GROUP // planes).transpose(2, 3)
    if planes == 2:
        return split.reshape(codes.shape[0], -1, GROUP)
    low, high = split[..., 0::2], split[..., 1::2]
    return (low | high << 4).reshape(codes.shape[0], -1, GROUP // 2)


def pack_codes(
    kind: Kind,
    codes: Tensor,
    scale: Tensor,
    *,
    zero: Tensor | None = None,
    group: int | None = None,
    rows: int = 1,
) -> QuantWeight:
    """A weight from codes [N, K] (e4m3, int8, or uint8 0..15), as checkpoints hold them.

    scale: [ceil(N / rows), S] or [N], any float type (8-bit weights keep float32, 4-bit ones the
    type given, which must have 16 bits where zero points are); zero: [N, S] integers in 0..16;
    S = ceil(K / group), group = K where none is given.
    Raises ValueError for other shapes or types.
    """
    wanted = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
    if kind not in wanted or codes.dtype != wanted[kind] or codes.dim() != 2:
        raise ValueError(
            f"codes must be [N, K] of {wanted.get(kind, 'fp8, int8 or int4')} for {kind!r}, got"
            f" {codes.dtype} {list(codes.shape)}"
        )
    n, k = codes.shape
    fill = 8 if kind == "int4" else 0
    whole = codes.new_empty((n, -(-k // GROUP) * GROUP), dtype=torch.uint8).fill_(fill)
    whole[:, :k] = codes.view(torch.uint8)
    scale = scale[:, None] if scale.dim() == 1 else scale
    scale = (scale if kind == "int4" else scale.float()).t().contiguous()
    paired = None if zero is None else scale.dtype
    if zero is not None:
        if zero.shape != (n, scale.shape[0]) or scale.element_size() != 2:
            raise ValueError(
                f"zero points [N, S] go with scales of 16 bits of that shape, got"
                f" {list(zero.shape)} and {scale.dtype} {list(scale.t().shape)}"
            )
        scale = zero.to(torch.int32).t() | scale.view(torch.int16).to(torch.int32) << 16
        scale = scale.contiguous()
    return QuantWeight(
        kind=kind,
        data=interleave(whole, kind).transpose(0, 1).contiguous(),
        scale=scale,
        n=n,
        k=k,
        group=k if group is None else group,
        rows=rows,
        paired=paired,
    )


def pack_fp8(weight: Tensor) -> QuantWeight:
    """Float weights [N, K] -> e4m3 with one scale per output channel."""
    wide = _matrix(weight)
    scale = _positive(wide.abs().amax(1) / E4M3_MAX)
    codes = (wide / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return pack_codes("fp8", codes, scale)


def pack_fp8_blocks(weight: Tensor) -> QuantWeight:
    """Float weights [N, K] -> e4m3 with one scale per block of 128 x 128."""
    wide = _matrix(weight)
    n, k = wide.shape
    whole = torch.nn.functional.pad(wide, (0, -k % GROUP, 0, -n % GROUP))
    blocks = whole.view(whole.shape[0] // GROUP, GROUP, whole.shape[1] // GROUP, GROUP)
    scale = _positive(blocks.abs().amax((1, 3)) / E4M3_MAX)
    spread = scale.repeat_interleave(GROUP, 0)[:n].repeat_interleave(GROUP, 1)[:, :k]
    codes = (wide / spread).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return pack_codes("fp8", codes, scale, group=GROUP, rows=GROUP)


def pack_int8(weight: Tensor) -> QuantWeight:
    """Float weights [N, K] -> int8 in -127..127 with one scale per output channel."""
    wide = _matrix(weight)
    scale = _positive(wide.abs().amax(1) / 127)
    return pack_codes("int8", (wide / scale[:, None]).round().to(torch.int8), scale)


def pack_int4(
    weight: Tensor,
    *,
    group: int,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantWeight:
    """Float weights [N, K] -> 4-bit codes with a scale (and a zero point) per group of K.

    Symmetric codes are -7..7 around 8. Raises ValueError for a group other than 32, 64, 128.
    """
    if group not in INT4_GROUPS:
        raise ValueError(f"int4 groups have {INT4_GROUPS} elements, got {group}")
    wide = _matrix(weight)
    n, k = wide.shape
    parts = torch.nn.functional.pad(wide, (0, -k % group)).view(n, -1, group)
    low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    if symmetric:
        scale = _positive(torch.maximum(-low, high) / 7).to(scale_dtype)
        zero = torch.full_like(low, 8)
    else:
        scale = _positive((high - low) / 15).to(scale_dtype)
        zero = (-low / scale.float()).round().clamp(0, 15)
    codes = ((parts / scale.float()[:, :, None]).round() + zero[:, :, None]).clamp(0, 15)
    return pack_codes(
        "int4",
        codes.to(torch.uint8).view(n, -1)[:, :k],
        scale,
        zero=None if symmetric else zero,
        group=group,
    )


def _matrix(weight: Tensor) -> Tensor:
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(
            f"a weight is a float matrix [N, K], got {weight.dtype} {list(weight.shape)}"
        )
    return weight.float()


def _positive(scale: Tensor) -> Tensor:
    """1 where everything scaled is zero."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
