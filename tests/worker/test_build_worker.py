"""Start-up: from an `EngineConfig` to an executor that answers, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.types import NewRequest, SamplingParams, SchedulerOutput
from octavo.worker import startup
from octavo.worker.executor import InlineExecutor, ThreadExecutor
from octavo.worker.worker import build_worker
from octavo_kernels import parallel


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A worker owns its process; this one has other tests to run."""
    before = parallel.num_threads(), torch.get_num_threads()
    yield
    parallel.set_num_threads(before[0])
    torch.set_num_threads(before[1])


def config(folder: Path, **model: Any) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model=str(folder), load_format="dummy", num_threads=2, **model),
        cache=CacheConfig(num_gpu_blocks_override=20),
        scheduler=SchedulerConfig(max_num_seqs=4),
    )


@pytest.mark.parametrize("is_threaded", [True, False])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_a_built_worker_answers(model_folder: Path, dtype: str, is_threaded: bool) -> None:
    wanted = dataclasses.replace(
        config(model_folder, dtype=dtype),
        scheduler=SchedulerConfig(max_num_seqs=4, async_scheduling=is_threaded),
    )
    executor, info = build_worker(wanted)
    assert isinstance(executor, ThreadExecutor if is_threaded else InlineExecutor)
    request = NewRequest(
        request_id="a",
        token_ids=(5, 6, 7),
        num_prompt_tokens=3,
        num_computed_tokens=0,
        block_ids=(0,),
        params=SamplingParams(temperature=0.0),
    )
    executor.submit(SchedulerOutput(step=0, new_requests=(request,), num_scheduled_tokens={"a": 3}))
    output = executor.collect()
    executor.close()
    assert not output.errors and len(output.sampled_token_ids["a"]) == 1
    assert (info.num_blocks, info.max_model_len, info.block_size) == (20, 256, 16)
    assert (info.max_num_seqs, info.max_num_batched_tokens) == (4, 256)
    assert (info.architecture, info.vocab_size) == ("LlamaForCausalLM", 300)
    if dtype == "auto":
        assert (info.quantization, info.dtype) == ("int8 (q8_64)", "float32")
        assert info.kv_cache_dtype == "int8"
    else:
        assert (info.quantization, info.dtype, info.kv_cache_dtype) == ("none", dtype, dtype)
    assert (info.device, info.num_threads, parallel.num_threads()) == ("cpu", 2, 2)
    assert list(info.phases) == ["import", "resolve", "load", "cache", "warm"]
    assert info.eos_token_ids == (1,)


@pytest.mark.parametrize(
    ("quantization", "cached", "told", "kept"),
    [
        ("none", "auto", "none", "float32"),
        ("int8", "auto", "int8 (q8_64)", "int8"),
        ("int4", "auto", "int4 (q4_1, q8_0)", "int8"),
        ("int4", "float32", "int4 (q4_1, q8_0)", "float32"),
        ("int8", "float16", "int8 (q8_64)", "float16"),
    ],
)
def test_quantisation_is_told(
    model_folder: Path, quantization: str, cached: Any, told: str, kept: str
) -> None:
    wanted = dataclasses.replace(
        config(model_folder, quantization=quantization),
        cache=CacheConfig(num_gpu_blocks_override=20, kv_cache_dtype=cached),
    )
    executor, info = build_worker(wanted)
    executor.close()
    assert (info.quantization, info.dtype, info.kv_cache_dtype) == (told, "float32", kept)


def test_equal_seeds_make_equal_random_models(model_folder: Path) -> None:
    drawn = []
    for seed in (1, 1, 2):
        executor, _ = build_worker(config(model_folder, seed=seed))
        request = NewRequest(
            request_id="a",
            token_ids=tuple(range(40)),
            num_prompt_tokens=40,
            num_computed_tokens=0,
            block_ids=(0, 1, 2),
            params=SamplingParams(temperature=0.0, logprobs=0),
        )
        step = SchedulerOutput(step=0, new_requests=(request,), num_scheduled_tokens={"a": 40})
        executor.submit(step)
        drawn.append(executor.collect().logprobs)
        executor.close()
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_context_beyond_the_models_is_refused(model_folder: Path) -> None:
    with pytest.raises(ValueError, match="max_model_len must be at most 256, .* got 257"):
        build_worker(config(model_folder, max_model_len=257))


def test_a_cache_too_small_for_the_wanted_context_is_refused(model_folder: Path) -> None:
    small = dataclasses.replace(
        config(model_folder, max_model_len=200), cache=CacheConfig(num_gpu_blocks_override=3)
    )
    with pytest.raises(ValueError, match="max_model_len is 200 tokens, which take 13 K/V blocks"):
        build_worker(small)
    fitted = dataclasses.replace(config(model_folder), cache=CacheConfig(num_gpu_blocks_override=3))
    executor, info = build_worker(fitted)
    executor.close()
    assert info.max_model_len == 48


def test_a_device_that_is_not_there_is_refused(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("it is there")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="device cuda cannot be used: torch finds no CUDA device"):
        build_worker(config(model_folder, device="cuda"))


@pytest.mark.parametrize(
    ("quantization", "smaller"),
    [
        ("none", "--quantization int8 or --quantization int4"),
        ("int8", "--quantization int4"),
        ("int4", "smaller models"),
    ],
)
def test_weights_that_do_not_fit_the_memory_are_refused_before_they_are_read(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, quantization: str, smaller: str
) -> None:
    monkeypatch.setattr(startup, "available_memory", lambda: 10_000)
    with pytest.raises(ValueError, match="more than the 0.00 GiB of memory") as raised:
        build_worker(config(model_folder, quantization=quantization))
    assert str(raised.value).endswith(f"less take {smaller}")
