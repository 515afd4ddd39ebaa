"""Which class runs which architecture. Knows names; `checkpoint.hf_config` knows their configs."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.models.decoder import Decoder

MODELS: Mapping[str, type[Decoder]] = {
    "LlamaForCausalLM": Decoder,
    "MistralForCausalLM": Decoder,
    "Qwen2ForCausalLM": Decoder,
    "Qwen3ForCausalLM": Decoder,
}
