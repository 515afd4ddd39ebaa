"""The host tier on a CPU: copies and their check, and a whole engine with it or without."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from octavo.attention.base import KVLayer
from octavo.clock import VirtualClock
from octavo.config import CacheConfig, SchedulerConfig
from octavo.engine.core import EngineCore
from octavo.kvcache.manager import KVCacheManager
from octavo.scheduler.scheduler import Scheduler
from octavo.types import (
    BlockMove,
    EngineOutput,
    EngineRequest,
    FinishReason,
    SamplingParams,
    SchedulerOutput,
    StepStats,
    TokenLogprobs,
)
from octavo.worker.executor import InlineExecutor
from octavo.worker.kv_transfer import NO_TRANSFER, CPUTransfer, KVTransfer, plan_host_slots
from octavo.worker.model_runner import ModelRunner

MakeRunner = Callable[..., ModelRunner]
Bits = tuple[tuple[int, ...], tuple[TokenLogprobs, ...], tuple[TokenLogprobs, ...]]


# ---- copies -----------------------------------------------------------------------------------


def make_layers() -> list[KVLayer]:
    """K and V of different layouts, as on a CPU."""
    generator = torch.Generator().manual_seed(1)
    return [
        KVLayer(
            torch.randn(5, 2, 16, 8, generator=generator),
            torch.randn(5, 2, 8, 16, generator=generator),
        )
        for _ in range(3)
    ]


def move(block: int, slot: int, tag: int = 0) -> BlockMove:
    return BlockMove(block=block, slot=slot, tag=tag)


def step(*, saves: Sequence[BlockMove] = (), loads: Sequence[BlockMove] = ()) -> SchedulerOutput:
    return SchedulerOutput(step=0, saves=tuple(saves), loads=tuple(loads))


def test_a_block_returns_as_it_went() -> None:
    layers = make_layers()
    before = [(layer.k[1].clone(), layer.v[1].clone()) for layer in layers]
    transfer = CPUTransfer(layers, num_slots=3)
    transfer.apply(step(saves=[move(1, 2, -5), move(0, 0, 6)]))
    for layer in layers:
        layer.k.zero_()
        layer.v.zero_()
    assert transfer.apply(step(loads=[move(4, 2, -5)])).damaged() == ()
    for layer, (k, v) in zip(layers, before, strict=True):
        assert torch.equal(layer.k[4], k) and torch.equal(layer.v[4], v)
        assert not layer.k[:4].any() and not layer.v[:4].any()


def _flip(slots: torch.Tensor) -> None:
    slots[1, 7] ^= 1 << 40


def _flip_two_top_bits(slots: torch.Tensor) -> None:
    slots[1, 7] ^= -(2**63)
    slots[1, 8] ^= -(2**63)


def _swap(slots: torch.Tensor) -> None:
    slots[1, [3, 4]] = slots[1, [4, 3]]


def _shift(slots: torch.Tensor) -> None:
    slots[1] = slots[1].roll(1)


def _erase(slots: torch.Tensor) -> None:
    slots[1] = 0


def _mistake(slots: torch.Tensor) -> None:
    slots[1] = slots[0]


@pytest.mark.parametrize("spoil", [_flip, _flip_two_top_bits, _swap, _shift, _erase, _mistake])
def test_a_damaged_copy_is_told(
    spoil: Callable[[torch.Tensor], None], caplog: pytest.LogCaptureFixture
) -> None:
    layers = make_layers()
    transfer = CPUTransfer(layers, num_slots=2)
    transfer.apply(step(saves=[move(0, 0, 1), move(1, 1, 2)]))
    spoil(transfer.slots)
    with caplog.at_level(logging.ERROR):
        assert transfer.apply(step(loads=[move(2, 0, 1), move(3, 1, 2)])).damaged() == (3,)
    assert "came back damaged" in caplog.text


def test_contents_under_another_tag_are_damaged() -> None:
    transfer = CPUTransfer(make_layers(), num_slots=2)
    transfer.apply(step(saves=[move(0, 0, 1)]))
    assert transfer.apply(step(loads=[move(2, 0, 2)])).damaged() == (2,)


def test_without_a_tier_nothing_may_be_moved() -> None:
    assert NO_TRANSFER.apply(step()).damaged() == ()
    with pytest.raises(AssertionError, match="without a host tier"):
        NO_TRANSFER.apply(step(saves=[move(0, 0)]))


def test_the_size_asked_for_is_planned_or_refused() -> None:
    def slots(gib: float, available: int = 8 << 30) -> int:
        cache = CacheConfig(kv_offloading_size=gib)
        return plan_host_slots(cache, block_bytes=1 << 20, available_bytes=available)

    assert slots(0.0) == 0
    assert slots(0.5) == 512
    assert slots(8.0) == 8192
    with pytest.raises(ValueError, match=r"kv_offloading_size is 8.5 GiB, more than the 8.00 GiB"):
        slots(8.5)
    with pytest.raises(ValueError, match=r"kv_offloading_size is 0.0001 GiB, too little"):
        slots(0.0001)
    with pytest.raises(ValueError, match="kv_offloading_size must be 0 without enable_prefix"):
        CacheConfig(kv_offloading_size=1.0, enable_prefix_caching=False)
    with pytest.raises(ValueError, match="kv_offloading_size must be from 0.0"):
        CacheConfig(kv_offloading_size=-1.0)


# ---- a whole engine ---------------------------------------------------------------------------

BLOCK = 16


@dataclass
class Engine:
    core: EngineCore
    kv: KVCacheManager
    transfer: KVTransfer
    stats: list[StepStats]

    def run(self, requests: dict[str, EngineRequest]) -> dict[str, list[EngineOutput]]:
        outputs: dict[str, list[EngineOutput]] = {name: [] for name in requests}
        for request in requests.values():
            self.core.add_request(request)
        while self.core.has_work:
            news = self.core.step()
            assert news.stats is not None
            self.stats.append(news.stats)
            for output in news.outputs:
                outputs[output.request_id].append(output)
        assert self.kv.num_available == self.kv.num_blocks
        return outputs

    def total(self, name: str) -> int:
        return sum(getattr(stats, name) for stats in self.stats)


def engine(
    make_runner: MakeRunner, *, num_blocks: int, num_slots: int, max_inflight: int = 2
) -> Engine:
    runner = make_runner(num_blocks=num_blocks, block_size=BLOCK, num_host_slots=num_slots)
    kv = KVCacheManager(
        num_blocks, block_size=BLOCK, num_host_slots=num_slots, check_invariants=True
    )
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=8), kv=kv, max_model_len=256, max_num_batched_tokens=64
    )
    core = EngineCore(scheduler, InlineExecutor(runner), VirtualClock(), max_inflight=max_inflight)
    return Engine(core, kv, runner._transfer, [])


def request(name: str, prompt: Sequence[int], **params: Any) -> EngineRequest:
    settings: dict[str, Any] = {"max_tokens": 8, "temperature": 0.8, "seed": 3, "logprobs": 2}
    return EngineRequest(
        request_id=name, prompt_token_ids=tuple(prompt), params=SamplingParams(**settings | params)
    )


def prompt(first: int, length: int) -> list[int]:
    return [2 + (first * 37 + i * i * 7 + i) % 290 for i in range(length)]


def bits(outputs: list[EngineOutput]) -> Bits:
    assert outputs[-1].finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
    return (
        tuple(token for output in outputs for token in output.new_token_ids),
        tuple(score for output in outputs for score in output.new_logprobs),
        tuple(score for output in outputs for score in output.new_prompt_logprobs),
    )


@pytest.fixture
def alone(make_runner: MakeRunner) -> Callable[[EngineRequest], Bits]:
    """What a request yields in an engine of its own, without a host tier."""

    def run(asked: EngineRequest) -> Bits:
        own = engine(make_runner, num_blocks=16, num_slots=0, max_inflight=1)
        return bits(own.run({asked.request_id: asked})[asked.request_id])

    return run


def evict(made: Engine, *, num_blocks: int) -> None:
    """Fills the whole cache with other contents, and empties it."""
    others = {f"other-{i}": request(f"other-{i}", prompt(50 + i, 90)) for i in range(num_blocks)}
    made.run(others)


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_an_evicted_prompt_comes_back_bit_for_bit(
    make_runner: MakeRunner, alone: Callable[[EngineRequest], Bits], max_inflight: int
) -> None:
    made = engine(make_runner, num_blocks=12, num_slots=60, max_inflight=max_inflight)
    asked = request("a", prompt(1, 100))
    expected = alone(asked)
    first = made.run({"a": asked})["a"]
    assert (bits(first), first[-1].num_cached_tokens) == (expected, 0)
    evict(made, num_blocks=4)
    loaded_before = made.total("loaded_blocks")
    second = made.run({"a": asked})["a"]
    assert bits(second) == expected
    assert second[-1].num_cached_tokens == 96
    assert made.total("loaded_blocks") - loaded_before == 6
    assert made.total("prefix_cache_host_hits") == 96
    assert made.total("damaged_blocks") == 0


def test_many_at_once_with_forks_preemption_and_hits(
    make_runner: MakeRunner, alone: Callable[[EngineRequest], Bits]
) -> None:
    made = engine(make_runner, num_blocks=14, num_slots=100)
    common = prompt(3, 50)
    asked = {
        f"r{i}": request(f"r{i}", [*common, *prompt(9 + i, 11 * (i % 4))], max_tokens=40, seed=i)
        for i in range(8)
    }
    asked["r8"] = request("r8", common, max_tokens=30, prompt_logprobs=1)
    expected = {name: alone(one) for name, one in asked.items()}
    for i in range(2):  # r0 as one of n = 3
        fork = request(f"fork-{i}", common, max_tokens=40, seed=20 + i)
        expected[fork.request_id] = alone(fork)
        asked[fork.request_id] = replace(fork, fork_of="r0")
    for _ in range(3):
        outputs = made.run(asked)
        assert {name: bits(news) for name, news in outputs.items()} == expected
        evict(made, num_blocks=3)
    assert made.total("preemptions") > 0 and made.total("loaded_blocks") > 10


def test_a_damaged_copy_is_computed_anew(
    make_runner: MakeRunner, alone: Callable[[EngineRequest], Bits]
) -> None:
    made = engine(make_runner, num_blocks=12, num_slots=60)
    # The second shares the first one's blocks in the step that loads them.
    asked = {"a": request("a", prompt(1, 100)), "b": request("b", prompt(1, 80), seed=9)}
    expected = {name: alone(one) for name, one in asked.items()}
    made.run(asked)
    evict(made, num_blocks=4)
    key = made.kv.new_table(asked["a"].prompt_token_ids).keys[2]
    assert isinstance(made.transfer, CPUTransfer)
    made.transfer.slots[made.kv.tier.slots[key], 5] ^= 1
    outputs = made.run(asked)
    assert {name: bits(news) for name, news in outputs.items()} == expected
    assert made.total("damaged_blocks") == 1
    # What was voided with it is gone from the tier, so all of it has been computed.
    assert outputs["a"][-1].num_cached_tokens == 0
    assert {name: bits(news) for name, news in made.run(asked).items()} == expected
    assert made.total("damaged_blocks") == 1


def test_salts_and_resets_hold_for_the_tier_too(make_runner: MakeRunner) -> None:
    made = engine(make_runner, num_blocks=12, num_slots=60)
    plain = request("a", prompt(1, 100))
    made.run({"a": plain})
    evict(made, num_blocks=4)
    salted = EngineRequest(
        request_id="a", prompt_token_ids=plain.prompt_token_ids, params=plain.params, cache_salt="x"
    )
    assert made.run({"a": salted})["a"][-1].num_cached_tokens == 0
    evict(made, num_blocks=4)
    made.core.reset_prefix_cache()
    assert len(made.kv.tier) == 0
    assert made.run({"a": plain})["a"][-1].num_cached_tokens == 0
