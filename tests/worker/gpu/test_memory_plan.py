"""The memory plan against parameter counts, the tensors themselves, and its own limits."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from octavo.attention.triton import TritonAttention
from octavo.checkpoint import ModelSpec, parse_config
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.models import kv_cache_spec
from octavo.models.registry import MODELS
from octavo.platforms.gpu import GPUPlatform
from octavo.worker.gpu.allocator import CachingAllocator, Tally
from octavo.worker.gpu.arena import RequestArena, request_columns
from octavo.worker.gpu.buffers import StepBuffers
from octavo.worker.gpu.footprint import META
from octavo.worker.gpu.memory_plan import (
    GIB,
    MemoryPlan,
    max_step_tokens,
    plan_gpu_memory,
)
from octavo.worker.gpu.runtime import HostRuntime
from octavo.worker.gpu.sampler import GpuSampler
from octavo.worker.gpu.upload import upload_words
from octavo_kernels.launch import dropping

MIB = 1 << 20
MODELS_FOLDER = Path(__file__).resolve().parents[2] / "cli" / "models"


def spec_of(name: str) -> ModelSpec:
    return parse_config(json.loads((MODELS_FOLDER / f"{name}.json").read_text()))


LLAMA, QWEN = spec_of("llama-3.1-8b"), spec_of("qwen3-0.6b")
TINY = parse_config(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 300,
        "max_position_embeddings": 512,
        "attention_bias": True,
    }
)


def config(**options: Any) -> EngineConfig:
    """Options by name, whichever component has them; few graphs, so that plans are quick."""
    options = {"max_cudagraph_capture_size": 8, **options}

    def part(kind: type[Any]) -> Any:
        return kind(**{n: options[n] for n in options if n in kind.__dataclass_fields__})

    return EngineConfig(
        model=part(ModelConfig), cache=part(CacheConfig), scheduler=part(SchedulerConfig)
    )


def plan(spec: ModelSpec, gib: float, **options: Any) -> MemoryPlan:
    return plan_gpu_memory(spec, config(**options), total_bytes=int(gib * GIB))


def size_of(made: MemoryPlan, name: str) -> int:
    return sum(part.num_bytes for part in made.parts if part.name.startswith(name))


def test_an_8b_model_on_80_gib() -> None:
    made = plan(LLAMA, 80, max_cudagraph_capture_size=None)
    # 8,030,261,248 parameters in bfloat16, and 131,072 positions of 64 cosines and sines.
    assert made.weight_bytes == 2 * 8_030_261_248 + 131_072 * 64 * 2 * 4
    # All but the embedding and those tables: what the roofline of a decode step counts.
    assert made.streamed_bytes == 2 * (8_030_261_248 - 128_256 * 4096)
    assert made.block_bytes == 16 * 131_072
    assert made.used_bytes == sum(part.num_bytes for part in made.parts)
    assert made.usable_bytes - 192 * MIB < made.used_bytes <= made.usable_bytes
    assert made.sizes.max_model_len == 131_072 and made.notes == ()
    assert made.sizes.max_num_tokens == 8192
    assert 3.2 < made.concurrency(131_072) < 3.6
    assert made.cache.num_blocks == made.sizes.num_blocks


def test_a_tied_model_reads_its_table() -> None:
    made = plan(QWEN, 24)
    num_parameters = 596_049_920
    assert made.weight_bytes == 2 * num_parameters + 40_960 * 64 * 2 * 4
    assert made.streamed_bytes == 2 * num_parameters
    assert made.sizes.max_num_tokens == 2048  # a small GPU
    wide = plan(QWEN, 24, dtype="float32")
    assert size_of(wide, "weights: feed") == 2 * size_of(made, "weights: feed")
    assert wide.block_bytes == 2 * made.block_bytes and wide.cache_dtype == torch.float32
    with pytest.raises(ValueError, match="kv_cache_dtype must be auto or the model's dtype"):
        plan(QWEN, 24, dtype="float32", kv_cache_dtype="bfloat16")
    with pytest.raises(ValueError, match="kv_cache_dtype must be auto or .* on a GPU, got int8"):
        plan(QWEN, 24, kv_cache_dtype="int8")
    with pytest.raises(ValueError, match="quantization on a GPU must be auto or none, got int8"):
        plan(QWEN, 24, quantization="int8")


def test_parts_are_the_tensors() -> None:
    """What is planned is what the same constructors take of real memory."""
    made = plan(TINY, 2, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256)
    sizes = made.sizes
    runtime = HostRuntime()
    arena = RequestArena(request_columns(sizes), num_rows=8, device="cpu")
    buffers = StepBuffers.create(sizes, num_words=upload_words(sizes), device=runtime.device)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (getattr(buffers, name) for name in type(buffers).__slots__)
        if isinstance(tensor, torch.Tensor)
    }
    assert size_of(made, "request table") == arena.words.nbytes
    assert size_of(made, "logits") == buffers.logits.nbytes == 8 * 300 * 4
    assert size_of(made, "logits") + size_of(made, "step buffers") == sum(storages.values())
    model = MODELS[TINY.architecture](
        TINY, platform=GPUPlatform("cpu"), dtype=torch.bfloat16, max_model_len=256
    )
    assert made.weight_bytes == model.weight_bytes
    cache = kv_cache_spec(TINY, block_size=16, dtype=torch.bfloat16)
    backend = TritonAttention("cpu")
    assert made.block_bytes == backend.block_bytes(cache)
    layers = backend.allocate(cache, num_blocks=2)
    assert sum(t.nbytes for layer in layers for t in layer) == 2 * made.block_bytes
    sampler = GpuSampler(arena, sizes=sizes, runtime=runtime, max_logprobs=20)
    counts = sampler._params.counts.nbytes + sampler._raw.nbytes
    assert counts < size_of(made, "sampler") < 2**20


def test_a_plan_grows_with_what_it_is_for() -> None:
    def tokens(**options: Any) -> int:
        return plan(QWEN, 8, max_model_len=4096, **options).kv_tokens

    base = tokens()
    assert tokens(max_num_seqs=512) < base < tokens(max_num_seqs=16)
    assert tokens(max_num_batched_tokens=8192) < base <= tokens(max_num_batched_tokens=512)
    assert tokens(gpu_memory_utilization=0.5) < base < tokens(gpu_memory_utilization=0.98)
    assert tokens(cudagraph_capture_sizes=(1024, 2048), max_cudagraph_capture_size=None) < base
    assert base <= tokens(enforce_eager=True, max_cudagraph_capture_size=None)
    assert tokens(max_logprobs=20_000) < base
    shorter = plan(QWEN, 8, max_model_len=1024)
    assert base <= shorter.kv_tokens
    assert shorter.concurrency(1024) > 3.9 * shorter.concurrency(4096)


def test_a_tiny_models_cache_is_not_as_large_as_the_gpu() -> None:
    made = plan(TINY, 80)
    assert made.sizes.num_blocks == 1 << 20
    assert plan(TINY, 80, num_gpu_blocks_override=1 << 21).sizes.num_blocks == 1 << 21


def test_the_context_is_cut_to_fit_and_said() -> None:
    made = plan(LLAMA, 24)
    length = made.sizes.max_model_len
    assert 30_000 < length < 50_000 and length % 16 == 0
    assert made.concurrency(length) >= 1
    assert f"cut from 131072 to {length} tokens" in made.notes[0]
    assert made.used_bytes <= made.usable_bytes
    # Asked for, it fits; much longer does not.
    assert plan(LLAMA, 24, max_model_len=length).cache.num_blocks >= length // 16
    with pytest.raises(ValueError, match="leave"):
        plan(LLAMA, 24, max_model_len=length + length // 10)


def test_exact_sizes_of_the_cache() -> None:
    blocks = plan(QWEN, 24, num_gpu_blocks_override=100, max_model_len=1600)
    assert blocks.sizes.num_blocks == 100
    cut = plan(QWEN, 24, num_gpu_blocks_override=100)
    assert cut.sizes.max_model_len == 1600
    some = plan(QWEN, 24, kv_cache_memory_bytes=GIB, max_model_len=4096)
    assert some.sizes.num_blocks == GIB // some.block_bytes
    with pytest.raises(ValueError, match=r"num_gpu_blocks_override is 100.*no num_gpu_blocks_over"):
        plan(QWEN, 24, num_gpu_blocks_override=100, max_model_len=4096)
    with pytest.raises(ValueError, match="kv_cache_memory_bytes is"):
        plan(QWEN, 24, kv_cache_memory_bytes=30 * GIB, max_model_len=4096)


def test_refusals_say_the_figures_and_what_would_fit() -> None:
    with pytest.raises(ValueError) as long:
        plan(LLAMA, 24, max_model_len=131_072)
    text = str(long.value)
    assert text.startswith("24.00 GiB of GPU memory, 92% of which may be used, leave ")
    assert "one request of 131072 tokens takes 16.00 GiB" in text
    assert "weights 15.02 GiB" in text and "CUDA context 0.50 GiB" in text
    fitting = int(text.split("It would fit with max_model_len ")[1].split(",")[0])
    assert plan(LLAMA, 24, max_model_len=fitting).concurrency(fitting) >= 1
    gpu = int(text.split("a GPU of ")[1].split(" ")[0])
    assert plan(LLAMA, gpu, max_model_len=131_072).concurrency(131_072) >= 1
    with pytest.raises(ValueError, match=r"16.00 GiB .* are too little for the model: it takes"):
        plan(LLAMA, 16)
    with pytest.raises(ValueError, match="or dtype bfloat16, or "):
        plan(QWEN, 3.2, dtype="float32", max_model_len=1024, max_num_seqs=1)
    with pytest.raises(ValueError, match=r"would fit with .*max_num_seqs \d+, or"):
        plan(QWEN, 2.4, max_model_len=512)
    with pytest.raises(ValueError, match="at most 40960, the context that the model was made for"):
        plan(QWEN, 24, max_model_len=50_000)


def test_weights_as_loaded() -> None:
    spec = QWEN
    known = plan(spec, 8)
    more = plan_gpu_memory(
        spec, config(), total_bytes=8 * GIB, weight_bytes=known.weight_bytes + GIB
    )
    assert more.weight_bytes == known.weight_bytes + GIB
    assert size_of(more, "weights") == more.weight_bytes
    assert (
        known.kv_tokens // 16 * known.block_bytes - (more.kv_tokens // 16 * more.block_bytes)
        > GIB * 9 // 10
    )


def test_free_memory_is_checked() -> None:
    made = plan(QWEN, 8)
    needed = made.used_bytes - size_of(made, "CUDA context")
    made.check_free(needed)
    with pytest.raises(ValueError) as refused:
        made.check_free(4 * GIB)
    text = str(refused.value)
    assert f"needs {needed / GIB:.2f} GiB" in text and "only 4.00 GiB of its 8.00 GiB" in text
    assert "gpu_memory_utilization to 0.56 or less" in text
    assert plan(QWEN, 8, gpu_memory_utilization=0.56, max_model_len=2048).used_bytes <= 4.5 * GIB


def test_step_tokens() -> None:
    assert max_step_tokens(77, max_num_seqs=256, total_bytes=80 * GIB) == 77
    assert max_step_tokens(None, max_num_seqs=256, total_bytes=80 * GIB) == 8192
    assert max_step_tokens(None, max_num_seqs=256, total_bytes=24 * GIB) == 2048
    assert max_step_tokens(None, max_num_seqs=4096, total_bytes=24 * GIB) == 4096


def test_the_allocators_rules() -> None:
    memory = CachingAllocator()
    free = [memory.allocate(100) for _ in range(4096)]  # 512 bytes each
    assert memory.reserved == 2 * MIB and memory.allocated == 2 * MIB
    memory.allocate(3 * MIB)
    assert memory.reserved == 22 * MIB
    own = memory.allocate(18 * MIB)  # does not fit beside it
    assert memory.reserved == 40 * MIB
    memory.allocate(17 * MIB)
    assert memory.reserved == 40 * MIB, "what was left of 20 MiB"
    own()
    second, third = memory.allocate(8 * MIB), memory.allocate(8 * MIB)
    assert memory.reserved == 40 * MIB, "split"
    third(), second()
    memory.allocate(18 * MIB)
    assert memory.reserved == 40 * MIB, "merged again"
    for each in free:
        each()
    assert memory.allocated == (3 + 17 + 18) * MIB
    assert memory.peak == memory.allocated + 2 * MIB
    with pytest.raises(AssertionError, match="freed twice"):
        free[0]()


def test_a_tally_knows_views_and_ends() -> None:
    memory = CachingAllocator()
    before = torch.empty(4 * MIB, dtype=torch.uint8, device="meta")
    with Tally(memory) as tally:
        view = before[5:]
        assert memory.allocated == 0
        made = torch.zeros(MIB, device="meta")
        part = made.view(1024, -1)[3:]
        assert memory.allocated == tally.asked == 4 * MIB
        torch.zeros(8)
        torch.add(view, 1, out=before[5:])
        assert memory.allocated == 4 * MIB
        del made
        assert memory.allocated == 4 * MIB
        del part
    assert memory.allocated == 0 and memory.peak == 4 * MIB and tally.asked == 4 * MIB


@pytest.mark.gpu
def test_the_real_allocator_keeps_the_same_rules() -> None:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    if torch.cuda.memory_reserved():
        pytest.skip("memory that another test left alive is not known to the model")
    rng, memory = random.Random(0), CachingAllocator()
    alive: list[tuple[torch.Tensor, Callable[[], None]]] = []
    for _ in range(600):
        if len(alive) > 20 or (alive and rng.random() < 0.4):
            tensor, free = alive.pop(rng.randrange(len(alive)))
            del tensor
            free()
        else:
            size = rng.choice((300, 70_000, MIB, 3 * MIB, 9 * MIB, 17 * MIB, 90 * MIB))
            size = rng.randint(size // 2, size)
            tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
            alive.append((tensor, memory.allocate(size)))
            del tensor
        assert torch.cuda.memory_allocated() == memory.allocated
        assert torch.cuda.memory_reserved() == memory.reserved


def test_steps_of_all_sizes_take_what_the_largest_does() -> None:
    """Nothing of one step may lie in the way of the next: that would take a segment more."""
    made = plan(QWEN, 24, max_model_len=32768)
    sizes, memory = made.sizes, CachingAllocator()
    with Tally(memory):
        buffers = StepBuffers.create(sizes, num_words=upload_words(sizes), device=META)
    model = MODELS[QWEN.architecture](
        dataclasses.replace(QWEN, num_layers=1, layer_windows=QWEN.layer_windows[:1]),
        platform=GPUPlatform(META),
        dtype=sizes.dtype,
        max_model_len=1,
    )
    cache = kv_cache_spec(model.spec, block_size=sizes.block_size, dtype=made.cache_dtype)
    caches = model.backend.allocate(cache, num_blocks=1)

    def step(num_tokens: int, num_requests: int, max_query_len: int) -> None:
        attn = buffers.attention(
            num_tokens=num_tokens, num_requests=num_requests, max_query_len=max_query_len
        )
        ids, out = buffers.token_ids[:num_tokens], buffers.hidden[:num_tokens]
        with dropping(), Tally(memory):
            model.forward(ids, attn, caches, out=out)

    most = sizes.max_num_tokens
    step(most, sizes.max_num_seqs, most)
    largest, left = memory.reserved, memory.allocated
    source = random.Random(3)
    for _ in range(40):
        num_tokens = source.choice((source.randint(1, 256), source.randint(128, most), most))
        num_requests = source.randint(1, min(num_tokens, sizes.max_num_seqs))
        step(num_tokens, num_requests, num_tokens - num_requests + 1)
        assert memory.allocated == left, "a step's memory is given back with it"
    assert memory.reserved <= largest + 4 * MIB
