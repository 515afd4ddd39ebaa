"""The steps of starting a worker on a GPU, one function each. Knows every room of the data plane.

The engine is ready once steps can be launched kernel by kernel; graphs come while it serves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from octavo.checkpoint import ModelFiles, ModelSpec
from octavo.config import EngineConfig
from octavo.models import Model, kv_cache_spec, kv_dtype, load_model, weight_dtype
from octavo.platforms.gpu import GPUPlatform, model_shape
from octavo.types import BlockCopy, NewRequest, SamplingParams, SchedulerOutput
from octavo.worker.gpu.arena import RequestArena, request_columns
from octavo.worker.gpu.buffers import StepBuffers, StepSizes
from octavo.worker.gpu.draft_planner import AutoPlanner, FixedPlanner, Speculation
from octavo.worker.gpu.graphs import ForwardKey, GraphSizes, SamplingKey, StepGraphs
from octavo.worker.gpu.kv_transfer import GpuTransfer
from octavo.worker.gpu.lookup import PromptLookup, speculation_of
from octavo.worker.gpu.memory_plan import MemoryPlan, plan_gpu_memory
from octavo.worker.gpu.prefix_sharing import PrefixSharing, min_saved_partitions
from octavo.worker.gpu.runner import GpuRunner
from octavo.worker.gpu.runtime import CudaRuntime, HostRuntime, Runtime
from octavo.worker.gpu.sampler import GpuSampler
from octavo.worker.gpu.scores import PromptScorer
from octavo.worker.gpu.table import GpuRequestTable
from octavo.worker.gpu.upload import Upload, upload_words
from octavo.worker.kv_tensors import KVTensors
from octavo.worker.kv_transfer import NO_TRANSFER, KVTransfer, plan_host_slots
from octavo.worker.sizing import CachePlan, available_memory, usable_cores
from octavo_kernels.matmul import cublas
from octavo_kernels.warming import warm as warm_kernels

_log = logging.getLogger(__name__)

# Of the interpreter's engine, whose device memory is the host's: a cache for tests.
_INTERPRETED_BYTES = 8 << 30
_INTERPRETED_CACHE_BYTES = 32 << 20
_CUBLAS_ROWS = 65  # fewer are never given to cuBLAS
_MOST_LOADERS = 16  # threads; more wait for the disk or the GPU
_WARM_LENGTH = 20  # tokens of the made-up request


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDevice:
    """The device that was started."""

    runtime: Runtime
    name: str  # for people
    total_bytes: int
    free_bytes: int
    is_interpreted: bool = False  # the host's memory and processor stand in for the GPU's


def set_threads(wanted: int | None) -> None:
    """Sets the threads that load the model; steps need none."""
    torch.set_num_threads(wanted or min(usable_cores(), _MOST_LOADERS))


def start_device(*, is_interpreted: bool) -> GpuDevice:
    """Makes the CUDA context, or the interpreter's stand-in."""
    if is_interpreted:
        return GpuDevice(
            runtime=HostRuntime(),
            name="CPU, in Triton's interpreter",
            total_bytes=_INTERPRETED_BYTES,
            free_bytes=_INTERPRETED_BYTES,
            is_interpreted=True,
        )
    torch.cuda.set_device(torch.cuda.current_device())  # makes its context
    if torch.cuda.memory_reserved():
        # Of an engine that this process had before: its parts know each other, and torch keeps
        # what they give back.
        gc.collect()
        torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return GpuDevice(
        runtime=CudaRuntime(),
        name=torch.cuda.get_device_name(),
        total_bytes=total,
        free_bytes=free,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was decided before anything is allocated."""

    memory: MemoryPlan
    graphs: GraphSizes
    num_host_slots: int

    @property
    def cache(self) -> CachePlan:
        return dataclasses.replace(self.memory.cache, num_host_slots=self.num_host_slots)


def make_plan(config: EngineConfig, *, spec: ModelSpec, device: GpuDevice) -> Plan:
    """Where every byte of the GPU goes. Raises ValueError if there are too few."""
    if device.is_interpreted:
        config = _interpreted(config)
    memory = plan_gpu_memory(spec, config, total_bytes=device.total_bytes)
    memory.check_free(device.free_bytes)
    most = memory.sizes.max_num_tokens
    if too_large := [n for n in config.scheduler.cudagraph_capture_sizes if n > most]:
        _log.warning("no graphs of %s tokens: a step has at most %d", sorted(too_large), most)
    return Plan(
        memory=memory,
        graphs=GraphSizes.configured(config.scheduler, max_num_tokens=most),
        num_host_slots=plan_host_slots(
            config.cache, block_bytes=memory.block_bytes, available_bytes=available_memory()
        ),
    )


def _interpreted(config: EngineConfig) -> EngineConfig:
    """A cache of a size for tests, and graphs only if asked for: they save nothing there, and
    padding takes its time."""
    cache, scheduler = config.cache, config.scheduler
    if cache.num_gpu_blocks_override is None and cache.kv_cache_memory_bytes is None:
        cache = dataclasses.replace(cache, kv_cache_memory_bytes=_INTERPRETED_CACHE_BYTES)
    if not scheduler.cudagraph_capture_sizes:
        scheduler = dataclasses.replace(scheduler, enforce_eager=True)
    return dataclasses.replace(config, cache=cache, scheduler=scheduler)


@contextlib.contextmanager
def kernels_warm(config: EngineConfig, *, spec: ModelSpec, device: GpuDevice) -> Iterator[None]:
    """While the block plans and loads, kernels are compiled, or found compiled, and loaded.

    The end of the block waits for them and raises what went wrong. An exception in the block does
    not wait: what is still compiling ends with the process.
    """
    if device.is_interpreted:
        yield
        return
    weights, cached = config.model.dtype, config.cache.kv_cache_dtype
    shape = model_shape(
        spec,
        dtype=weight_dtype(weights, device="cuda"),
        cache_dtype=kv_dtype(weights if cached == "auto" else cached, device="cuda"),
        block_size=config.cache.block_size,
    )
    failures: list[BaseException] = []

    def work() -> None:
        try:
            warm_kernels(shape)
        except BaseException as error:  # raised where it is waited for
            failures.append(error)

    thread = threading.Thread(target=work, name="octavo-kernels", daemon=True)
    thread.start()
    yield
    thread.join()
    if failures:
        raise failures[0]


def load(config: EngineConfig, *, files: ModelFiles, plan: Plan, device: GpuDevice) -> Model:
    """The model with its weights, on the device."""
    return load_model(
        files,
        files.spec,
        platform=GPUPlatform(device.runtime.device),
        dtype=plan.memory.sizes.dtype,
        seed=config.model.seed % 2**63,
        max_model_len=plan.memory.sizes.max_model_len,
    )


def prove_products(model: Model, *, plan: Plan) -> None:
    """Lets cuBLAS have the products whose bits are proven: of graphs, and of a full step."""
    platform = model.platform
    assert isinstance(platform, GPUPlatform)
    if not cublas.is_held() or platform.device.type != "cuda":
        return
    rows = {*plan.graphs.decode, *plan.graphs.mixed, plan.memory.sizes.max_num_tokens}
    if differing := platform.prove(sorted(n for n in rows if n >= _CUBLAS_ROWS)):
        _log.info("cuBLAS gives other bits for %d products, which it does not get", len(differing))
    torch.cuda.empty_cache()  # the cache of K/V comes next, as one piece per layer


def make_runner(
    config: EngineConfig, *, model: Model, plan: Plan, device: GpuDevice
) -> tuple[GpuRunner, StepGraphs]:
    """Allocates everything that stays, and puts it together."""
    sizes, runtime = plan.memory.sizes, device.runtime
    arena = RequestArena(request_columns(sizes), num_rows=sizes.max_num_seqs, device=runtime.device)
    sampler = GpuSampler(
        arena, sizes=sizes, runtime=runtime, max_logprobs=config.model.max_logprobs
    )
    buffers = StepBuffers.create(sizes, num_words=upload_words(sizes), device=runtime.device)
    graphs = StepGraphs(runtime, sizes=plan.graphs, buffers=buffers)
    table = GpuRequestTable(sizes=sizes, params=sampler)
    cache = kv_cache_spec(model.spec, block_size=sizes.block_size, dtype=plan.memory.cache_dtype)
    kv = KVTensors(model.backend, cache, num_blocks=sizes.num_blocks)
    transfer: KVTransfer = NO_TRANSFER
    if plan.num_host_slots:
        transfer = GpuTransfer(kv.layers, num_slots=plan.num_host_slots, runtime=runtime)
    runner = GpuRunner(
        model,
        runtime=runtime,
        buffers=buffers,
        arena=arena,
        upload=Upload(runtime, sizes=sizes, words=buffers.words, arena=arena),
        table=table,
        sampler=sampler,
        scorer=PromptScorer(arena.view("token_ids"), logits=buffers.logits, runtime=runtime),
        kv=kv,
        graphs=graphs,
        transfer=transfer,
        prefixes=PrefixSharing(
            arena, table=table, sizes=sizes, min_saved=min_saved_partitions(cache)
        ),
        speculation=_make_speculation(config, arena=arena, plan=plan),
    )
    return runner, graphs


def _make_speculation(
    config: EngineConfig, *, arena: RequestArena, plan: Plan
) -> Speculation | None:
    """As configured; None: no drafts."""
    speculation, sizes = speculation_of(config.scheduler), plan.memory.sizes
    if not sizes.max_drafts:
        return None
    lookup = PromptLookup(
        arena,
        min_length=speculation.prompt_lookup_min,
        max_length=speculation.prompt_lookup_max,
    )
    if speculation.method == "ngram":
        fixed = FixedPlanner(sizes.max_drafts, max_samples=sizes.max_samples)
        return Speculation(lookup, fixed)
    planner = AutoPlanner(
        sizes.max_drafts, max_samples=sizes.max_samples, step_sizes=plan.graphs.drafting
    )
    return Speculation(lookup, planner)


@torch.inference_mode()
def warm(runner: GpuRunner, graphs: StepGraphs, *, plan: Plan, device: GpuDevice) -> None:
    """Runs the largest step, so that its memory is taken while nobody waits, and a request that
    uses all there is. What it writes to the cache's first blocks is never read.
    """
    sizes = plan.memory.sizes
    torch.set_num_threads(1)  # what torch still does on the CPU is too small to share
    graphs.mark_ready()
    if device.is_interpreted:
        return
    graphs.run_blank(ForwardKey(sizes.max_num_tokens, is_decode=False))
    graphs.run_blank(SamplingKey(sizes.max_num_seqs))
    _run_made_up_request(runner, sizes)
    graphs.mark_ready()


def _run_made_up_request(runner: GpuRunner, sizes: StepSizes) -> None:
    """Its prompt and a token after it, with parameters of all kinds; then a copy of a block."""
    room = min(sizes.max_model_len, sizes.num_blocks * sizes.block_size)
    length = min(_WARM_LENGTH, room - 2, sizes.max_num_tokens)
    if length < 1:
        return
    blocks = range(-(-(length + 2) // sizes.block_size))
    request = NewRequest(
        request_id="warm",
        token_ids=(0,) * length,
        num_prompt_tokens=length,
        num_computed_tokens=0,
        block_ids=tuple(blocks),
        params=SamplingParams(
            top_p=0.9,
            min_p=0.01,
            repetition_penalty=1.1,
            logit_bias=((0, 1.0),),
            logprobs=0,
            prompt_logprobs=0,
        ),
    )
    for step in (
        SchedulerOutput(step=0, new_requests=(request,), num_scheduled_tokens={"warm": length}),
        SchedulerOutput(step=1, num_scheduled_tokens={"warm": 1}),
        # The first copy of blocks waits for the GPU, which is told where the caches are.
        SchedulerOutput(
            step=2, finished_request_ids=("warm",), block_copies=(BlockCopy(src=0, dst=0),)
        ),
    ):
        output = runner.finish(runner.launch(step))
        assert not output.errors, output.errors
