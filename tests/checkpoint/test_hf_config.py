"""`parse_config` against transformers' own config classes and by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from octavo.checkpoint import parse_config
from octavo.checkpoint.hf_config import ARCHITECTURES

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1000,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(architectures=["LlamaForCausalLM"]),
        LlamaConfig(architectures=["LlamaForCausalLM"], num_key_value_heads=4, head_dim=64),
        MistralConfig(architectures=["MistralForCausalLM"]),
        MistralConfig(architectures=["MistralForCausalLM"], sliding_window=None),
        Qwen2Config(architectures=["Qwen2ForCausalLM"]),
        Qwen2Config(
            architectures=["Qwen2ForCausalLM"], use_sliding_window=True, max_window_layers=20
        ),
        Qwen3Config(architectures=["Qwen3ForCausalLM"], tie_word_embeddings=True),
    ],
    ids=lambda c: c.model_type,
)
@pytest.mark.parametrize("full", [True, False])
def test_agrees_with_transformers(config: PreTrainedConfig, full: bool) -> None:
    """Written in full, and with every field that equals its class's default left out."""
    content = json.loads(config.to_json_string(use_diff=not full))
    # A real config.json gives the sizes, whatever else it leaves to its class.
    needed = {name: getattr(config, name) for name in SIZES}
    spec = parse_config({**needed, **content})
    assert spec.num_layers == config.num_hidden_layers
    assert spec.num_kv_heads == config.num_key_value_heads
    assert spec.head_dim == (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    assert spec.max_position_embeddings == config.max_position_embeddings
    assert spec.rope.theta == config.rope_parameters["rope_theta"]
    assert spec.tie_word_embeddings == config.tie_word_embeddings
    types = getattr(config, "layer_types", None)
    window = config.sliding_window if hasattr(config, "sliding_window") else None
    expected = [
        (window or 0) if types is None or types[i] == "sliding_attention" else 0
        for i in range(config.num_hidden_layers)
    ]
    assert list(spec.layer_windows) == expected


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({"type": "linear", "factor": 2.0}, 2000),
        ({"type": "dynamic", "factor": 2.0}, 1000),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 500}, 2000),
        ({"type": "yarn", "factor": 4.0}, 4000),
        (
            {
                "type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 125,
            },
            1000,
        ),
    ],
    ids=lambda v: v["type"] if isinstance(v, dict) else None,
)
def test_three_spellings_of_rope_scaling(scaling: dict[str, Any], context: int) -> None:
    kind = scaling.pop("type")
    old = {**BASE, "rope_theta": 500.0, "rope_scaling": {"type": kind, **scaling}}
    newer = {**BASE, "rope_theta": 500.0, "rope_scaling": {"rope_type": kind, **scaling}}
    newest = {**BASE, "rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **scaling}}
    specs = [parse_config(config) for config in (old, newer, newest)]
    assert specs[0] == specs[1] == specs[2]
    assert specs[0].rope.kind == kind and specs[0].rope.factor == scaling["factor"]
    assert specs[0].max_model_len == context


def test_end_of_sequence_ids() -> None:
    assert parse_config(BASE).eos_token_ids == ()
    assert parse_config({**BASE, "eos_token_id": 5}).eos_token_ids == (5,)
    spec = parse_config(
        {**BASE, "eos_token_id": 5, "bos_token_id": 3},
        generation_config={"eos_token_id": [6, 7], "bos_token_id": None},
    )
    assert spec.eos_token_ids == (6, 7) and spec.bos_token_id == 3


def test_architecture_by_model_type_and_unknown() -> None:
    for name, arch in ARCHITECTURES.items():
        config = {
            **BASE,
            "architectures": None,
            "model_type": arch.model_type,
            "num_key_value_heads": 4,
        }
        assert parse_config(config).architecture == name
    with pytest.raises(ValueError) as error:
        parse_config({**BASE, "architectures": ["BertModel"]})
    assert "BertModel" in str(error.value)
    assert all(name in str(error.value) for name in ARCHITECTURES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"hidden_size": "64"}, "hidden_size must be a number, got '64'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be positive, got -1"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers must be a whole number, got 2.5"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads, got 4 and 3"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "one of default, .* 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "config.json has no factor"),
        ({"quantization_config": {"quant_method": "awq"}}, r"\(awq\) is not supported"),
        ({"eos_token_id": "end"}, "eos_token_id must be a token id or a list of them"),
    ],
)
def test_bad_configs_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config({**BASE, **change})
