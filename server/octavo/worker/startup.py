"""The steps of starting a worker, one function each. Knows every room of the data plane."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from octavo.checkpoint import ModelFiles, ModelSpec
from octavo.config import EngineConfig, SpeculativeConfig
from octavo.models import Model, TooLarge, kv_cache_spec, kv_dtype, load_model, weight_dtype
from octavo.platforms.cpu import CPUPlatform
from octavo.platforms.quantization import Quantization, choose, listed
from octavo.sampling import Sampler
from octavo.speculative import MAX_REQUESTS, make_drafter
from octavo.types import NewRequest, SamplingParams, SchedulerOutput
from octavo.worker.drafting.startup import Drafting, LoadedDraftModel, LoadedHead
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
from octavo_kernels.quant_matmul import blocks
from octavo_kernels.quant_matmul.blocks import Kind

_log = logging.getLogger(__name__)

_WARM_TOKENS = (1, 2, 40)  # lengths of the made-up prompts that warm the kernels


def set_threads(wanted: int | None) -> int:
    """Sets the threads of kernels, and of torch while it loads; returns their number."""
    num_threads = wanted or usable_cores()
    parallel.set_num_threads(num_threads)
    torch.set_num_threads(num_threads)
    return num_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """In which numbers weights, K and V are kept."""

    quantization: Quantization  # of matrices
    dtype: torch.dtype  # of matrices that are not quantised
    cache_dtype: torch.dtype


def choose_precision(config: EngineConfig, *, files: ModelFiles) -> Precision:
    """As configured; ``auto`` by what the files hold. Raises ValueError for what cannot be."""
    quantization = choose(config.model, files=files)
    dtype = weight_dtype(config.model.dtype, device="cpu")
    cached = config.cache.kv_cache_dtype
    if cached != "auto":
        cache_dtype = kv_dtype(cached, device="cpu")
    else:
        cache_dtype = dtype if quantization.mode == "none" else torch.int8
    return Precision(quantization=quantization, dtype=dtype, cache_dtype=cache_dtype)


def kernels_compiled(precision: Precision) -> AbstractContextManager[None]:
    """While the block loads the model, other processes compile the kernels that were never used.

    On a machine's first start only; the end of the block waits for them.
    """
    return precompile.precompiled(
        weight_dtype=precision.dtype,
        cache_dtype=precision.cache_dtype,
        block_kinds=precision.quantization.kinds,
    )


def load(
    config: EngineConfig, *, files: ModelFiles, spec: ModelSpec, precision: Precision
) -> tuple[Model, tuple[Kind, ...]]:
    """The model with its weights, and the kinds of blocks that they are kept in.

    Raises ValueError for a context the model was not made for and for weights that do not fit the
    memory.
    """
    wanted = config.model.max_model_len
    if wanted is not None and wanted > spec.max_model_len and spec.rope.kind != "dynamic":
        raise ValueError(
            f"max_model_len must be at most {spec.max_model_len}, the context that {files.name} "
            f"was made for, got {wanted}"
        )
    platform = CPUPlatform(precision.quantization)
    try:
        model = load_model(
            files,
            spec,
            platform=platform,
            dtype=precision.dtype,
            seed=config.model.seed % 2**63,
            max_model_len=wanted,
            most_bytes=available_memory(),
        )
    except TooLarge as error:
        modes = " or ".join(f"--quantization {mode}" for mode in precision.quantization.smaller)
        raise ValueError(f"{error}; less take {modes or 'smaller models'}") from None
    if platform.changed:
        _log.warning(
            "%d of %d matrices cannot be kept as the file has them and become q8_0: %s",
            len(platform.changed),
            len(files.weight_types),
            listed(platform.changed),
        )
    return model, platform.block_kinds


def quantization_label(precision: Precision, kinds: Sequence[str]) -> str:
    """For people: ``none``, or the mode and the kinds of blocks."""
    mode = precision.quantization.mode
    return f"{mode} ({', '.join(sorted(kinds))})" if kinds else mode


def make_runner(
    config: EngineConfig,
    *,
    model: Model,
    cache_dtype: torch.dtype,
    drafting: LoadedHead | LoadedDraftModel | None = None,
) -> tuple[CachePlan, ModelRunner]:
    """Sizes and reserves the cache, and puts table, sampler and models together."""
    block_size, max_num_seqs = config.cache.block_size, config.scheduler.max_num_seqs
    cache_spec = kv_cache_spec(model.spec, block_size=block_size, dtype=cache_dtype)
    block_bytes, available_bytes = model.backend.block_bytes(cache_spec), available_memory()
    num_host_slots = plan_host_slots(
        config.cache, block_bytes=block_bytes, available_bytes=available_bytes
    )
    draft_spec, draft_bytes = None, 0
    if drafting is not None:
        draft_spec = drafting.kv_spec(block_size=block_size, dtype=cache_dtype)
        draft_bytes = model.backend.block_bytes(draft_spec)
    plan = plan_cache(
        config.cache,
        block_bytes=block_bytes + draft_bytes,
        wanted_len=config.model.max_model_len,
        model_len=model.spec.max_model_len,
        max_num_seqs=max_num_seqs,
        available_bytes=available_bytes - num_host_slots * block_bytes,
    )
    plan = replace(plan, num_host_slots=num_host_slots)
    kv = KVTensors(model.backend, cache_spec, num_blocks=plan.num_blocks)
    table = RequestTable(
        max_num_seqs=max_num_seqs, max_model_len=plan.max_model_len, block_size=block_size
    )
    max_num_tokens = max_num_batched_tokens(
        config.scheduler.max_num_batched_tokens, max_num_seqs=max_num_seqs
    )
    attached: Drafting | None = None
    if drafting is not None and draft_spec is not None:
        attached = drafting.attach(
            table,
            kv_caches=model.backend.allocate(draft_spec, num_blocks=plan.num_blocks),
            max_num_tokens=max_num_tokens,
        )
    runner = ModelRunner(
        model,
        table=table,
        kv=kv,
        sampler=Sampler(model.spec.vocab_size),
        transfer=(
            CPUTransfer(kv.layers, num_slots=num_host_slots) if num_host_slots else NoTransfer()
        ),
        max_num_tokens=max_num_tokens,
        drafter=make_drafter(
            SpeculativeConfig.from_json(config.scheduler.speculative_config),
            model=None if attached is None else attached.proposer,
            most_requests=MAX_REQUESTS if attached is None else attached.most_requests,
        ),
        watcher=None if attached is None else attached.watcher,
        taps=None if attached is None else attached.taps,
    )
    return plan, runner


def warm(
    runner: ModelRunner, *, plan: CachePlan, block_size: int, block_kinds: Sequence[Kind] = ()
) -> None:
    """Runs made-up requests, so that no live request waits for a compiler.

    block_kinds: what the model's matrices are made of; some of their kernels serve long steps only.
    The requests write K/V into the first blocks, which count as never written afterwards.
    """
    # All that torch does from here on is to copy rows. Its own threads would spin on the cores
    # that the kernels' threads compute on (measured: a 150 KB copy took 7 ms instead of 0.02).
    torch.set_num_threads(1)
    sampling.warm()
    block_copy.warm()
    for kind in block_kinds:
        blocks.warm(kind)
    runner.warm_drafting()
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
