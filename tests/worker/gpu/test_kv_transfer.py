"""Blocks to host memory and back by the GPU's kernel: the same bits as on a CPU, checked late."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from octavo.attention.base import KVLayer
from octavo.clock import VirtualClock
from octavo.config import SchedulerConfig
from octavo.engine.core import EngineCore
from octavo.kvcache.manager import KVCacheManager
from octavo.models import Model
from octavo.scheduler.scheduler import Scheduler
from octavo.types import (
    BlockMove,
    EngineOutput,
    EngineRequest,
    SamplingParams,
    SchedulerOutput,
)
from octavo.worker.gpu import kv_transfer
from octavo.worker.gpu.executor import GpuExecutor
from octavo.worker.gpu.kv_transfer import GpuTransfer
from octavo.worker.gpu.runtime import HostRuntime
from octavo.worker.kv_transfer import CPUTransfer
from octavo_kernels.launch import recording
from tests.worker.gpu.conftest import DEVICE, Engine, make_runtime
from tests.worker.gpu.toy_model import ToyModel

SHAPE = (6, 2, 16, 16)  # blocks, heads, tokens, dimensions


def make_layers() -> list[KVLayer]:
    generator = torch.Generator().manual_seed(3)

    def cache() -> torch.Tensor:
        return torch.randn(SHAPE, generator=generator).to(torch.bfloat16)

    return [KVLayer(cache(), cache()) for _ in range(2)]


def block_bits(layers: list[KVLayer], block: int) -> torch.Tensor:
    return torch.cat([cache[block].view(torch.int16).flatten() for kv in layers for cache in kv])


def move(block: int, slot: int, tag: int) -> BlockMove:
    return BlockMove(block=block, slot=slot, tag=tag)


def step(
    *, saves: tuple[BlockMove, ...] = (), loads: tuple[BlockMove, ...] = ()
) -> SchedulerOutput:
    return SchedulerOutput(step=0, saves=saves, loads=loads)


def test_blocks_return_as_they_went_and_moves_of_one_step_come_in_order() -> None:
    layers = make_layers()
    transfer = GpuTransfer(layers, num_slots=4, runtime=HostRuntime())
    first, second = block_bits(layers, 0), block_bits(layers, 1)
    assert transfer.apply(step(saves=(move(0, 3, -7), move(1, 2, 2**63 - 1)))).damaged() == ()
    for layer in layers:
        layer.k[0:2] = 0
        layer.v[0:2] = 0
    # Saved and loaded by one step: from slot 1 what block 4 held before this step.
    fourth = block_bits(layers, 4)
    loads = transfer.apply(
        step(saves=(move(4, 1, 5),), loads=(move(5, 3, -7), move(4, 2, 2**63 - 1), move(0, 1, 5)))
    )
    assert loads.damaged() == ()
    assert torch.equal(block_bits(layers, 5), first)
    assert torch.equal(block_bits(layers, 4), second)
    assert torch.equal(block_bits(layers, 0), fourth)


def test_a_step_without_moves_does_nothing() -> None:
    transfer = GpuTransfer(make_layers(), num_slots=1, runtime=HostRuntime())
    assert transfer.apply(step()).damaged() == ()


def test_flipped_bits_and_other_contents_are_told(caplog: pytest.LogCaptureFixture) -> None:
    transfer = GpuTransfer(make_layers(), num_slots=4, runtime=HostRuntime())
    transfer.apply(step(saves=tuple(move(i, i, 10 + i) for i in range(3)))).damaged()
    transfer.slots[1][77] ^= 1 << 62
    loads = (move(3, 0, 10), move(4, 1, 11), move(5, 2, 99))
    with caplog.at_level(logging.ERROR):
        assert transfer.apply(step(loads=loads)).damaged() == (4, 5)
    assert "2 K/V blocks came back damaged" in caplog.text
    assert transfer.apply(step(loads=(move(1, 3, 13),))).damaged() == (1,), "never saved"


def test_the_slots_hold_what_the_cpu_would_save() -> None:
    layers = make_layers()
    on_gpu = GpuTransfer(layers, num_slots=2, runtime=HostRuntime())
    on_cpu = CPUTransfer(layers, num_slots=2)
    moves = step(saves=(move(2, 0, 4), move(5, 1, -4)))
    on_gpu.apply(moves).damaged()
    on_cpu.apply(moves)
    assert torch.equal(torch.stack(on_gpu.slots), on_cpu.slots)
    assert on_gpu._marks.tolist() == on_cpu._marks


def test_pinned_words_are_not_reused_before_they_were_copied() -> None:
    transfer = GpuTransfer(make_layers(), num_slots=4, runtime=HostRuntime())
    transfer._unused_words.clear()  # of the trial at its start
    underway = [transfer.apply(step(saves=(move(i, i, i),))) for i in range(3)]
    assert not transfer._unused_words
    for loads in underway:
        loads.damaged()
    assert len({words.data_ptr() for words in transfer._unused_words}) == 3
    transfer.apply(step(saves=(move(3, 3, 3),))).damaged()
    assert len(transfer._unused_words) == 3


def test_where_a_steps_loads_begin_decides_no_kernel() -> None:
    transfer = GpuTransfer(make_layers(), num_slots=4, runtime=HostRuntime())
    kernels = []
    for num_saves in (0, 1, 2):
        saves = tuple(move(i, i, i) for i in range(num_saves))
        with recording() as keys:
            transfer.apply(step(saves=saves, loads=(move(5, 3, 0),))).damaged()
        kernels.append({key for key in keys if "'TO_SLOTS', 'False'" in str(key)})
    assert len(kernels[0]) == 1 and kernels[0] == kernels[1] == kernels[2]


def test_host_memory_is_pinned_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = make_layers()
    slot_bytes = 2 * 2 * 2 * 16 * 16 * 2
    monkeypatch.setattr(kv_transfer, "_PIECE_BYTES", 3 * slot_bytes - 1)
    transfer = GpuTransfer(layers, num_slots=5, runtime=HostRuntime())
    pieces = {slot.untyped_storage().data_ptr() for slot in transfer.slots}
    assert (len(transfer.slots), len(pieces)) == (5, 3)
    before = block_bits(layers, 0)
    transfer.apply(step(saves=(move(0, 4, 1),))).damaged()
    transfer.apply(step(loads=(move(1, 4, 1),))).damaged()
    assert torch.equal(block_bits(layers, 1), before)


# ---- a whole engine ---------------------------------------------------------------------------


def prompt_of(first: int) -> tuple[int, ...]:
    """Two full blocks and a few tokens."""
    return tuple(20 + (first * 31 + 7 * i + i * i) % 70 for i in range(35))


@dataclass
class Turns:
    """A GPU engine with a host tier, asked one request after the other."""

    core: EngineCore
    kv: KVCacheManager
    transfer: GpuTransfer
    num_damaged: int = 0

    def ask(self, name: str, first: int) -> list[EngineOutput]:
        asked = EngineRequest(
            request_id=name,
            prompt_token_ids=prompt_of(first),
            params=SamplingParams(max_tokens=3, temperature=0.0),
        )
        self.core.add_request(asked)
        outputs: list[EngineOutput] = []
        while self.core.has_work:
            news = self.core.step()
            assert news.stats is not None
            self.num_damaged += news.stats.damaged_blocks
            outputs += news.outputs
        return outputs


def tokens(outputs: list[EngineOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


@pytest.fixture
def turns(make_engine: Callable[..., Engine], gpu_model: Model) -> Turns:
    toy: Any = ToyModel(gpu_model.spec, device=DEVICE)
    runtime = make_runtime(can_capture=False)
    engine = make_engine(using=toy, runtime=runtime, num_blocks=4, max_model_len=64, max_num_seqs=2)
    transfer = GpuTransfer(engine.kv.layers, num_slots=8, runtime=runtime)
    engine.runner._transfer = transfer
    kv = KVCacheManager(4, block_size=16, num_host_slots=8, check_invariants=True)
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=2), kv=kv, max_model_len=64, max_num_batched_tokens=64
    )
    core = EngineCore(scheduler, GpuExecutor(engine.runner), VirtualClock(), max_inflight=2)
    return Turns(core, kv, transfer)


@pytest.mark.usefixtures("quick_sampling")
def test_an_engine_gets_its_evicted_blocks_back(turns: Turns) -> None:
    first = turns.ask("a", 0)
    turns.ask("other", 1)
    turns.ask("another", 2)
    again = turns.ask("a", 0)
    assert again[-1].num_cached_tokens == 32
    assert tokens(again) == tokens(first)
    turns.ask("other", 1)
    turns.ask("another", 2)
    key = turns.kv.new_table(prompt_of(0)).keys[0]
    turns.transfer.slots[turns.kv.tier.slots[key]][3] ^= 1
    damaged = turns.ask("a", 0)
    assert turns.num_damaged == 1
    assert damaged[-1].num_cached_tokens == 0
    assert tokens(damaged) == tokens(first)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    from octavo.worker.gpu.runtime import CudaRuntime

    host = make_layers()
    layers = [KVLayer(layer.k.cuda(), layer.v.cuda()) for layer in host]
    transfer = GpuTransfer(layers, num_slots=4, runtime=CudaRuntime())
    loads = transfer.apply(step(saves=(move(0, 0, 1), move(1, 1, 2))))
    torch.cuda.synchronize()
    assert loads.damaged() == ()
    for layer in layers:
        layer.k[0:2] = 0
        layer.v[0:2] = 0
    transfer.slots[1][5] ^= 2
    loads = transfer.apply(step(loads=(move(2, 0, 1), move(1, 1, 2))))
    torch.cuda.synchronize()
    assert loads.damaged() == (1,)
    on_host = [KVLayer(layer.k.cpu(), layer.v.cpu()) for layer in layers]
    assert torch.equal(block_bits(on_host, 2), block_bits(host, 0))
