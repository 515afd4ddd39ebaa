"""The steps of starting a worker, one function each. Knows every room of the data plane."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from octavo.checkpoint import ModelFiles, ModelSpec
from octavo.config import EngineConfig
from octavo.models import Model, kv_cache_spec, load_model, weight_dtype
from octavo.platforms.cpu import CPUPlatform
from octavo.sampling import Sampler
from octavo.types import NewRequest, SamplingParams, SchedulerOutput
from octavo.worker.kv_tensors import KVTensors
from octavo.worker.kv_transfer import CPUTransfer, NoTransfer, plan_host_slots
from octavo.worker.model_runner import ModelRunner
from octavo.worker.request_table import RequestTable
from octavo.worker.sizing import (
    CachePlan,
    available_memory,
    max_num_batched_tokens,
    plan_cache,
    usable_cores,
)
from octavo_kernels import block_copy, parallel, precompile, sampling

_WARM_TOKENS = (1, 2, 40)  # lengths of the made-up prompts that warm the kernels


def set_threads(wanted: int | None) -> int:
    """Sets the threads of kernels, and of torch while it loads; returns their number."""
    num_threads = wanted or usable_cores()
    parallel.set_num_threads(num_threads)
    torch.set_num_threads(num_threads)
    return num_threads


def kernels_compiled(config: EngineConfig) -> AbstractContextManager[None]:
    """While the block loads the model, other processes compile the kernels that were never used.

    On a machine's first start only; the end of the block waits for them.
    """
    weights, cached = dtypes(config)
    return precompile.precompiled(weight_dtype=weights, cache_dtype=cached)


def load(config: EngineConfig, *, files: ModelFiles, spec: ModelSpec) -> Model:
    """The model with its weights. Raises ValueError for a context the model was not made for."""
    wanted = config.model.max_model_len
    if wanted is not None and wanted > spec.max_model_len and spec.rope.kind != "dynamic":
        raise ValueError(
            f"max_model_len must be at most {spec.max_model_len}, the context that {files.name} "
            f"was made for, got {wanted}"
        )
    return load_model(
        files,
        spec,
        platform=CPUPlatform(),
        dtype=dtypes(config)[0],
        seed=config.model.seed % 2**63,
        max_model_len=wanted,
    )


def dtypes(config: EngineConfig) -> tuple[torch.dtype, torch.dtype]:
    """Of the weights, and of cached K and V."""
    weights, cached = config.model.dtype, config.cache.kv_cache_dtype
    names = (weights, weights if cached == "auto" else cached)
    plain, cache = (weight_dtype(name, device="cpu") for name in names)
    if config.model.quantization == "none":
        return plain, cache
    if plain != torch.float32:
        raise ValueError(
            f"quantization {config.model.quantization} takes dtype auto or float32, got {weights}"
        )
    return torch.int8, cache


def make_runner(config: EngineConfig, *, model: Model) -> tuple[CachePlan, ModelRunner]:
    """Sizes and reserves the cache, and puts table, sampler and model together."""
    block_size, max_num_seqs = config.cache.block_size, config.scheduler.max_num_seqs
    cache_spec = kv_cache_spec(model.spec, block_size=block_size, dtype=dtypes(config)[1])
    block_bytes, available_bytes = model.backend.block_bytes(cache_spec), available_memory()
    num_host_slots = plan_host_slots(
        config.cache, block_bytes=block_bytes, available_bytes=available_bytes
    )
    plan = plan_cache(
        config.cache,
        block_bytes=block_bytes,
        wanted_len=config.model.max_model_len,
        model_len=model.spec.max_model_len,
        max_num_seqs=max_num_seqs,
        available_bytes=available_bytes - num_host_slots * block_bytes,
    )
    plan = replace(plan, num_host_slots=num_host_slots)
    kv = KVTensors(model.backend, cache_spec, num_blocks=plan.num_blocks)
    runner = ModelRunner(
        model,
        table=RequestTable(
            max_num_seqs=max_num_seqs, max_model_len=plan.max_model_len, block_size=block_size
        ),
        kv=kv,
        sampler=Sampler(model.spec.vocab_size),
        transfer=(
            CPUTransfer(kv.layers, num_slots=num_host_slots) if num_host_slots else NoTransfer()
        ),
        max_num_tokens=max_num_batched_tokens(
            config.scheduler.max_num_batched_tokens, max_num_seqs=max_num_seqs
        ),
    )
    return plan, runner


def warm(runner: ModelRunner, *, plan: CachePlan, block_size: int) -> None:
    """Runs made-up requests, so that no live request waits for a compiler.

    They write K/V into the first blocks, which count as never written afterwards.
    """
    # All that torch does from here on is to copy rows. Its own threads would spin on the cores
    # that the kernels' threads compute on (measured: a 150 KB copy took 7 ms instead of 0.02).
    torch.set_num_threads(1)
    sampling.warm()
    block_copy.warm()
    room = min(plan.max_model_len, plan.num_blocks * block_size) - 1
    for step, length in enumerate(_WARM_TOKENS):
        if length > room:
            break
        request = NewRequest(
            request_id="warm",
            token_ids=(0,) * length,
            num_prompt_tokens=length,
            num_computed_tokens=0,
            block_ids=tuple(range(-(-(length + 1) // block_size))),
            params=SamplingParams(top_p=0.9, min_p=0.01, repetition_penalty=1.1, logprobs=1),
        )
        runner.execute(
            SchedulerOutput(
                step=step, new_requests=(request,), num_scheduled_tokens={"warm": length}
            )
        )
        runner.execute(SchedulerOutput(step=step, num_scheduled_tokens={"warm": 1}))
    runner.execute(SchedulerOutput(step=0, finished_request_ids=("warm",)))
