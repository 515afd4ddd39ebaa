"""The GPU's runner around a tiny model, on the GPU or in Triton's interpreter; weights as the
CPU's model has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.checkpoint import resolve
from octavo.config import ModelConfig
from octavo.models import Model, kv_cache_spec, load_model
from octavo.platforms.gpu import GPUPlatform
from octavo.worker.gpu import sampler, scores
from octavo.worker.gpu.arena import RequestArena, request_columns
from octavo.worker.gpu.buffers import StepBuffers, StepSizes
from octavo.worker.gpu.draft_planner import DraftPlanner, Speculation
from octavo.worker.gpu.graphs import GraphSizes, StepGraphs
from octavo.worker.gpu.lookup import PromptLookup
from octavo.worker.gpu.runner import GpuRunner
from octavo.worker.gpu.runtime import CudaRuntime, Graph, HostRuntime, Runtime
from octavo.worker.gpu.sampler import GpuSampler
from octavo.worker.gpu.scores import PromptScorer
from octavo.worker.gpu.table import GpuRequestTable
from octavo.worker.gpu.upload import Upload, upload_words
from octavo.worker.kv_tensors import KVTensors
from octavo_kernels import sampling
from octavo_kernels.sampling import TopLogprobs
from octavo_kernels.testing import gpu_device

DEVICE = gpu_device()
MAX_MODEL_LEN = 256


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A runner and what tests look into."""

    runner: GpuRunner
    buffers: StepBuffers
    arena: RequestArena
    table: GpuRequestTable
    graphs: StepGraphs
    kv: KVTensors


class ReplayingRuntime(CudaRuntime):
    """For models that no graph can hold: a graph is the work itself, done again."""

    def capture(self, work: Callable[[], None]) -> Graph:
        return HostRuntime().capture(work)


def make_runtime(*, can_capture: bool = True) -> Runtime:
    if DEVICE == "cpu":
        return HostRuntime()
    return CudaRuntime() if can_capture else ReplayingRuntime()


def fill_randomly(model: Model) -> None:
    """Weights larger than ``load_format=dummy`` has: every token matters to every logit."""
    generator = torch.Generator().manual_seed(11)
    for slot in model.slots().values():
        if slot.kind != "norm":
            slot.write(torch.empty(slot.shape).normal_(std=0.2, generator=generator), 0)


@pytest.fixture(scope="session")
def gpu_model(model_folder: object) -> Model:
    files = resolve(ModelConfig(model=str(model_folder), load_format="dummy"))
    platform = GPUPlatform(DEVICE)
    made = load_model(files, files.spec, platform=platform, dtype=torch.float32, seed=5)
    fill_randomly(made)
    return made


def make_sizes(model: Model, **changed: int) -> StepSizes:
    sizes = {
        "max_num_seqs": 8,
        "max_num_tokens": 64,
        "max_model_len": MAX_MODEL_LEN,
        "block_size": 16,
        "num_blocks": 64,
    } | changed
    return StepSizes(
        hidden_size=model.spec.hidden_size,
        vocab_size=model.spec.vocab_size,
        dtype=torch.float32,
        **sizes,
    )


@pytest.fixture
def make_engine(gpu_model: Model) -> Callable[..., Engine]:
    """(model, runtime, graph_sizes, num_words, sizes...) -> engine with NaN in every K/V slot."""

    def make(
        *,
        using: Model | None = None,
        runtime: Runtime | None = None,
        graph_sizes: GraphSizes | None = None,
        num_words: int | None = None,
        planner: DraftPlanner | None = None,
        **changed: int,
    ) -> Engine:
        model = using or gpu_model
        sizes = make_sizes(model, **changed)
        runtime = runtime or make_runtime()
        words = num_words or upload_words(sizes)
        buffers = StepBuffers.create(sizes, num_words=words, device=runtime.device)
        columns = request_columns(sizes)
        arena = RequestArena(columns, num_rows=sizes.max_num_seqs, device=runtime.device)
        sampler = GpuSampler(arena, sizes=sizes, runtime=runtime, max_logprobs=20)
        table = GpuRequestTable(sizes=sizes, params=sampler)
        graphs = StepGraphs(runtime, sizes=graph_sizes or GraphSizes(), buffers=buffers)
        spec = kv_cache_spec(model.spec, block_size=sizes.block_size, dtype=torch.float32)
        kv = KVTensors(model.backend, spec, num_blocks=sizes.num_blocks)
        for layer in kv.layers:
            layer.k.fill_(float("nan"))
            layer.v.fill_(float("nan"))
        lookup = PromptLookup(arena, min_length=2, max_length=5)
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
            speculation=planner and Speculation(lookup, planner),
        )
        return Engine(
            runner=runner, buffers=buffers, arena=arena, table=table, graphs=graphs, kv=kv
        )

    return make


@pytest.fixture
def quick_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are drawn and scored by the CPU's ops, which give the same for the same logits and
    need no interpreter."""

    def sample(
        logits: Tensor, *, workspace: Any, out: tuple[Tensor, Tensor], **columns: Any
    ) -> Any:
        on_cpu = {name: column.cpu() for name, column in columns.items()}
        for mine, found in zip(out, sampling.sample(logits.cpu(), **on_cpu), strict=True):
            mine.copy_(found)
        return out

    def topn_logprobs(logits: Tensor, *, chosen: Tensor, num_best: int) -> TopLogprobs:
        tokens = chosen.cpu().clamp(min=0)
        found = sampling.topn_logprobs(logits.cpu(), chosen=tokens, num_best=num_best)
        return TopLogprobs(**{n: getattr(found, n).to(DEVICE) for n in TopLogprobs.__slots__})

    monkeypatch.setattr(sampler, "sample", sample)
    monkeypatch.setattr(scores, "topn_logprobs", topn_logprobs)
