"""Joins both wings: a configured `EngineCore` over a worker with a model. The only module of the
engine that knows the data plane; it runs in the engine process, or in the user's (`octavo.LLM`).
"""

from __future__ import annotations

from octavo.checkpoint.default_model import DEFAULT_MODEL_NAME
from octavo.checkpoint.source import resolve
from octavo.clock import MonotonicClock
from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.protocols import Executor
from octavo.kvcache.manager import KVCacheManager
from octavo.scheduler.scheduler import Scheduler
from octavo.types import EngineInfo


def build_engine(
    config: EngineConfig,
    *,
    use_fake_executor: bool = False,
    fake_device: tuple[float, float, float] | None = None,
) -> tuple[EngineCore, EngineInfo]:
    """Loads the model, sizes its cache and puts scheduler and executor together.

    Raises ValueError when the model or an option cannot be used. ``use_fake_executor``: a made-up
    model without torch, for tests of everything around it; ``fake_device``: microseconds that its
    steps take, and each row and each token in them.
    """
    executor, info = _fake(config, fake_device) if use_fake_executor else _worker(config)
    cache = KVCacheManager(
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        num_host_slots=info.num_host_slots,
        check_invariants=config.cache.check_kv_invariants,
    )
    scheduler = Scheduler(
        config.scheduler,
        kv=cache,
        max_model_len=info.max_model_len,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_drafts=info.max_drafts,
    )
    core = EngineCore(
        scheduler,
        executor,
        MonotonicClock(),
        max_inflight=2 if config.scheduler.async_scheduling else 1,
    )
    return core, info


def _worker(config: EngineConfig) -> tuple[Executor, EngineInfo]:
    # Lazy: torch and numba; the fake executor and the tests that use it do without.
    from octavo.worker.worker import build_worker

    return build_worker(config)


def _fake(
    config: EngineConfig, costs: tuple[float, float, float] | None
) -> tuple[Executor, EngineInfo]:
    from octavo.engine.fake import FakeDevice, FakeExecutor  # lazy: tests only

    # The default model is not fetched for this; 49152 is the size of its vocabulary.
    vocab_size = resolve(config.model).spec.vocab_size if config.model.model else 49152
    block_size = config.cache.block_size
    max_model_len = config.model.max_model_len or 2048
    info = EngineInfo(
        model=config.model.model or DEFAULT_MODEL_NAME,
        architecture="FakeForCausalLM",
        device="cpu",
        dtype="float32",
        kv_cache_dtype="float32",
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=config.cache.num_gpu_blocks_override or 4 * (max_model_len // block_size + 1),
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens or 512,
    )
    device = None
    if costs is not None:
        device = FakeDevice(step_us=costs[0], row_us=costs[1], token_us=costs[2])
    executor = FakeExecutor(vocab_size=info.vocab_size, block_size=block_size, device=device)
    return executor, info
