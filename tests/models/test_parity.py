"""Our models against transformers' on tiny random weights: same logits, however it is batched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from octavo.models import Model

SHAPE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **parameters}}


CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama-gqa": (LlamaConfig, {}),
    "llama-mha-tied": (LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa": (LlamaConfig, {"num_key_value_heads": 1}),
    "llama-biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": (LlamaConfig, {"head_dim": 32}),
    "llama-linear": (LlamaConfig, rope("linear", factor=2.5)),
    "llama-dynamic": (LlamaConfig, rope("dynamic", factor=4.0)),
    "llama-llama3": (
        LlamaConfig,
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama-yarn": (
        LlamaConfig,
        rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=8.0),
    ),
    "mistral-window": (MistralConfig, {"sliding_window": 9}),
    "mistral-no-window": (MistralConfig, {"sliding_window": None, "head_dim": 32}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-some-windows": (Qwen2Config, WINDOWED),
    "qwen2-yarn": (
        Qwen2Config,
        rope("yarn", factor=2.0, original_max_position_embeddings=64, attention_factor=1.25),
    ),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "qwen3-tied-biases": (
        Qwen3Config,
        {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "qwen3-some-windows": (Qwen3Config, {"head_dim": 16, **WINDOWED}),
}
LENGTHS = (45, 1, 17, 32, 70)
# Steps of one token beside long chunks, across block borders, with pauses.
CHUNKS = (5, 16, 1, 0, 27, 3)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(0, SHAPE["vocab_size"], (n,), generator=generator).tolist() for n in LENGTHS
    ]


def expected(reference: Any, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = reference(torch.tensor([prompt])).logits[0]
    return logits


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, *, relative: float) -> None:
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / (theirs.max() - theirs.min())
    assert error <= relative, f"off by {error:.2e} of the logits' range"


@pytest.mark.parametrize("name", CASES)
def test_logits_match_transformers(
    name: str,
    tmp_path: Path,
    reference: Callable[..., Any],
    load: Callable[..., Model],
    chunked: Callable[..., list[torch.Tensor]],
) -> None:
    config_class, changes = CASES[name]
    theirs = reference(config_class(**{**SHAPE, **changes}))
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    for prompt, logits in zip(
        prompts(), chunked(model, prompts(), chunks=CHUNKS, dtype=torch.float32), strict=True
    ):
        assert_close(logits, expected(theirs, prompt), relative=1e-5)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "qwen3", "qwen2"])
def test_bits_do_not_depend_on_batch_or_chunks(
    name: str,
    tmp_path: Path,
    reference: Callable[..., Any],
    load: Callable[..., Model],
    chunked: Callable[..., list[torch.Tensor]],
) -> None:
    config_class, changes = CASES[name]
    reference(config_class(**{**SHAPE, **changes})).save_pretrained(tmp_path)
    model = load(tmp_path)
    together = chunked(model, prompts(), chunks=CHUNKS, dtype=torch.float32)
    for prompt, packed in zip(prompts(), together, strict=True):
        for sizes in ((len(prompt),), (1,), (16,)):
            (alone,) = chunked(model, [prompt], chunks=sizes, dtype=torch.float32)
            assert torch.equal(alone, packed), f"chunks of {sizes}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights(
    dtype: torch.dtype,
    tmp_path: Path,
    reference: Callable[..., Any],
    load: Callable[..., Model],
    chunked: Callable[..., list[torch.Tensor]],
) -> None:
    """Weights rounded, activations float32: equal to transformers in float32 on rounded weights,
    up to K and V, which are rounded too."""
    theirs = reference(LlamaConfig(**SHAPE))
    theirs.save_pretrained(tmp_path)
    for parameter in theirs.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.to(dtype).to(torch.float32)
    model = load(tmp_path, dtype=dtype)
    exact = chunked(model, prompts(), chunks=CHUNKS, dtype=torch.float32)
    rounded = chunked(model, prompts(), chunks=CHUNKS, dtype=dtype)
    for prompt, a, b in zip(prompts(), exact, rounded, strict=True):
        assert_close(a, expected(theirs, prompt), relative=1e-5)
        assert_close(b, expected(theirs, prompt), relative=0.03)


def test_sharded_checkpoint_equals_whole(
    tmp_path: Path,
    reference: Callable[..., Any],
    load: Callable[..., Model],
    chunked: Callable[..., list[torch.Tensor]],
) -> None:
    theirs = reference(Qwen2Config(**SHAPE))
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    whole, sharded = (
        chunked(load(tmp_path / kind), prompts(), chunks=(8,), dtype=torch.float32)
        for kind in ("whole", "sharded")
    )
    for a, b in zip(whole, sharded, strict=True):
        assert torch.equal(a, b)


def test_dynamic_scaling_beyond_the_original_context(
    tmp_path: Path,
    reference: Callable[..., Any],
    load: Callable[..., Model],
    chunked: Callable[..., list[torch.Tensor]],
) -> None:
    """A longer --max-model-len stretches for that length, as transformers does for a request of
    exactly that length, and for shorter ones all the same."""
    theirs = reference(LlamaConfig(**SHAPE, **rope("dynamic", factor=2.0)))
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path, max_model_len=160)
    long = [t % SHAPE["vocab_size"] for t in range(160)]
    longest, shorter = chunked(model, [long, long[:90]], chunks=(160,), dtype=torch.float32)
    assert_close(longest, expected(theirs, long), relative=1e-5)
    assert torch.equal(longest[:90], shorter)
