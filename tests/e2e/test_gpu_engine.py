"""The GPU engine for users: offline and as a server in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo.checkpoint import resolve
from octavo.checkpoint.gguf_tokenizer import dummy_tokenizer
from octavo.config import ModelConfig
from octavo.engine.outputs import DraftStats
from octavo.llm import LLM
from octavo.models import load_model
from octavo.platforms.cpu import CPUPlatform
from octavo.platforms.gpu import model_shape
from octavo_kernels import launches, parallel
from octavo_kernels.compile_count import num_compiled
from octavo_kernels.launch import recording
from tests.e2e.conftest import Server, start_server

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 260,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3]]
NUM_TOKENS = 3
NUM_BLOCKS = 256  # of 1 KiB: all of a GPU would be tens of millions, and their lists gigabytes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights so large that every token matters to the next."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(dummy_tokenizer(260)))
    (folder / "tokenizer_config.json").write_text("{}")
    files = resolve(ModelConfig(model=str(folder), load_format="dummy"))
    model = load_model(files, files.spec, platform=CPUPlatform(), dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    tensors = {
        name: torch.ones(slot.shape)
        if slot.kind == "norm"
        else torch.empty(slot.shape).normal_(std=0.3, generator=generator)
        for name, slot in model.slots().items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Iterator[list[list[int]]]:
    """The CPU engine's tokens."""
    before = parallel.num_threads(), torch.get_num_threads()
    yield generated(checkpoint, device="cpu")
    parallel.set_num_threads(before[0])
    torch.set_num_threads(before[1])


def generated(checkpoint: Path, **options: Any) -> list[list[int]]:
    llm = LLM(str(checkpoint), dtype="float32", max_num_seqs=2, num_threads=2, **options)
    answers = llm.generate(
        PROMPTS, {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    )
    return [list(answer.outputs[0].token_ids) for answer in answers]


@interpreted
def test_offline_tokens_are_the_cpus(checkpoint: Path, expected: list[list[int]]) -> None:
    assert all(len(set(tokens)) > 2 for tokens in expected), "tokens that depend on the prompt"
    with recording() as keys:
        assert generated(checkpoint, device="cuda", check_kv_invariants=True) == expected
    spec = resolve(ModelConfig(model=str(checkpoint))).spec
    shape = model_shape(spec, dtype=torch.float32, cache_dtype=torch.float32, block_size=16)
    listed = {launch.key for launch in launches(shape)}
    assert len(keys) > 10 and keys <= listed, "nothing else may be compiled while serving"


def drafted(
    checkpoint: Path, method: str, **options: Any
) -> tuple[list[tuple[list[int], Any]], list[DraftStats]]:
    """Tokens, log-probabilities and drafts of requests that draw from few tokens."""
    llm = LLM(
        str(checkpoint),
        dtype="bfloat16",
        device="cuda",
        max_num_seqs=4,
        num_gpu_blocks_override=NUM_BLOCKS,
        speculative_config={"method": method, "num_speculative_tokens": 3},
        **options,
    )
    few = {"max_tokens": 12, "ignore_eos": True, "allowed_token_ids": [5, 6, 7], "logprobs": 1}
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 4, "temperature": 0.8, "frequency_penalty": 0.3, "bad_words": ["a"]},
    ]
    found = llm.generate([[5, 6, 7, 5, 6], [7, 5, 7, 5]], [few | kind for kind in kinds])
    outputs = [answer.outputs[0] for answer in found]
    tokens = [(list(output.token_ids), output.logprobs) for output in outputs]
    return tokens, [output.draft_stats for output in outputs]


@interpreted
def test_drafts_leave_bits_as_they_are_and_compile_nothing(checkpoint: Path) -> None:
    """Through the attention kernels of requests that decode, several tokens of each at a time."""
    want, none = drafted(checkpoint, "off")
    assert none == [DraftStats()] * 2
    spec = resolve(ModelConfig(model=str(checkpoint))).spec
    shape = model_shape(spec, dtype=torch.bfloat16, cache_dtype=torch.bfloat16, block_size=16)
    listed = {launch.key for launch in launches(shape)}
    for method in ("ngram", "auto"):
        with recording() as keys:
            found, drafts = drafted(checkpoint, method, check_kv_invariants=True)
        assert found == want
        assert keys <= listed, "nothing else may be compiled while serving"
        if method == "ngram":
            accepted = sum(each.num_accepted_tokens for each in drafts)
            assert 0 < accepted < sum(each.num_draft_tokens for each in drafts)


@pytest.mark.gpu
def test_on_a_gpu_drafts_leave_bits_as_they_are(checkpoint: Path) -> None:
    """Kernel by kernel, and in graphs once steps have asked for them; nothing is compiled."""
    want, _ = drafted(checkpoint, "off")
    few = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "allowed_token_ids": [5, 6, 7]}
    plain = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    for method in ("ngram", "auto"):
        assert drafted(checkpoint, method)[0] == want
        speculation = {"method": method, "num_speculative_tokens": 3}
        llm = LLM(
            str(checkpoint),
            device="cuda",
            max_num_seqs=4,
            num_gpu_blocks_override=NUM_BLOCKS,
            speculative_config=speculation,
        )
        before, found = num_compiled(), []
        for _ in range(3):
            answers = llm.generate([[5, 6, 7, 5, 6], [7, 5], [9]], [few, few, plain])
            found.append([output.token_ids for answer in answers for output in answer.outputs])
            while llm._core.use_idle_time():
                pass
        assert found[1:] == found[:1] * 2
        assert num_compiled() == before


@pytest.fixture(scope="module")
def gpu_server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = start_server(
        tmp_path_factory.mktemp("gpu-server") / "log",
        *("--model", str(checkpoint), "--served-model-name", "tiny"),
        *("--device", "cuda", "--dtype", "float32", "--max-num-seqs", "2"),
        *("--cudagraph-capture-sizes", "1"),
    )
    yield running
    running.process.terminate()
    running.process.wait(timeout=60)


def complete(server: Server, prompt: list[int]) -> dict[str, Any]:
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        server.url + "/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@interpreted
def test_a_server_serves_the_same(gpu_server: Server, expected: list[list[int]]) -> None:
    log = gpu_server.log.read_text()
    assert "float32 on CPU, in Triton's interpreter" in log
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert complete(gpu_server, prompt)["choices"][0]["token_ids"] == tokens
    # Graphs are captured while there is nothing to run, and between steps: soon one is used.
    how, num_requests = "octavo:forward_passes_total", len(PROMPTS)
    while not gpu_server.metric(how, 'how="graph"'):
        assert num_requests < 10
        assert complete(gpu_server, PROMPTS[0])["choices"][0]["token_ids"] == expected[0]
        num_requests += 1
    assert gpu_server.metric(how) == num_requests * NUM_TOKENS
    assert gpu_server.metric("octavo:graphs_captured_total") > 0
    assert gpu_server.metric("octavo:kernel_compiles_after_ready_total") == 0


@pytest.mark.gpu
def test_on_a_gpu_tokens_are_the_cpus_and_nothing_is_compiled_after_ready(
    checkpoint: Path, expected: list[list[int]]
) -> None:
    """Kernel by kernel, then by graphs, with parameters of all kinds beside."""
    llm = LLM(str(checkpoint), dtype="float32", device="cuda", max_num_seqs=8)
    before = num_compiled()
    greedy = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    others = [
        {"temperature": 1.0, "seed": 5, "top_p": 0.9, "max_tokens": 9, "logprobs": 3},
        {"temperature": 0.7, "seed": 6, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2},
        {"seed": 7, "logit_bias": {4: 2.0}, "bad_words": ["a"], "prompt_logprobs": 2},
        {"seed": 8, "n": 3, "frequency_penalty": 0.5, "min_tokens": 3},
    ]
    prompts = [*PROMPTS, *([7] * length for length in (1, 20, 33, 40))]

    def answers() -> list[list[int]]:
        found = llm.generate(prompts, [greedy, greedy, *others])
        return [list(output.token_ids) for answer in found for output in answer.outputs]

    eager = answers()
    assert eager[: len(expected)] == expected
    while llm._core.use_idle_time():
        pass
    assert answers() == eager, "graphs give the same bits"
    assert num_compiled() == before
