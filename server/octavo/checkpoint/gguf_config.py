"""Turns GGUF metadata into the config.json and generation_config.json that the model had.

Knows llama.cpp's metadata keys and which tensors are there; reads no tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from octavo.checkpoint.gguf_file import GGUFTensor

GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # [rotary_dim / 2]; each frequency is divided by its factor


def checkpoint_name(name: str) -> str:
    """Hugging Face name of a GGUF tensor; an unknown one comes back as it is."""
    if name in _NAMES:
        return _NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _LAYER_NAMES:
        return name
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def interleaved_heads(name: str, *, config: Mapping[str, Any]) -> int:
    """Heads of a tensor whose rotary dims llama.cpp stored as pairs side by side; 0 for others.

    Its llama models rotate (0, 1), (2, 3), ... where the original rotates (0, H/2), (1, H/2 + 1);
    its qwen models rotate as the original does.
    """
    if config["model_type"] not in ("llama", "mistral"):
        return 0
    if ".q_proj." in name:
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if ".k_proj." in name else 0


def config_from_metadata(
    metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]
) -> dict[str, Any]:
    """config.json dict of a GGUF model. Raises `ValueError` for an unknown architecture or a key
    that is missing."""
    arch = metadata.get("general.architecture")
    if arch not in GGUF_ARCHITECTURES:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise ValueError(f"unknown GGUF architecture {arch!r}; known are {known}")

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{arch}.{key}", default)

    def need(key: str) -> Any:
        value = get(key)
        if value is None:
            raise ValueError(f"GGUF metadata has no {arch}.{key}")
        return value

    if "token_embd.weight" not in tensors:
        raise ValueError("the GGUF file has no tensor token_embd.weight")
    num_heads, hidden_size = need("attention.head_count"), need("embedding_length")
    rotary_dim = get("rope.dimension_count")
    head_dim = get("attention.key_length") or hidden_size // num_heads
    window = get("attention.sliding_window") or None
    llama_like = arch in ("llama", "mistral")
    config: dict[str, Any] = {
        "architectures": [
            "MistralForCausalLM" if llama_like and window else GGUF_ARCHITECTURES[arch]
        ],
        "model_type": "mistral" if llama_like and window else arch,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "intermediate_size": need("feed_forward_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": need("context_length"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "sliding_window": window,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }
    if rotary_dim and rotary_dim != head_dim:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    config["rope_scaling"] = _rope_scaling(get, context=config["max_position_embeddings"])
    for key in ("bos", "eos"):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None:
            config[f"{key}_token_id"] = value
    return config


def _rope_scaling(get: Any, *, context: int) -> dict[str, Any] | None:
    kind = get("rope.scaling.type", "none")
    factor = get("rope.scaling.factor") or get("rope.scale_linear")
    if kind == "none" and get("rope.scale_linear") is not None:
        kind = "linear"
    if kind == "none" or not factor or factor == 1.0:
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"GGUF rope.scaling.type must be none, linear or yarn, got {kind!r}")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    original = get("rope.scaling.original_context_length")
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = original or context
        for key, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            value = get(f"rope.scaling.{key}")
            if value:
                scaling[ours] = value
        magnitude = get("rope.scaling.attn_factor")
        if magnitude:
            # llama.cpp multiplies yarn's usual factor by this; config.json replaces it.
            scaling["attention_factor"] = magnitude * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return scaling


def generation_config_from_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json dict: the ids that begin and end a text.

    A chat model ends turns with a token other than the end of text; it counts as an end when
    metadata or the chat template names it.
    """
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    template = metadata.get("tokenizer.chat_template", "")
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    ids += [tokens.index(t) for t in _TURN_ENDS if t in template and t in tokens]
    config: dict[str, Any] = {}
    if ends := list(dict.fromkeys(i for i in ids if i is not None)):
        config["eos_token_id"] = ends
    if (bos := metadata.get("tokenizer.ggml.bos_token_id")) is not None:
        config["bos_token_id"] = bos
    return config
