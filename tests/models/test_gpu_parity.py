"""Our models on a GPU, or in Triton's interpreter: transformers' logits, and the same bits however
a request is batched and chunked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from octavo.models import Model
from octavo.platforms.gpu import GPUPlatform, model_shape
from octavo_kernels import launches
from octavo_kernels.launch import recording
from octavo_kernels.testing import gpu_device, same_bits

SHAPE: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama-tied-biases": (
        LlamaConfig,
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral-window": (MistralConfig, {"sliding_window": 7, "num_key_value_heads": 1}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
}
PROMPTS = [[(11 * i + n) % SHAPE["vocab_size"] for i in range(n)] for n in (18, 2)]
# The longer prompt in two chunks, the first beside the shorter one, and then a single token.
CHUNKS = (5, 12, 1)

Load = Callable[..., Model]
Chunked = Callable[..., list[torch.Tensor]]


def reference_logits(reference: Any, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = reference(torch.tensor([prompt])).logits[0]
    return logits


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference as a share of the logits' range."""
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


@pytest.mark.parametrize("name", CASES)
def test_logits_match_transformers(
    name: str, tmp_path: Path, reference: Callable[..., Any], load: Load, chunked: Chunked
) -> None:
    """And nothing is launched that warming would not have compiled."""
    config_class, changes = CASES[name]
    theirs = reference(config_class(**{**SHAPE, **changes}))
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path, platform=GPUPlatform(gpu_device()))
    with recording() as keys:
        ours = chunked(model, PROMPTS, chunks=CHUNKS, dtype=torch.float32)
    for prompt, logits in zip(PROMPTS, ours, strict=True):
        assert error(logits, reference_logits(theirs, prompt)) < 1e-5
    shape = model_shape(model.spec, dtype=torch.float32, cache_dtype=torch.float32, block_size=16)
    assert len(keys) > 8 and keys <= {launch.key for launch in launches(shape)}


def test_bfloat16_is_close_and_bits_do_not_depend_on_batch_or_chunks(
    tmp_path: Path, reference: Callable[..., Any], load: Load, chunked: Chunked
) -> None:
    theirs = reference(Qwen3Config(**{**SHAPE, "head_dim": 16, "num_hidden_layers": 1}))
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path, dtype=torch.bfloat16, platform=GPUPlatform(gpu_device()))
    together = chunked(model, PROMPTS, chunks=CHUNKS, dtype=torch.bfloat16)
    for prompt, logits in zip(PROMPTS, together, strict=True):
        assert error(logits, reference_logits(theirs, prompt)) < 0.03
        (alone,) = chunked(model, [prompt], chunks=(15,), dtype=torch.bfloat16)
        assert same_bits(alone, logits)
