"""A GPU's memory, planned before anything is allocated: what there is room for, or why not. Knows
sizes; touches no device, so that `octavo plan` makes the same plan without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from octavo.checkpoint import ModelSpec
from octavo.config import CacheConfig, EngineConfig, SchedulerConfig
from octavo.models import kv_dtype, weight_dtype
from octavo.platforms.gpu import GPUPlatform
from octavo.worker.gpu.allocator import CachingAllocator
from octavo.worker.gpu.buffers import StepSizes
from octavo.worker.gpu.footprint import META, Footprint, Part, cache_spec, footprint
from octavo.worker.gpu.graphs import GraphSizes
from octavo.worker.gpu.lookup import max_drafts_of
from octavo.worker.sizing import CachePlan

GIB = 1 << 30
_LARGE_GPU = 40 * GIB
_STEP_TOKENS, _SMALL_STEP_TOKENS = 8192, 2048  # by default, on large and on small GPUs
_SEARCH_STEPS = 12
# Of a cache whose size nobody asked for: tiny models on large GPUs would have tens of millions, and
# the host a list entry for each. Slots of as many blocks are 32-bit numbers, too.
_MOST_BLOCKS = 1 << 20
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where every byte goes. ``parts`` ends with the K/V cache."""

    total_bytes: int
    usable_bytes: int  # the share of it that may be used
    parts: tuple[Part, ...]
    sizes: StepSizes
    cache_dtype: torch.dtype
    block_bytes: int
    weight_bytes: int
    streamed_bytes: int  # of weights, which every step reads
    pinned_bytes: int  # on the host
    notes: tuple[str, ...] = ()  # what the user should know

    @property
    def used_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    @property
    def kv_tokens(self) -> int:
        return self.sizes.num_blocks * self.sizes.block_size

    @property
    def cache(self) -> CachePlan:
        """What the scheduler needs to know."""
        return CachePlan(
            num_blocks=self.sizes.num_blocks,
            max_model_len=self.sizes.max_model_len,
            notes=self.notes,
        )

    def concurrency(self, length: int) -> float:
        """Requests of so many tokens whose K/V fits at once; more may not run than max_num_seqs."""
        return self.sizes.num_blocks / _blocks(length, self.sizes.block_size)

    def check_free(self, free_bytes: int) -> None:
        """Raises ValueError where less is free, with the CUDA context made, than is planned."""
        needed = self.used_bytes - self.parts[0].num_bytes
        if needed <= free_bytes:
            return
        most = max(0.0, (free_bytes + self.parts[0].num_bytes) / self.total_bytes)
        raise ValueError(
            f"the plan needs {_gib(needed)} of the GPU and only {_gib(free_bytes)} of its "
            f"{_gib(self.total_bytes)} are free: something else uses it. End that, or lower "
            f"gpu_memory_utilization to {int(100 * most) / 100:.2f} or less"
        )


def max_step_tokens(wanted: int | None, *, max_num_seqs: int, total_bytes: int) -> int:
    """Tokens of one step: as asked for, or enough to keep a GPU of that size busy."""
    if wanted is not None:
        return wanted
    default = _STEP_TOKENS if total_bytes >= _LARGE_GPU else _SMALL_STEP_TOKENS
    return max(default, max_num_seqs)


def plan_gpu_memory(
    spec: ModelSpec,
    config: EngineConfig,
    *,
    total_bytes: int,
    weight_bytes: int | None = None,
) -> MemoryPlan:
    """The plan of an engine on a GPU of ``total_bytes``; nothing is allocated.

    weight_bytes: what the loaded model takes, if it is not as computed. Without ``max_model_len``
    the model's context is cut to what fits: load the model for the plan's.
    Raises ValueError with the plan's figures, and what would fit, where there is too little memory
    for the model or for one request of ``max_model_len``; and for weights that no GPU engine has.
    """
    if config.model.quantization not in ("auto", "none"):
        raise ValueError(
            f"quantization on a GPU must be auto or none, got {config.model.quantization}"
        )
    attempt = _Attempt(spec, config, total_bytes, weight_bytes)
    plan = attempt.plan()
    if plan is not None:
        return plan
    raise ValueError(attempt.refusal())


class _Attempt:
    """One configuration on one GPU."""

    def __init__(
        self,
        spec: ModelSpec,
        config: EngineConfig,
        total_bytes: int,
        weight_bytes: int | None,
    ) -> None:
        self.spec, self.config = spec, config
        self.total_bytes, self.weight_bytes = total_bytes, weight_bytes
        self.usable_bytes = int(total_bytes * config.cache.gpu_memory_utilization)
        self.length = config.model.max_model_len or spec.max_model_len
        if self.length > spec.max_model_len and spec.rope.kind != "dynamic":
            raise ValueError(
                f"max_model_len must be at most {spec.max_model_len}, the context that the model "
                f"was made for, got {self.length}"
            )
        cache = config.cache
        name = config.model.dtype if cache.kv_cache_dtype == "auto" else cache.kv_cache_dtype
        self.cache_dtype = kv_dtype(name, device="cuda")
        if self.cache_dtype != weight_dtype(config.model.dtype, device="cuda"):
            raise ValueError(
                f"kv_cache_dtype must be auto or the model's dtype on a GPU, got {name}"
            )
        self.max_num_tokens = max_step_tokens(
            config.scheduler.max_num_batched_tokens,
            max_num_seqs=config.scheduler.max_num_seqs,
            total_bytes=total_bytes,
        )
        self.max_drafts = max_drafts_of(config.scheduler)
        self.graphs = GraphSizes.configured(config.scheduler, max_num_tokens=self.max_num_tokens)
        self._graph_parts: tuple[Part, ...] = ()  # once they are known
        layer = replace(cache_spec(spec, sizes=self.sizes(1), dtype=self.cache_dtype), num_layers=1)
        self.tensor_bytes = GPUPlatform(META).attention.block_bytes(layer) // 2

    def sizes(self, length: int, num_blocks: int = 0) -> StepSizes:
        return StepSizes(
            max_num_seqs=self.config.scheduler.max_num_seqs,
            max_num_tokens=self.max_num_tokens,
            max_model_len=length,
            block_size=self.config.cache.block_size,
            num_blocks=num_blocks,
            hidden_size=self.spec.hidden_size,
            vocab_size=self.spec.vocab_size,
            dtype=weight_dtype(self.config.model.dtype, device="cuda"),
            max_drafts=self.max_drafts,
        )

    @property
    def block_bytes(self) -> int:
        return 2 * self.spec.num_layers * self.tensor_bytes

    def footprint(self, length: int, *, is_exact: bool = True) -> Footprint:
        """``is_exact``: graphs too are measured for this length, not taken from the last one
        measured: in a search that goes down from the longest, an upper bound."""
        found = footprint(
            self.spec,
            sizes=self.sizes(length),
            cache_dtype=self.cache_dtype,
            graphs=self.graphs if is_exact else GraphSizes(),
            max_logprobs=self.config.model.max_logprobs,
        )
        graphs = tuple(part for part in found.parts if part.name.startswith("graphs"))
        if is_exact:
            self._graph_parts = graphs
        parts = [part for part in found.parts if part not in graphs]
        if self.weight_bytes is not None and self.weight_bytes != found.weight_bytes:
            more = self.weight_bytes - found.weight_bytes
            parts.append(Part(name="weights: as loaded", num_bytes=more, note="beyond the above"))
            found = replace(found, weight_bytes=self.weight_bytes)
        return replace(found, parts=(*parts, *self._graph_parts))

    def num_blocks(self, found: Footprint) -> int:
        """Of the cache, beside all else; below 1 where there is no room."""
        cache = self.config.cache
        if cache.num_gpu_blocks_override is None and cache.kv_cache_memory_bytes is None:
            return self._most_blocks(self.usable_bytes - found.num_bytes)
        asked = cache.num_gpu_blocks_override
        if asked is None:
            assert cache.kv_cache_memory_bytes is not None
            asked = cache.kv_cache_memory_bytes // self.block_bytes
        # What is asked for in so many words may take what is kept free otherwise.
        return asked if self.cache_bytes(asked) <= self.total_bytes - found.num_bytes else 0

    def cache_bytes(self, num_blocks: int) -> int:
        """That the allocator takes for a cache of so many blocks."""
        memory = CachingAllocator()
        for _ in range(2 * self.spec.num_layers if num_blocks > 0 else 0):
            memory.allocate(num_blocks * self.tensor_bytes)
        return memory.reserved

    def _most_blocks(self, room: int) -> int:
        least, beyond = 0, min(max(room // self.block_bytes, 0), _MOST_BLOCKS) + 1
        while beyond - least > 1:
            middle = (least + beyond) // 2
            if self.cache_bytes(middle) <= room:
                least = middle
            else:
                beyond = middle
        return least

    def plan(self) -> MemoryPlan | None:
        """None where nothing fits."""
        found = self.footprint(self.length)
        num_blocks = self.num_blocks(found)
        if self._per_request(self.length) <= num_blocks:
            return self._made(self.length, found, num_blocks)
        if self.config.model.max_model_len is not None:
            return None
        cut = self.cut()
        if cut is None:
            return None
        length, found, num_blocks = cut
        note = f"context cut from {self.length} to {length} tokens to fit the K/V cache"
        return self._made(length, found, num_blocks, notes=(note,))

    def cut(self) -> tuple[int, Footprint, int] | None:
        """The longest context, nearly, of which one request fits, and what goes with it."""
        size = self.config.cache.block_size
        least, beyond = 0, self._per_request(self.length) + 1
        self.footprint(self.length)
        middle = self.num_blocks(self.footprint(self.length, is_exact=False))
        for _ in range(_SEARCH_STEPS):
            # The table of requests grows with the context and the cache shrinks; near the end
            # a percent more is not worth another try.
            if beyond - least <= max(1, least // 100):
                break
            middle = middle if least < middle < beyond else (least + beyond) // 2
            have = self.num_blocks(self.footprint(middle * size, is_exact=False))
            if middle <= have:
                least, middle = middle, have
            else:
                beyond = middle
        length = min(least * size, self.length)
        while length > 0:
            found = self.footprint(length)
            num_blocks = self.num_blocks(found)
            if self._per_request(length) <= num_blocks:
                return length, found, num_blocks
            length = max(num_blocks, 0) * size
        return None

    def _per_request(self, length: int) -> int:
        return _blocks(length, self.config.cache.block_size)

    def _made(
        self, length: int, found: Footprint, num_blocks: int, notes: tuple[str, ...] = ()
    ) -> MemoryPlan:
        dtype = str(self.cache_dtype).removeprefix("torch.")
        cache = Part(
            name="K/V cache",
            num_bytes=self.cache_bytes(num_blocks),
            note=f"{num_blocks:,} blocks of {self.config.cache.block_size}, {dtype}",
        )
        return MemoryPlan(
            total_bytes=self.total_bytes,
            usable_bytes=self.usable_bytes,
            parts=(*found.parts, cache),
            sizes=self.sizes(length, num_blocks),
            cache_dtype=self.cache_dtype,
            block_bytes=self.block_bytes,
            weight_bytes=found.weight_bytes,
            streamed_bytes=found.streamed_bytes,
            pinned_bytes=found.pinned_bytes,
            notes=notes,
        )

    # ---- refusals --------------------------------------------------------------------------

    def refusal(self) -> str:
        """Why there is no plan, in its figures, and what there would be room for."""
        found = self.footprint(self.length)
        figures = ", ".join(f"{name} {_gib(size)}" for name, size in _groups(found))
        share = self.config.cache.gpu_memory_utilization
        room = self.usable_bytes - found.num_bytes
        need = self.cache_bytes(self._per_request(self.length))
        text = f"{_gib(self.total_bytes)} of GPU memory, {share:.0%} of which may be used, "
        if room < self.block_bytes:
            text += (
                f"are too little for the model: it takes {figures}, {_gib(found.num_bytes)} in all"
            )
        else:
            text += (
                f"leave {_gib(room)} for the K/V cache, and one request of {self.length} tokens "
                f"takes {_gib(need)}; the rest is {figures}"
            )
        cache = self.config.cache
        for name in ("num_gpu_blocks_override", "kv_cache_memory_bytes"):
            if (value := getattr(cache, name)) is not None:
                text += f"; {name} is {value}"
        ways = list(self._ways())
        whole = int((found.num_bytes + need) / share)
        enough = f"a GPU of {-(-whole // GIB)} GiB"
        return f"{text}. It would fit with {', or '.join([*ways, enough])}"

    def _ways(self) -> Iterator[str]:
        """Changes of one option each that make it fit."""
        config = self.config
        scheduler, cache = config.scheduler, config.cache
        cut = self.cut()
        if cut is not None:
            yield f"max_model_len {cut[0]}"
        for name, number, least in (
            ("max_num_seqs", scheduler.max_num_seqs, 1),
            ("max_num_batched_tokens", self.max_num_tokens, 256),
        ):
            fitting: int | None = None
            while number >= least and self._fits(scheduler=_replaced(scheduler, name, least)):
                least, fitting = max(2 * least, 1), least
            if fitting is not None:
                yield f"{name} {fitting}"
        if weight_dtype(config.model.dtype, device="cuda") == torch.float32 and self._fits(
            model=replace(config.model, dtype="bfloat16")
        ):
            yield "dtype bfloat16"
        for name in ("num_gpu_blocks_override", "kv_cache_memory_bytes"):
            if getattr(cache, name) is not None and self._fits(cache=_replaced(cache, name, None)):
                yield f"no {name}"
        share = 0.98
        if cache.gpu_memory_utilization < share and self._fits(
            cache=replace(cache, gpu_memory_utilization=share)
        ):
            yield f"gpu_memory_utilization {share}"

    def _fits(self, **changes: Any) -> bool:
        config = replace(self.config, **changes)
        changed = _Attempt(self.spec, config, self.total_bytes, self.weight_bytes)
        changed._graph_parts = self._graph_parts
        found = changed.footprint(self.length, is_exact=False)
        return self._per_request(self.length) <= changed.num_blocks(found)


Config = TypeVar("Config", SchedulerConfig, CacheConfig)


def _replaced(config: Config, name: str, value: Any) -> Config:
    return replace(config, **{name: value})


def _groups(found: Footprint) -> list[tuple[str, int]]:
    """Parts of one kind added up, largest first."""
    sizes: dict[str, int] = {}
    for part in found.parts:
        kind = part.name.partition(":")[0]
        sizes[kind] = sizes.get(kind, 0) + part.num_bytes
    return sorted(((name, size) for name, size in sizes.items() if size), key=lambda item: -item[1])


def _blocks(length: int, block_size: int) -> int:
    return -(-length // block_size)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 8 else f"{num_bytes / _MIB:.1f} MiB"
