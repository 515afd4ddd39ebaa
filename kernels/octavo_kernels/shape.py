"""The sizes of a model that decide which GPU kernels a server needs; knows no op and no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
_CACHES = (*_ACTIVATIONS, torch.float8_e4m3fn)
_BLOCK_SIZES = (16, 32, 64, 128)
_GATES = ("silu_mul", "gelu_tanh_mul")
_NORMS = ("rms_norm", "layer_norm")
_FORMATS = ("", "fp8", "fp8_blocks", "int8", "int4_32", "int4_64", "int4_128")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Everything of a decoder that a compiled kernel depends on; the number of layers is not."""

    hidden: int
    num_heads: int  # query heads
    num_kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    activation_dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype = torch.bfloat16
    block_size: int = 16  # tokens of a cache block
    rotary_dim: int | None = None  # None: the whole head
    gate: str = "silu_mul"
    norm: str = "rms_norm"
    weight_format: str = ""  # of the layers' matmuls; "": the activations' dtype
    quantises_activations: bool = False  # for 8-bit weights
    has_zero_points: bool = False  # of 4-bit weights
    has_encoder: bool = False
    num_drafts: int = 0  # tokens a step may verify beside its own
    has_qk_norm: bool = False
    has_qkv_bias: bool = False
    has_output_bias: bool = False  # of attention
    has_mlp_bias: bool = False
    norm_offset: int = 0  # 1: the weight is stored less one
    sliding_window: int = 0  # 0: none; else layers with and without it are compiled
    soft_cap: float = 0.0
    has_sinks: bool = False

    def __post_init__(self) -> None:
        sizes = ("hidden", "num_heads", "num_kv_heads", "head_dim", "ffn", "vocab")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads ({self.num_kv_heads}), "
                f"got {self.num_heads}"
            )
        for name, allowed in (
            ("activation_dtype", _ACTIVATIONS),
            ("cache_dtype", _CACHES),
            ("block_size", _BLOCK_SIZES),
            ("gate", _GATES),
            ("norm", _NORMS),
            ("weight_format", _FORMATS),
            ("norm_offset", (0, 1)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if not 0 <= self.turned <= self.head_dim or self.turned % 2:
            raise ValueError(
                f"rotary_dim must be even and at most {self.head_dim}, got {self.rotary_dim}"
            )

    @property
    def turned(self) -> int:
        """Dimensions of a head that the rotary embedding turns."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
