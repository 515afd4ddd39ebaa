"""A cache of its own for every test, and small GGUF files written by the gguf package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("OCTAVO_CACHE", str(folder))
    return folder


def byte_names() -> list[str]:
    """GPT-2's byte alphabet, from the tokenizers library (sorted), to make vocabularies of."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def write(path: Path, *, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    writer = GGUFWriter(str(path), metadata.get("general.architecture", "llama"))
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_metadata() -> dict[str, Any]:
    """A Llama of one layer whose vocabulary is bytes and one merge."""
    names = byte_names()
    return {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.rope.freq_base": 5000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<|end|>", *names, "ab"],
        "tokenizer.ggml.token_type": [3] + [1] * (len(names) + 1),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 0,
    }


def tiny_tensors(vocab_size: int = 258) -> dict[str, np.ndarray]:
    shapes = {
        "token_embd": (vocab_size, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_norm": (32,),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    rng = np.random.default_rng(0)
    return {
        f"{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


@pytest.fixture
def write_gguf() -> Callable[..., Path]:
    """``write_gguf(path, metadata changes, tensor changes)``; None removes a key or tensor."""

    def make(
        path: Path,
        metadata: Mapping[str, Any] | None = None,
        tensors: Mapping[str, np.ndarray | None] | None = None,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        keys = {**tiny_metadata(), **(metadata or {})}
        arrays = {**tiny_tensors(), **(tensors or {})}
        return write(
            path,
            metadata={k: v for k, v in keys.items() if v is not None},
            tensors={k: v for k, v in arrays.items() if v is not None},
        )

    return make
