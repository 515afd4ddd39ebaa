"""Rotary frequencies against transformers' functions, bit for bit where both use float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from octavo.checkpoint import parse_config
from octavo.models.rope import rotary_tables

POSITIONS = 300


def config(**rope: Any) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_attention_heads=4,
        hidden_size=256,
        max_position_embeddings=128,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.5},
        {"rope_type": "dynamic", "factor": 3.0},
        {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 64.0, "beta_slow": 0.5},
        {"rope_type": "yarn", "factor": 0.5},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "truncate": False},
    ],
    ids=lambda rope: "-".join(str(v) for v in rope.values()),
)
def test_same_as_transformers(rope: dict[str, Any]) -> None:
    theirs = config(**rope)
    compute = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
    frequencies, scale = compute(theirs, torch.device("cpu"), seq_len=POSITIONS)
    angles = torch.arange(POSITIONS, dtype=torch.float32)[:, None] * frequencies
    spec = parse_config(theirs.to_dict()).rope
    cos, sin = rotary_tables(spec, max_positions=POSITIONS)
    assert cos.shape == (POSITIONS, spec.rotary_dim // 2) and cos.is_contiguous()
    torch.testing.assert_close(cos, angles.cos() * scale, rtol=0, atol=1e-6)
    torch.testing.assert_close(sin, angles.sin() * scale, rtol=0, atol=1e-6)


def test_default_against_float64() -> None:
    spec = parse_config(config(rope_type="default").to_dict()).rope
    cos, sin = rotary_tables(spec, max_positions=POSITIONS)
    frequencies = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    angles = torch.arange(POSITIONS, dtype=torch.float64)[:, None] * frequencies
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=1e-4)


def test_dynamic_scaling_within_the_original_context_changes_nothing() -> None:
    plain = parse_config(config(rope_type="default").to_dict()).rope
    dynamic = parse_config(config(rope_type="dynamic", factor=4.0).to_dict()).rope
    for a, b in zip(
        rotary_tables(plain, max_positions=128),
        rotary_tables(dynamic, max_positions=128),
        strict=True,
    ):
        assert torch.equal(a, b)
