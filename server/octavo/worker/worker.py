"""Builds the worker of one engine and tells how long each phase took. Knows the order of start-up.

Everything that takes time to import is imported inside `build_worker`, so that it is a phase.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from octavo.config import EngineConfig, SpeculativeConfig
from octavo.types import EngineInfo

if TYPE_CHECKING:
    import torch

    from octavo.checkpoint import ModelFiles
    from octavo.engine.protocols import Executor
    from octavo.worker.sizing import CachePlan

_log = logging.getLogger(__name__)


class _Phases:
    """Seconds between marks."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now


def build_worker(config: EngineConfig) -> tuple[Executor, EngineInfo]:
    """Finds and loads the model, sizes its cache and warms every kernel that serving calls.

    On a CPU the executor runs in a thread of its own when scheduling overlaps
    (``async_scheduling``). Raises ValueError when the model or an option cannot be used.
    """
    phases = _Phases()
    # Lazy: torch takes a second, which is a phase of its own.
    from octavo.worker.devices import DeviceKind, choose_device

    kind = choose_device(config.model.device)
    if kind is DeviceKind.CPU:
        return _on_cpu(config, phases)
    return _on_gpu(config, phases, is_interpreted=kind is DeviceKind.INTERPRETED)


def _on_cpu(config: EngineConfig, phases: _Phases) -> tuple[Executor, EngineInfo]:
    from octavo.checkpoint import resolve
    from octavo.worker import startup
    from octavo.worker.drafting.startup import load_drafting
    from octavo.worker.executor import InlineExecutor, ThreadExecutor
    from octavo.worker.sizing import max_num_batched_tokens

    phases.end("import")
    num_threads = startup.set_threads(config.model.num_threads)
    files = resolve(config.model)  # first: a wrong model must be told at once
    phases.end("resolve")
    precision = startup.choose_precision(config, files=files)
    with startup.kernels_compiled(precision):
        model, kinds = startup.load(config, files=files, spec=files.spec, precision=precision)
        drafting = load_drafting(
            config,
            files=files,
            target=model,
            quantization=precision.quantization,
            dtype=precision.dtype,
        )
        phases.end("load")
        plan, runner = startup.make_runner(
            config, model=model, cache_dtype=precision.cache_dtype, drafting=drafting
        )
        phases.end("cache")
    startup.warm(runner, plan=plan, block_size=config.cache.block_size, block_kinds=kinds)
    phases.end("warm")
    scheduler = config.scheduler
    speculative = SpeculativeConfig.from_json(scheduler.speculative_config)
    info = _info(
        config,
        files=files,
        plan=plan,
        device="cpu",
        dtypes=(precision.dtype, precision.cache_dtype),
        quantization=startup.quantization_label(precision, kinds),
        max_num_batched_tokens=max_num_batched_tokens(
            scheduler.max_num_batched_tokens, max_num_seqs=scheduler.max_num_seqs
        ),
        num_threads=num_threads,
        max_drafts=0 if speculative.method == "off" else speculative.num_speculative_tokens,
        speculation=(
            speculative.method if drafting is None else f"{speculative.method} with {drafting.name}"
        ),
        phases=phases,
    )
    return (ThreadExecutor if scheduler.async_scheduling else InlineExecutor)(runner), info


def _on_gpu(
    config: EngineConfig, phases: _Phases, *, is_interpreted: bool
) -> tuple[Executor, EngineInfo]:
    from octavo.checkpoint import resolve
    from octavo.worker.gpu import startup
    from octavo.worker.gpu.executor import GpuExecutor
    from octavo.worker.gpu.lookup import speculation_of

    phases.end("import")
    files = resolve(config.model)
    phases.end("resolve")
    startup.set_threads(config.model.num_threads)
    device = startup.start_device(is_interpreted=is_interpreted)
    phases.end("device")
    with startup.kernels_warm(config, spec=files.spec, device=device):
        plan = startup.make_plan(config, spec=files.spec, device=device)
        phases.end("plan")
        model = startup.load(config, files=files, plan=plan, device=device)
        phases.end("load")
    phases.end("kernels")
    startup.prove_products(model, plan=plan)
    phases.end("prove")
    runner, graphs = startup.make_runner(config, model=model, plan=plan, device=device)
    phases.end("cache")
    startup.warm(runner, graphs, plan=plan, device=device)
    phases.end("warm")
    info = _info(
        config,
        files=files,
        plan=plan.cache,
        device=device.name,
        dtypes=(plan.memory.sizes.dtype, plan.memory.cache_dtype),
        max_num_batched_tokens=plan.memory.sizes.max_num_tokens,
        max_drafts=plan.memory.sizes.max_drafts,
        speculation=speculation_of(config.scheduler).method,
        phases=phases,
    )
    return GpuExecutor(runner), info


def _info(
    config: EngineConfig,
    *,
    files: ModelFiles,
    plan: CachePlan,
    device: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    max_num_batched_tokens: int,
    phases: _Phases,
    quantization: str = "none",
    num_threads: int = 0,
    max_drafts: int,
    speculation: str,
) -> EngineInfo:
    """What was decided, for the front end and for whoever reads the start-up lines.

    ``dtypes``: of the weights that are not quantised, and of cached K and V.
    """
    for note in plan.notes:
        _log.warning("%s", note)
    dtype, cache_dtype = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return EngineInfo(
        model=files.name,
        architecture=files.spec.architecture,
        device=device,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=cache_dtype,
        vocab_size=files.spec.vocab_size,
        max_model_len=plan.max_model_len,
        block_size=config.cache.block_size,
        num_blocks=plan.num_blocks,
        num_host_slots=plan.num_host_slots,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_threads=num_threads,
        max_drafts=max_drafts,
        speculation=speculation,
        eos_token_ids=files.spec.eos_token_ids,
        phases=phases.seconds,
    )
