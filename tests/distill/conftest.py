"""A tiny target with random weights that are large enough to matter, and heads beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo.checkpoint import parse_config
from octavo.checkpoint.gguf_tokenizer import dummy_tokenizer
from octavo.distill.head import DraftHead, HeadConfig

VOCAB_SIZE = 300
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that octavo serves. What it writes can be learned: mostly one token's follower is
    always the same one."""
    folder = tmp_path_factory.mktemp("target")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(dummy_tokenizer(VOCAB_SIZE)))
    (folder / "tokenizer_config.json").write_text("{}")
    spec = parse_config(CONFIG)
    generator = torch.Generator().manual_seed(3)

    def weight(*shape: int, std: float) -> torch.Tensor:
        return torch.empty(shape).normal_(std=std, generator=generator)

    size, middle = spec.hidden_size, spec.intermediate_size
    kv = spec.num_kv_heads * spec.head_dim
    tensors = {"model.embed_tokens.weight": weight(spec.vocab_size, size, std=1.0)}
    for layer in range(spec.num_layers):
        name = f"model.layers.{layer}."
        for part, shape in (
            ("self_attn.q_proj", (size, size)),
            ("self_attn.k_proj", (kv, size)),
            ("self_attn.v_proj", (kv, size)),
            ("self_attn.o_proj", (size, size)),
            ("mlp.gate_proj", (middle, size)),
            ("mlp.up_proj", (middle, size)),
            ("mlp.down_proj", (size, middle)),
        ):
            tensors[f"{name}{part}.weight"] = weight(*shape, std=0.1)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{norm}.weight"] = 1 + weight(size, std=0.1)
    followers = torch.randperm(spec.vocab_size, generator=generator)
    tensors["lm_head.weight"] = 0.3 * tensors["model.embed_tokens.weight"][followers]
    tensors["model.norm.weight"] = 1 + weight(size, std=0.1)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def make_head() -> Callable[..., DraftHead]:
    """(window, sizes...) -> a random head of 4 query and 2 key heads."""

    def make(
        *,
        window: int = 0,
        draft_vocab_size: int = 40,
        dropout: float = 0.0,
        mask_token_id: int | None = None,
    ) -> DraftHead:
        torch.manual_seed(5)
        head = DraftHead(
            HeadConfig(
                hidden_size=32,
                intermediate_size=48,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                rms_norm_eps=1e-5,
                rope_theta=10000.0,
                vocab_size=VOCAB_SIZE,
                draft_vocab_size=draft_vocab_size,
                max_position_embeddings=128,
                aux_layers=(0, 1, 3),
                window=window,
                mask_token_id=mask_token_id,
                target={"name": "tiny", "fingerprint": "f"},
            ),
            dropout=dropout,
        )
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.3 + (parameter.dim() == 1))
        return head

    return make
