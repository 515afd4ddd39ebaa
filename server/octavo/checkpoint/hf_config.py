"""Reads a model's shape from config.json. Knows plain dicts; knows nothing of files or tensors.

Plain JSON on purpose: importing transformers to read a dozen numbers costs seconds at start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What a class name in ``architectures`` implies beyond the numbers of its config."""

    model_type: str
    qkv_bias: bool | None = False  # None: the config's ``attention_bias`` decides
    output_bias: bool | None = False  # of o_proj; None: ``attention_bias`` decides
    mlp_bias: bool | None = False  # None: the config's ``mlp_bias`` decides
    qk_norm: bool = False
    head_dim: int | None = None  # when the config gives none; None: hidden_size / heads
    window: str = "none"  # "none", "always" or "switched" (by ``use_sliding_window``)
    defaults: tuple[tuple[str, Any], ...] = ()  # of fields that a config may leave out


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        model_type="llama", qkv_bias=None, output_bias=None, mlp_bias=None
    ),
    "MistralForCausalLM": Architecture(
        model_type="mistral",
        window="always",
        defaults=(
            ("num_key_value_heads", 8),
            ("sliding_window", 4096),
            ("max_position_embeddings", 131072),
        ),
    ),
    "Qwen2ForCausalLM": Architecture(
        model_type="qwen2",
        qkv_bias=True,
        window="switched",
        defaults=(("max_position_embeddings", 32768),),
    ),
    "Qwen3ForCausalLM": Architecture(
        model_type="qwen3",
        qkv_bias=None,
        output_bias=None,
        qk_norm=True,
        head_dim=128,
        window="switched",
        defaults=(("max_position_embeddings", 32768),),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding: which frequencies, and how they are stretched to longer contexts."""

    theta: float
    rotary_dim: int  # leading dims of a head that rotate
    kind: str = "default"  # one of ROPE_KINDS
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # context the model was first trained for
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn; multiplies cos and sin
    truncate: bool = True  # yarn: round the ramp's ends to whole dims


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything about a model that its code needs to know, from config.json or GGUF metadata."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeSpec
    max_position_embeddings: int
    layer_windows: tuple[int, ...]  # per layer: position p sees (p - window, p]; 0 = everything
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    torch_dtype: str | None = None

    @property
    def sliding_window(self) -> int:
        """Largest window of any layer; 0 when some layer sees everything."""
        return max(self.layer_windows) if all(self.layer_windows) else 0

    @property
    def max_model_len(self) -> int:
        """Context in tokens when the user asks for none.

        ``max_position_embeddings``, times the factor for linear scaling and up to ``factor`` times
        the original context for yarn. Dynamic scaling keeps the original context: asking for more
        stretches the frequencies for short requests too, so it must be asked for.
        """
        rope = self.rope
        if rope.kind == "linear":
            return int(self.max_position_embeddings * rope.factor)
        if rope.kind == "yarn":
            stretched = int(rope.original_max_position_embeddings * rope.factor)
            return max(self.max_position_embeddings, stretched)
        return self.max_position_embeddings


def parse_config(
    config: Mapping[str, Any], *, generation_config: Mapping[str, Any] | None = None
) -> ModelSpec:
    """`ModelSpec` of a config.json dict.

    ``generation_config`` (generation_config.json) overrides the end-of-sequence and
    beginning-of-sequence ids, as in transformers. Raises `ValueError` naming the field at fault,
    and for an unknown architecture the list of known ones.
    """
    name, arch = _architecture(config)
    config = {**dict(arch.defaults), **config}
    _refuse_unsupported(config)
    hidden_size = _int(config, "hidden_size")
    num_heads = _int(config, "num_attention_heads")
    num_kv_heads = _int(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads must be a multiple of num_key_value_heads, "
            f"got {num_heads} and {num_kv_heads}"
        )
    head_dim = _int(config, "head_dim", arch.head_dim or hidden_size // num_heads)
    attention_bias = bool(config.get("attention_bias", False))
    ids = {**config, **{k: v for k, v in (generation_config or {}).items() if v is not None}}
    return ModelSpec(
        architecture=name,
        vocab_size=_int(config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=_int(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=_int(config, "intermediate_size"),
        rms_norm_eps=_float(config, "rms_norm_eps", 1e-6),
        rope=_rope(config, head_dim=head_dim),
        max_position_embeddings=_int(config, "max_position_embeddings", 2048),
        layer_windows=_layer_windows(config, arch),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if arch.qkv_bias is None else arch.qkv_bias,
        output_bias=attention_bias if arch.output_bias is None else arch.output_bias,
        mlp_bias=bool(config.get("mlp_bias", False)) if arch.mlp_bias is None else arch.mlp_bias,
        qk_norm=arch.qk_norm,
        eos_token_ids=_token_ids(ids, "eos_token_id"),
        bos_token_id=next(iter(_token_ids(ids, "bos_token_id")), None),
        torch_dtype=config.get("dtype") or config.get("torch_dtype"),
    )


def _architecture(config: Mapping[str, Any]) -> tuple[str, Architecture]:
    named = config.get("architectures") or []
    for name in named:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    if not named:
        for name, arch in ARCHITECTURES.items():
            if config.get("model_type") == arch.model_type:
                return name, arch
    got = ", ".join(map(str, named)) or f"model_type {config.get('model_type')!r}"
    raise ValueError(f"unknown architecture: {got}; known are {', '.join(ARCHITECTURES)}")


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"config.json: hidden_act must be silu, got {activation!r}")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        raise ValueError(
            f"config.json: quantization_config ({method}) is not supported; "
            "use the unquantised model or a GGUF file"
        )


def _number(config: Mapping[str, Any], key: str, default: float | None) -> float:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"config.json has no {key}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"config.json: {key} must be a number, got {value!r}")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"config.json: {key} must be positive, got {value}")
    return value


def _int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _number(config, key, default)
    if value != int(value):
        raise ValueError(f"config.json: {key} must be a whole number, got {value}")
    return int(value)


def _float(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    return float(_number(config, key, default))


def _token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = config.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(f"config.json: {key} must be a token id or a list of them, got {value!r}")
    return tuple(ids)


def _layer_windows(config: Mapping[str, Any], arch: Architecture) -> tuple[int, ...]:
    num_layers = _int(config, "num_hidden_layers")
    window = config.get("sliding_window") or 0
    if arch.window == "none" or (
        arch.window == "switched" and not config.get("use_sliding_window")
    ):
        window = 0
    if not isinstance(window, int) or window < 0:
        raise ValueError(f"config.json: sliding_window must be a whole number, got {window!r}")
    if not window or arch.window == "always":
        return (window,) * num_layers
    layer_types = config.get("layer_types")
    if layer_types is None:
        first = config.get("max_window_layers", 28)
        return tuple(window if i >= first else 0 for i in range(num_layers))
    allowed = {"full_attention": 0, "sliding_attention": window}
    if len(layer_types) != num_layers or not all(kind in allowed for kind in layer_types):
        raise ValueError(
            f"config.json: layer_types must be {num_layers} of {' or '.join(allowed)}, "
            f"got {layer_types!r}"
        )
    return tuple(allowed[kind] for kind in layer_types)


def _rope(config: Mapping[str, Any], *, head_dim: int) -> RopeSpec:
    """Both spellings: ``rope_theta`` + ``rope_scaling``, and transformers 5's one dict."""
    scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if any(isinstance(v, Mapping) for v in scaling.values()):
        raise ValueError("config.json: rope_parameters per layer type are not supported")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ValueError(
            f"config.json: rope type must be one of {', '.join(ROPE_KINDS)}, got {kind!r}"
        )
    max_positions = _int(config, "max_position_embeddings", 2048)
    partial = _float(scaling, "partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    theta = _float(scaling, "rope_theta", config.get("rope_theta") or 10000.0)
    rotary_dim = int(head_dim * partial)
    if kind == "default":
        return RopeSpec(theta=theta, rotary_dim=rotary_dim)
    original = config.get("original_max_position_embeddings") or _int(
        scaling, "original_max_position_embeddings", max_positions
    )
    if kind == "dynamic":
        original = max_positions
    yarn_factor = max_positions / original if kind == "yarn" else None
    factor = _float(scaling, "factor", yarn_factor)
    return RopeSpec(
        theta=theta,
        rotary_dim=rotary_dim,
        kind=kind,
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=_float(scaling, "low_freq_factor", 1.0),
        high_freq_factor=_float(scaling, "high_freq_factor", 4.0),
        beta_fast=_float(scaling, "beta_fast", 32.0),
        beta_slow=_float(scaling, "beta_slow", 1.0),
        attention_factor=_attention_factor(scaling, factor=factor) if kind == "yarn" else 1.0,
        truncate=bool(scaling.get("truncate", True)),
    )


def _attention_factor(scaling: Mapping[str, Any], *, factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return _float(scaling, "attention_factor")

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return scale(mscale) / scale(mscale_all) if mscale and mscale_all else scale(1.0)
