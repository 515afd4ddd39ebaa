"""GGUF models against transformers' on the dequantised weights, in every type we read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from octavo.checkpoint import resolve
from octavo.config import ModelConfig
from octavo.models import Model, load_model, loader, weights
from octavo.models.decoder import Decoder
from octavo.platforms.cpu import CPUBlockWeight, CPUPlatform
from octavo.platforms.quantization import choose
from octavo_kernels.quant_matmul.block_packed import BlockWeight, dequantise

SHAPE: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
}
ARCHITECTURES = {
    "llama": (LlamaConfig, gguf.MODEL_ARCH.LLAMA),
    "qwen2": (Qwen2Config, gguf.MODEL_ARCH.QWEN2),
    "qwen3": (Qwen3Config, gguf.MODEL_ARCH.QWEN3),
}
# Where the 16-bit scales of a block lie, in the types that the gguf package cannot write.
K_SCALES = {Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,)}
PROMPT = [3, 200, 17, 44, 271, 0, 91, 130, 8, 8, 65]


def stored(values: np.ndarray, kind: Q, rng: np.random.Generator) -> np.ndarray:
    """Bytes of a tensor in a file: ``values`` quantised, or for K types random valid blocks."""
    if kind not in K_SCALES:
        return gguf.quants.quantize(values, kind)
    block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (values.size // block, num_bytes), dtype=np.uint8)
    for at in K_SCALES[kind]:
        scale = rng.uniform(1e-4, 4e-4, len(raw)).astype(np.float16)
        raw[:, at : at + 2] = scale[:, None].view(np.uint8)
    return raw.reshape(values.shape[0], -1)


def pair_order(num_rows: int, num_heads: int) -> np.ndarray:
    """Which row of the original comes where in llama.cpp's q and k: halves become neighbours."""
    size = num_rows // num_heads // 2
    rows = np.arange(num_rows).reshape(num_heads, 2, size)
    return np.stack([rows[:, 0], rows[:, 1]], axis=-1).ravel()


def export(
    model: Any,
    path: Path,
    *,
    arch: str,
    kind: Q,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    kinds: Mapping[str, Q] | None = None,
) -> None:
    """Writes ``model`` as GGUF and sets its weights to what the file then holds.

    ``kinds``: of tensors whose names hold a word, where that is not ``kind``."""
    config, rng = model.config, np.random.default_rng(1)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(SHAPE["head_dim"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, value in (extra or {}).items():
        writer.add_key_value(f"{arch}.{key}", *value)
    names = sorted(ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(names + [f"x{i}" for i in range(config.vocab_size - len(names))])
    writer.add_token_merges(["a b"])
    mapping = gguf.get_tensor_name_map(ARCHITECTURES[arch][1], config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        file_name = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        assert file_name is not None, name
        values = parameter.numpy().copy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        order = np.arange(len(values))
        if arch == "llama":
            for part, count in heads.items():
                order = pair_order(len(values), count) if part in name else order
        if values.ndim == 1:
            writer.add_tensor(file_name, values[order])
            continue
        its_kind = next((k for word, k in (kinds or {}).items() if word in name), kind)
        raw = stored(values[order], its_kind, rng)
        if raw.dtype == np.uint8:
            writer.add_tensor(file_name, raw, raw_dtype=its_kind)
        else:
            writer.add_tensor(file_name, raw)
        held = np.empty_like(values)
        held[order] = gguf.quants.dequantize(raw, its_kind)
        parameter.copy_(torch.from_numpy(held))
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_same_logits(theirs: Any, ours: torch.Tensor) -> None:
    with torch.no_grad():
        expected = theirs(torch.tensor([PROMPT])).logits[0]
    error = (ours - expected).abs().max() / (expected.max() - expected.min())
    assert error <= 1e-5, f"off by {error:.2e} of the logits' range"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q4_K, Q.Q5_K, Q.Q6_K]
)
def test_every_type(
    kind: Q,
    tmp_path: Path,
    reference: Callable[..., Any],
    load: Callable[..., Model],
    chunked: Callable[..., list[torch.Tensor]],
) -> None:
    theirs = reference(LlamaConfig(**SHAPE))
    export(theirs, tmp_path / "m.gguf", arch="llama", kind=kind)
    (logits,) = chunked(load(tmp_path / "m.gguf"), [PROMPT], chunks=(4,), dtype=torch.float32)
    assert_same_logits(theirs, logits)


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
    ],
)
def test_every_architecture(
    arch: str,
    changes: dict[str, Any],
    tmp_path: Path,
    reference: Callable[..., Any],
    load: Callable[..., Model],
    chunked: Callable[..., list[torch.Tensor]],
) -> None:
    theirs = reference(ARCHITECTURES[arch][0](**{**SHAPE, **changes}))
    export(theirs, tmp_path / "m.gguf", arch=arch, kind=Q.Q8_0)
    (logits,) = chunked(load(tmp_path / "m.gguf"), [PROMPT], chunks=(4,), dtype=torch.float32)
    assert_same_logits(theirs, logits)


@pytest.mark.parametrize(("kind", "magnitude"), [("linear", 1.0), ("yarn", 1.0), ("yarn", 0.8)])
def test_rope_scaling_from_metadata(
    kind: str,
    magnitude: float,
    tmp_path: Path,
    reference: Callable[..., Any],
    load: Callable[..., Model],
    chunked: Callable[..., list[torch.Tensor]],
) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    keys: dict[str, Any] = {
        "rope.scaling.type": (kind, gguf.GGUFValueType.STRING),
        "rope.scaling.factor": (2.0, gguf.GGUFValueType.FLOAT32),
    }
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 48
        if magnitude != 1.0:
            rope["attention_factor"] = magnitude * (0.1 * math.log(2.0) + 1.0)
            keys["rope.scaling.attn_factor"] = (magnitude, gguf.GGUFValueType.FLOAT32)
        keys["rope.scaling.original_context_length"] = (48, gguf.GGUFValueType.UINT32)
    theirs = reference(LlamaConfig(**SHAPE, rope_parameters=rope))
    export(theirs, tmp_path / "m.gguf", arch="llama", kind=Q.F32, extra=keys)
    (logits,) = chunked(load(tmp_path / "m.gguf"), [PROMPT], chunks=(4,), dtype=torch.float32)
    assert_same_logits(theirs, logits)


def test_llama3_scaling_comes_as_a_tensor(
    tmp_path: Path,
    reference: Callable[..., Any],
    load: Callable[..., Model],
    chunked: Callable[..., list[torch.Tensor]],
) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    }
    config = LlamaConfig(**SHAPE, rope_parameters=rope)
    theirs = reference(config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500.0 ** (torch.arange(0, 32, 2) / 32)
    factors = {"rope_freqs.weight": (plain / scaled).numpy()}
    export(theirs, tmp_path / "m.gguf", arch="llama", kind=Q.F32, tensors=factors)
    (logits,) = chunked(load(tmp_path / "m.gguf"), [PROMPT], chunks=(4,), dtype=torch.float32)
    assert_same_logits(theirs, logits)


def blocks_of(path: Path, mode: str) -> tuple[dict[str, BlockWeight], CPUPlatform]:
    """The stacks of a model's only layer and its token tables, as kept with ``--quantization``."""
    config = ModelConfig(model=str(path), quantization=mode)  # type: ignore[arg-type]
    files = resolve(config)
    platform = CPUPlatform(choose(config, files=files))
    model = load_model(files, files.spec, platform=platform, dtype=torch.float32)
    assert isinstance(model, Decoder)
    layer = model.layers[0]
    parts = {
        "qkv": layer.attention.qkv,
        "output": layer.attention.output,
        "gate_up": layer.mlp.gate_up,
        "down": layer.mlp.down,
        "embedding": model.embedding,
        "head": model.head,
    }
    found = {name: part.weight for name, part in parts.items()}
    return {name: w._packed for name, w in found.items() if isinstance(w, CPUBlockWeight)}, platform


def stacks(model: Any) -> dict[str, torch.Tensor]:
    """The same of transformers' model."""
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "qkv": torch.cat(
            [p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        ),
        "output": attention.o_proj.weight,
        "gate_up": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        "down": mlp.down_proj.weight,
        "embedding": model.model.embed_tokens.weight,
        "head": model.lm_head.weight,
    }


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q4_1, Q.Q8_0])
def test_blocks_are_kept_as_they_are(
    kind: Q,
    arch: str,
    tmp_path: Path,
    reference: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit, q and k with their rows in the original order, and never through floats."""
    theirs = reference(ARCHITECTURES[arch][0](**SHAPE))
    export(theirs, tmp_path / "m.gguf", arch=arch, kind=kind)
    read = weights._dequantised

    def floats(*args: Any, tensor: Any, **kwargs: Any) -> torch.Tensor:
        assert len(tensor.shape) == 1, f"{tensor.name} becomes floats"
        return read(*args, tensor=tensor, **kwargs)

    monkeypatch.setattr(weights, "_dequantised", floats)
    monkeypatch.setattr(loader, "_CHUNK", 5000)
    kept, platform = blocks_of(tmp_path / "m.gguf", "gguf")
    assert {w.kind for w in kept.values()} == {kind.name.lower()} and not platform.changed
    for name, expected in stacks(theirs).items():
        assert torch.equal(dequantise(kept[name]), expected), name


def test_what_cannot_be_kept_is_made_of_floats_and_listed(
    tmp_path: Path, reference: Callable[..., Any]
) -> None:
    theirs = reference(LlamaConfig(**SHAPE))
    kinds = {"v_proj": Q.Q6_K, "o_proj": Q.F16, "lm_head": Q.Q8_0, "up_proj": Q.Q4_0}
    export(theirs, tmp_path / "m.gguf", arch="llama", kind=Q.Q4_1, kinds=kinds)
    kept, platform = blocks_of(tmp_path / "m.gguf", "gguf")
    assert {name: w.kind for name, w in kept.items()} == {
        "qkv": "q8_0",  # of three types
        "output": "q8_0",
        "gate_up": "q8_0",  # of two
        "down": "q4_1",
        "embedding": "q4_1",
        "head": "q8_0",
    }
    assert [name.removeprefix("model.layers.0.") for name in platform.changed] == [
        "self_attn.q_proj.weight (Q4_1)",
        "self_attn.k_proj.weight (Q4_1)",
        "self_attn.v_proj.weight (Q6_K)",
        "self_attn.o_proj.weight (F16)",
        "mlp.gate_proj.weight (Q4_1)",
        "mlp.up_proj.weight (Q4_0)",
    ]
    for name, expected in stacks(theirs).items():
        error = (dequantise(kept[name]) - expected).abs().max() / expected.abs().max()
        assert error <= (0.01 if kept[name].kind == "q8_0" else 0), name


@pytest.mark.parametrize(
    ("mode", "filed", "kind", "table"),
    [
        ("auto", Q.F16, "q8_64", "q8_64"),
        ("auto", Q.Q4_1, "q8_64", "q8_64"),
        ("int8", Q.Q8_0, "q8_64", "q8_64"),
        ("int4", Q.F16, "q4_1", "q8_0"),
    ],
)
def test_others_become_blocks(
    mode: str, filed: Q, kind: str, table: str, tmp_path: Path, reference: Callable[..., Any]
) -> None:
    theirs = reference(LlamaConfig(**SHAPE))
    export(theirs, tmp_path / "m.gguf", arch="llama", kind=filed)
    kept, platform = blocks_of(tmp_path / "m.gguf", mode)
    tables = ("embedding", "head")
    assert {w.kind for name, w in kept.items() if name not in tables} == {kind}
    assert {w.kind for name, w in kept.items() if name in tables} == {table}
    assert not platform.changed
    for name, expected in stacks(theirs).items():
        error = (dequantise(kept[name]) - expected).abs().max() / expected.abs().max()
        assert error <= (0.08 if kept[name].kind == "q4_1" else 0.01), name


def test_truncated_after_conversion(
    tmp_path: Path, reference: Callable[..., Any], load: Callable[..., Model]
) -> None:
    path = tmp_path / "m.gguf"
    export(reference(LlamaConfig(**SHAPE)), path, arch="llama", kind=Q.Q4_0)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(ValueError, match=r"m\.gguf is truncated: tensor \S+\.weight ends at byte"):
        load(path)


def test_unreadable_type_names_the_tensor(
    tmp_path: Path, reference: Callable[..., Any], load: Callable[..., Model]
) -> None:
    path = tmp_path / "m.gguf"
    export(reference(LlamaConfig(**SHAPE)), path, arch="llama", kind=Q.Q5_0)
    with pytest.raises(ValueError, match=r"tensor \S+\.weight has GGUF type 6; known are F32"):
        load(path)
