"""``octavo serve --kv-offloading-size``: a long prompt's second use after its eviction."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import Server, start_server

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LENGTH = 130  # tokens of a prompt: 8 full blocks of the cache's 12


@pytest.fixture(scope="module")
def offloading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    running = start_server(
        tmp_path_factory.mktemp("offloading") / "log",
        *(str(folder), "--load-format", "dummy", "--device", "cpu"),
        *("--num-gpu-blocks-override", "12", "--kv-offloading-size", "0.01"),
        "--check-kv-invariants",
    )
    yield running
    running.process.terminate()
    running.process.wait(timeout=60)


def complete(server: Server, first: int, **fields: Any) -> dict[str, Any]:
    prompt = [2 + (first * 41 + i * i + 3 * i) % 290 for i in range(LENGTH)]
    body = {"prompt": prompt, "max_tokens": 12, "ignore_eos": True, "logprobs": 3, "seed": 5}
    request = urllib.request.Request(
        server.url + "/v1/completions",
        json.dumps(body | fields).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found


def cached_tokens(answer: dict[str, Any]) -> int:
    details = answer["usage"]["prompt_tokens_details"]
    return int(details["cached_tokens"]) if details else 0


def test_an_evicted_prompt_is_served_from_host_memory(offloading: Server) -> None:
    first = complete(offloading, 0)
    assert cached_tokens(first) == 0
    for other in (1, 2):
        complete(offloading, other)
    loaded = offloading.metric("octavo:kv_offload_loaded_blocks_total")
    again = complete(offloading, 0)
    assert cached_tokens(again) == 128
    assert again["choices"] == first["choices"]
    # A part may still have been in the cache: eviction takes the end of a prompt first.
    loaded = offloading.metric("octavo:kv_offload_loaded_blocks_total") - loaded
    assert 0 < loaded <= 8
    assert offloading.metric("vllm:external_prefix_cache_hits_total") == 16 * loaded
    assert offloading.metric("octavo:kv_offload_saved_blocks_total") >= 16
    assert 0 < offloading.metric("octavo:kv_offload_usage_perc") <= 1
    assert offloading.metric("octavo:kv_offload_damaged_blocks_total") == 0


def test_another_salt_finds_nothing_there(offloading: Server) -> None:
    complete(offloading, 3)
    for other in (4, 5):
        complete(offloading, other)
    assert cached_tokens(complete(offloading, 3, cache_salt="someone else")) == 0
