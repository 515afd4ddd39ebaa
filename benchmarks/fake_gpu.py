"""A GPU engine on a device that takes no time: what is left is the host's work. Knows no clock.

The scheduler, the loop, the runner, table, upload and sampler are the real ones. Kernels are
dropped where they would start, a captured graph does nothing, and every token is number 0; the
small copies between host and device happen. Weights and K/V cache are memory that nobody touches.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.model_shapes import CONFIGS
from octavo.checkpoint import ModelSpec, resolve
from octavo.clock import MonotonicClock
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.engine.core import EngineCore
from octavo.kvcache.manager import KVCacheManager
from octavo.models import Model
from octavo.models.registry import MODELS
from octavo.platforms.gpu import GPUPlatform
from octavo.scheduler.scheduler import Scheduler
from octavo.worker.gpu import scores, startup
from octavo.worker.gpu.executor import GpuExecutor
from octavo.worker.gpu.graphs import StepGraphs
from octavo.worker.gpu.runner import GpuRunner
from octavo.worker.gpu.runtime import Graph, HostRuntime
from octavo_kernels.launch import dropping
from octavo_kernels.sampling import TopLogprobs
from octavo_kernels.sampling.gpu import topn_logprobs

_GPU_BYTES = 80 << 30
_LLAMA_3_2_1B = {
    **CONFIGS["8B"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
SHAPES = {**CONFIGS, "1B": _LLAMA_3_2_1B}


class _EmptyGraph:
    def replay(self) -> None:
        return


class FakeRuntime(HostRuntime):
    """`Runtime` of a device that is done at once."""

    def capture(self, work: Callable[[], None]) -> Graph:
        return _EmptyGraph()


@contextlib.contextmanager
def no_kernels() -> Iterator[None]:
    """Inside, ops launch nothing; the scores that nobody computed are zeros, which are finite."""

    def zeros(logits: Tensor, **options: Any) -> TopLogprobs:
        found = topn_logprobs(logits, **options)
        for name in TopLogprobs.__slots__:
            getattr(found, name).zero_()
        return found

    with dropping(), patch.object(scores, "topn_logprobs", zeros):
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeEngine:
    """An engine and its parts; to be used inside `no_kernels`."""

    core: EngineCore
    runner: GpuRunner
    graphs: StepGraphs
    model: Model


def spec_of(shape: str, folder: Path) -> ModelSpec:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]))
    return resolve(ModelConfig(model=str(folder), load_format="dummy")).spec


def empty_model(spec: ModelSpec, *, max_model_len: int) -> Model:
    """Weights of no value, in memory that is never touched."""
    return MODELS[spec.architecture](
        spec, platform=GPUPlatform("cpu"), dtype=torch.bfloat16, max_model_len=max_model_len
    )


def fake_engine(
    spec: ModelSpec, *, max_model_len: int, num_blocks: int, **scheduler: Any
) -> FakeEngine:
    """An engine of that model, all graphs captured. Call it inside `no_kernels`."""
    config = EngineConfig(
        model=ModelConfig(model=spec.architecture, max_model_len=max_model_len),
        cache=CacheConfig(num_gpu_blocks_override=num_blocks),
        scheduler=SchedulerConfig(**scheduler),
    )
    device = startup.GpuDevice(
        runtime=FakeRuntime(), name="none", total_bytes=_GPU_BYTES, free_bytes=_GPU_BYTES
    )
    plan = startup.make_plan(config, spec=spec, device=device)
    sizes = plan.memory.sizes
    model = empty_model(spec, max_model_len=sizes.max_model_len)
    runner, graphs = startup.make_runner(config, model=model, plan=plan, device=device)
    cache = config.cache
    core = EngineCore(
        Scheduler(
            config.scheduler,
            kv=KVCacheManager(sizes.num_blocks, block_size=cache.block_size),
            max_model_len=sizes.max_model_len,
            max_num_batched_tokens=sizes.max_num_tokens,
            max_drafts=sizes.max_drafts,
        ),
        GpuExecutor(runner),
        MonotonicClock(),
        max_inflight=2,
    )
    while core.use_idle_time():
        pass
    return FakeEngine(core=core, runner=runner, graphs=graphs, model=model)
