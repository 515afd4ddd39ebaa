"""What the engine takes of a GPU beside the K/V cache: its own allocations, made on the device
"meta" and counted. Knows every place that allocates; knows no budget.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.attention.base import KVCacheSpec
from octavo.checkpoint import ModelSpec
from octavo.models import Model, kv_cache_spec
from octavo.models.registry import MODELS
from octavo.platforms.gpu import GPUPlatform
from octavo.worker.gpu.allocator import CachingAllocator, Tally
from octavo.worker.gpu.arena import RequestArena, request_columns
from octavo.worker.gpu.buffers import StepBuffers, StepSizes
from octavo.worker.gpu.graphs import ForwardKey, GraphKey, GraphSizes
from octavo.worker.gpu.runtime import HostRuntime
from octavo.worker.gpu.sampler import GpuSampler
from octavo.worker.gpu.scores import PromptScorer
from octavo.worker.gpu.upload import NUM_SLOTS, upload_words
from octavo_kernels.launch import dropping
from octavo_kernels.matmul.gpu import assuming_cublas

META = torch.device("meta")
MIB = 1 << 20
# Not tensors, so not counted but measured, or taken from others' measurements where it says so.
CONTEXT_BYTES = 512 * MIB  # CUDA's context, the kernels' code, cuBLAS: about this on an H100
NODE_BYTES = 8 << 10  # of a kernel in a captured graph: an estimate
_SCORED_GROUPS = 4
_LAYER_KERNELS, _OTHER_KERNELS = 9, 20  # at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One line of the plan."""

    name: str
    num_bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Everything but the K/V cache."""

    parts: tuple[Part, ...]
    weight_bytes: int
    streamed_bytes: int  # of the weights: what every step reads
    pinned_bytes: int  # on the host

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


def cache_spec(spec: ModelSpec, *, sizes: StepSizes, dtype: torch.dtype) -> KVCacheSpec:
    return kv_cache_spec(spec, block_size=sizes.block_size, dtype=dtype)


def footprint(
    spec: ModelSpec,
    *,
    sizes: StepSizes,
    cache_dtype: torch.dtype,
    graphs: GraphSizes,
    max_logprobs: int,
) -> Footprint:
    """Of an engine of these sizes; ``sizes.num_blocks`` plays no part.

    The order is that of the start: what lives as long as the engine, then the largest step, from
    whose memory smaller steps are served, then the graphs in theirs. What loading and proving
    cuBLAS take is given back before there is a cache.
    """
    memory = CachingAllocator()
    parts = _weights(spec, sizes=sizes, memory=memory)
    weight_bytes = sum(part.num_bytes for part in parts)
    streamed = weight_bytes - sum(p.num_bytes for p in parts if p.name in _not_streamed(spec))
    engine, more = _engine(sizes, max_logprobs=max_logprobs, memory=memory)
    steps = _Steps(spec, engine, cache_dtype=cache_dtype)
    parts += [*more, *_temporary(steps, max_logprobs=max_logprobs, memory=memory)]
    rounding = memory.reserved - sum(part.num_bytes for part in parts)
    parts.append(Part(name="allocator", num_bytes=rounding, note="its segments, not filled"))
    context = Part(name="CUDA context", num_bytes=CONTEXT_BYTES, note="with kernels and libraries")
    return Footprint(
        parts=(context, *parts, *_graphs(steps, graphs)),
        weight_bytes=weight_bytes,
        streamed_bytes=streamed,
        pinned_bytes=NUM_SLOTS * 4 * upload_words(sizes),
    )


def _make_model(spec: ModelSpec, platform: GPUPlatform, *, dtype: torch.dtype) -> Model:
    """Without its rotary tables, which would be computed: they have one position."""
    return MODELS[spec.architecture](spec, platform=platform, dtype=dtype, max_model_len=1)


_GROUPS = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    ".self_attn.": "attention",
    ".mlp.": "feed-forward",
}


@functools.lru_cache(maxsize=8)
def _tensors(spec: ModelSpec, *, dtype: torch.dtype) -> tuple[tuple[int, ...], Mapping[str, int]]:
    """Bytes of a model's tensors in the order they are made, and of groups of them."""
    with Tally(CachingAllocator()) as tally:
        model = _make_model(spec, GPUPlatform(META), dtype=dtype)
    groups: dict[str, int] = {}
    for name, slot in model.slots().items():
        group = next((_GROUPS[part] for part in _GROUPS if part in name), "norms")
        size = torch.Size(slot.shape).numel() * dtype.itemsize
        groups[group] = groups.get(group, 0) + size
    return tuple(tally.sizes), groups


def _weights(spec: ModelSpec, *, sizes: StepSizes, memory: CachingAllocator) -> list[Part]:
    tensors, groups = _tensors(spec, dtype=sizes.dtype)
    table = sizes.max_model_len * (spec.rope.rotary_dim // 2) * 4
    for num_bytes in (*tensors, table, table):
        memory.allocate(num_bytes)
    dtype = str(sizes.dtype).removeprefix("torch.")
    parts = [Part(name=f"weights: {name}", num_bytes=n, note=dtype) for name, n in groups.items()]
    note = f"float32, {sizes.max_model_len:,} positions"
    return [*parts, Part(name="weights: rotary tables", num_bytes=2 * table, note=note)]


def _not_streamed(spec: ModelSpec) -> set[str]:
    """Of which a step reads a few rows."""
    names = {"weights: rotary tables"}
    return names if spec.tie_word_embeddings else {*names, "weights: embedding"}


class _Runtime(HostRuntime):
    """Whose tensors take no memory."""

    device = META


class _Absent(_Runtime):
    """The same, where results that nobody makes come to a host."""

    def host_tensor(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=META)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Engine:
    """What lives beside the model."""

    arena: RequestArena
    sampler: GpuSampler
    buffers: StepBuffers


def _engine(
    sizes: StepSizes, *, max_logprobs: int, memory: CachingAllocator
) -> tuple[_Engine, list[Part]]:
    rows = sizes.max_num_seqs
    with Tally(memory) as table:
        arena = RequestArena(request_columns(sizes), num_rows=rows, device=META)
    with Tally(memory) as sampling:
        sampler = GpuSampler(arena, sizes=sizes, runtime=_Runtime(), max_logprobs=max_logprobs)
    with Tally(memory) as step:
        buffers = StepBuffers.create(sizes, num_words=upload_words(sizes), device=META)
    logits = buffers.logits.nbytes
    each = f"{rows:,} x {sizes.vocab_size:,}"
    parts = [
        Part(
            name="request table",
            num_bytes=table.asked,
            note=f"{rows:,} rows of {sizes.max_model_len:,} tokens",
        ),
        Part(
            name="sampler",
            num_bytes=sampling.asked,
            note=f"penalty counts, masks, raw logits, {each}",
        ),
        Part(name="logits", num_bytes=logits, note=f"float32, {each}"),
        Part(name="step buffers", num_bytes=step.asked - logits),
    ]
    return _Engine(arena=arena, sampler=sampler, buffers=buffers), parts


class _Steps:
    """Steps without their results: one layer of each kind, as all layers of a kind take turns in
    the same memory."""

    def __init__(self, spec: ModelSpec, engine: _Engine, *, cache_dtype: torch.dtype) -> None:
        windows = tuple(dict.fromkeys(spec.layer_windows))
        few = dataclasses.replace(spec, num_layers=len(windows), layer_windows=windows)
        platform = GPUPlatform(META)
        self.spec, self.engine = spec, engine
        self.sizes = engine.buffers.sizes
        self.model = _make_model(few, platform, dtype=self.sizes.dtype)
        self.products = [(n, k) for n, k, _ in platform.products]
        cache = cache_spec(few, sizes=self.sizes, dtype=cache_dtype)
        self._caches = self.model.backend.allocate(cache, num_blocks=1)

    def run(self, memory: CachingAllocator, key: GraphKey) -> None:
        buffers, sizes = self.engine.buffers, self.sizes
        if not isinstance(key, ForwardKey):
            with dropping(), Tally(memory):
                self.engine.sampler.launch_plain(self.model, buffers, key.num_samples)
            return
        num_tokens = key.num_tokens
        attn = buffers.attention(
            num_tokens=num_tokens,
            num_requests=key.num_requests(sizes.max_num_seqs),
            max_query_len=key.max_query_len,
        )
        ids, out = buffers.token_ids[:num_tokens], buffers.hidden[:num_tokens]
        cublas = assuming_cublas(self.products, sizes.dtype, rows=num_tokens)
        with dropping(), cublas, Tally(memory):
            self.model.forward(ids, attn, self._caches, out=out)

    def score(self, *, num_best: int) -> int:
        """Bytes at most for log-probabilities of as long a prompt as a step holds."""
        buffers, table = self.engine.buffers, self.engine.arena.view("token_ids")
        num_rows = min(self.sizes.max_num_tokens, table.shape[1] - 1)
        few = min(num_rows, _SCORED_GROUPS * len(buffers.logits))  # it grows with the rows
        scorer = PromptScorer(table, logits=buffers.logits, runtime=_Absent())
        hidden = buffers.hidden[:few]
        memory = CachingAllocator()
        with dropping(), Tally(memory):
            scorer.launch(self.model, hidden, row=0, start=1, num_best=num_best)
        return memory.peak * -(-num_rows // few)


def _temporary(steps: _Steps, *, max_logprobs: int, memory: CachingAllocator) -> list[Part]:
    """What comes and goes with a step: each line what it takes beyond those before it."""
    sizes = steps.sizes
    num_tokens = sizes.max_num_tokens
    parts: list[Part] = []
    before = memory.peak = memory.allocated

    def add(name: str, note: str) -> None:
        taken = memory.peak - before - sum(part.num_bytes for part in parts)
        parts.append(Part(name=name, num_bytes=taken, note=note))

    steps.run(memory, ForwardKey(num_tokens, False))
    add("activations", f"of a step of {num_tokens:,} tokens")
    memory.allocate(steps.score(num_best=min(max_logprobs, sizes.vocab_size)))()
    add("log-probabilities", f"of a prompt, {max_logprobs:,} a token; beyond the activations")
    return parts


def _graphs(steps: _Steps, graphs: GraphSizes) -> list[Part]:
    """Memory that captured graphs share, and the graphs. How well they share depends on the order
    of capture, which is that of need: the worse of two."""
    keys = [*graphs.keys(), *graphs.late_keys()]
    reserved = []
    for order in (keys, keys[::-1]):
        pool = CachingAllocator()
        for key in order:
            steps.run(pool, key)
        reserved.append(pool.reserved)
    num_nodes = (_LAYER_KERNELS * steps.spec.num_layers + _OTHER_KERNELS) * len(keys)
    return [
        Part(name="graphs: activations", num_bytes=max(reserved)),
        Part(name="graphs: kernels", num_bytes=NODE_BYTES * num_nodes, note=f"{len(keys)} graphs"),
    ]
