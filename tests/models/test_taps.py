"""Hidden states that a forward pass leaves behind, against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from octavo.attention import AttentionMetadata
from octavo.models import (
    Model,
    Taps,
    is_same_target,
    kv_cache_spec,
    target_fingerprint,
)
from octavo.platforms.cpu import CPUPlatform
from octavo.platforms.quantization import Quantization

SHAPE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = torch.tensor([(31 * i + 7) % 211 for i in range(29)], dtype=torch.int32)


def one_request(num_tokens: int) -> AttentionMetadata:
    positions = torch.arange(num_tokens, dtype=torch.int32)
    return AttentionMetadata(
        positions=positions,
        slots=positions,
        block_tables=torch.arange(4, dtype=torch.int32)[None],
        query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
    )


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("layers", [(0, 1, 3), (2,)])
def test_taps_are_the_inputs_of_layers(
    config_class: type,
    layers: tuple[int, ...],
    tmp_path: Path,
    reference: Callable[..., Any],
    load: Callable[..., Model],
) -> None:
    theirs = reference(config_class(**SHAPE))
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    spec = kv_cache_spec(model.spec, block_size=16, dtype=torch.float32)
    caches = model.backend.allocate(spec, num_blocks=4)
    taps = Taps(layers=layers, out=torch.full((40, len(layers) * 64), float("nan")))
    plain = model.forward(TOKENS, one_request(len(TOKENS)), caches)
    tapped = model.forward(TOKENS, one_request(len(TOKENS)), caches, taps=taps)
    assert torch.equal(plain, tapped)
    inputs: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(theirs.model.layers):

        def keep(_: Any, args: Any, output: Any, index: int = index) -> None:
            inputs[index] = args[0][0]
            inputs[index + 1] = (output[0] if isinstance(output, tuple) else output).view(-1, 64)

        layer.register_forward_hook(keep)
    with torch.no_grad():
        theirs(TOKENS[None].long())
    found = taps.out[: len(TOKENS)].split(64, dim=1)
    for layer_id, mine in zip(layers, found, strict=True):
        torch.testing.assert_close(mine, inputs[layer_id], atol=2e-5, rtol=2e-4)
    assert taps.out[len(TOKENS) :].isnan().all()


def test_a_fingerprint_knows_a_model_in_any_quantisation_and_no_other(
    tmp_path: Path, reference: Callable[..., Any], load: Callable[..., Model]
) -> None:
    folders = [tmp_path / name for name in ("one", "other", "table")]
    for seed, folder in enumerate(folders[:2]):
        reference(LlamaConfig(**SHAPE), seed=seed).save_pretrained(folder)
    changed = reference(LlamaConfig(**SHAPE), seed=0)
    with torch.no_grad():  # the norms are those of the first
        changed.model.embed_tokens.weight.copy_(changed.model.embed_tokens.weight.flip(0))
    changed.save_pretrained(folders[2])
    one, other, table = (target_fingerprint(load(folder)) for folder in folders)
    assert is_same_target(one, one)
    for mode in ("int8", "int4"):
        platform = CPUPlatform(Quantization(mode=mode))
        assert is_same_target(one, target_fingerprint(load(folders[0], platform=platform)))
    assert not is_same_target(one, other) and not is_same_target(one, table)
    assert not is_same_target(one, one.partition(":")[0])
