"""Replayed forward passes against the same passes run by Python."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.models import Model, Taps
from octavo.models.base import TappedPass
from octavo.types import NewRequest, SamplingParams, SchedulerOutput
from octavo.worker.input_batch import StepBuffers, build_input_batch
from octavo.worker.model_runner import ModelRunner
from octavo.worker.replays import ForwardReplays
from octavo.worker.request_table import RequestTable

BLOCK_SIZE = 16


class _Bench:
    """A table, buffers and K/V of their own, and forward passes over them."""

    def __init__(self, runner: ModelRunner, model: Any, *, taps: Taps | None = None) -> None:
        self.table = RequestTable(max_num_seqs=8, max_model_len=256, block_size=BLOCK_SIZE)
        self.buffers = StepBuffers(self.table, max_num_tokens=256)
        self.layers = runner._kv.layers
        used = model if taps is None else TappedPass(model, taps)
        self.replays = ForwardReplays(used, kv_caches=self.layers, buffers=self.buffers)

    def add(self, name: str, length: int, *, first_block: int) -> None:
        request = NewRequest(
            request_id=name,
            token_ids=tuple((first_block * 31 + 7 * i) % 300 for i in range(length)),
            num_prompt_tokens=length,
            num_computed_tokens=0,
            block_ids=tuple(range(first_block, first_block + length // BLOCK_SIZE + 2)),
            params=SamplingParams(),
        )
        self.table.apply(SchedulerOutput(step=0, new_requests=(request,)))

    def forward(self, work: dict[str, int]) -> Tensor:
        batch = build_input_batch(
            self.table,
            buffers=self.buffers,
            request_ids=list(work),
            num_scheduled_tokens=list(work.values()),
        )
        hidden = self.replays.forward(batch)[0].clone()
        self.table.num_computed_tokens[batch.rows] += batch.num_scheduled
        return hidden


@pytest.mark.parametrize("seed", range(3))
def test_replays_of_any_batch_are_the_bits_of_the_pass_they_replace(
    make_runner: Callable[..., ModelRunner], model: Model, seed: int
) -> None:
    rng = random.Random(seed)
    replayed, plain = (_Bench(make_runner(num_blocks=80), model) for _ in range(2))
    plain.replays._is_able = False
    for name in "abcd":
        for bench in (replayed, plain):
            bench.add(name, 200, first_block=18 * "abcd".index(name))
    left, num_replayed = dict.fromkeys("abcd", 200), 0
    with torch.inference_mode():
        while any(left.values()):
            live = [name for name, count in left.items() if count]
            names = rng.sample(live, rng.randint(1, len(live)))
            # Few sums and many ways to them.
            work = {name: min(left[name], rng.choice([1, 2, 5, 6])) for name in names}
            num_tokens = sum(work.values())
            num_replayed += (num_tokens, False) in replayed.replays._passes
            assert torch.equal(replayed.forward(work), plain.forward(work)), work
            for name, count in work.items():
                left[name] -= count
    for mine, other in zip(replayed.layers, plain.layers, strict=True):
        assert torch.equal(mine.k.nan_to_num(7), other.k.nan_to_num(7))
        assert torch.equal(mine.v.nan_to_num(7), other.v.nan_to_num(7))
    assert num_replayed > 20 and plain.replays.num_recorded == 0


def test_a_replay_leaves_the_taps_of_its_own_batch(
    make_runner: Callable[..., ModelRunner], model: Model
) -> None:
    def tapped() -> Taps:
        return Taps(layers=(0, 2), out=torch.full((8, 2 * model.spec.hidden_size), float("nan")))

    taps = tapped(), tapped()
    replayed, plain = (_Bench(make_runner(num_blocks=40), model, taps=own) for own in taps)
    plain.replays._is_able = False
    with torch.inference_mode():
        for bench in (replayed, plain):
            bench.add("a", 100, first_block=0)
        for _ in range(5):
            assert torch.equal(replayed.forward({"a": 3}), plain.forward({"a": 3}))
            assert torch.equal(taps[0].out[:3], taps[1].out[:3])
    assert replayed.replays.num_recorded == 1 and taps[0].out[3:].isnan().all()


def test_what_idle_time_recorded_is_replayed_from_the_first_time_on(
    make_runner: Callable[..., ModelRunner], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle, plain = (_Bench(make_runner(num_blocks=40), model) for _ in range(2))
    plain.replays._is_able = False
    with torch.inference_mode():
        for bench in (idle, plain):
            bench.add("a", 100, first_block=0)
            bench.forward({"a": 5})
        before = [layer.k.nan_to_num(7) for layer in idle.layers]
        while idle.replays.record_one():
            pass
        for was, layer in zip(before, idle.layers, strict=True):
            assert torch.equal(was, layer.k.nan_to_num(7))  # no kernel has run
        kinds = set(idle.replays._passes)
        assert kinds >= {(n, True) for n in (1, 77, 128)} | {(n, False) for n in (1, 130, 256)}
        assert not plain.replays.record_one()
        for count in (1, 32, 6):
            assert torch.equal(idle.forward({"a": count}), plain.forward({"a": count}))
        assert set(idle.replays._passes) == kinds
        monkeypatch.setattr("octavo.worker.replays._MAX_IDLE_BYTES", 0)
        few = _Bench(make_runner(num_blocks=40), model)
        assert few.replays.record_one() and not few.replays.record_one()


def test_a_replay_tells_of_a_batch_that_kernels_refuse_and_the_next_is_well(
    make_runner: Callable[..., ModelRunner], model: Model
) -> None:
    bench = _Bench(make_runner(num_blocks=40), model)
    bench.add("a", 100, first_block=0)
    with torch.inference_mode():
        for _ in range(3):
            bench.forward({"a": 4})
        assert bench.replays.num_recorded == 1
        good = bench.table.block_tables[0].copy()
        bench.table.block_tables[0, :] = 40
        with pytest.raises(ValueError, match=r"slots|block"):
            bench.forward({"a": 4})
        bench.table.block_tables[0] = good
        assert bench.forward({"a": 4}).isfinite().all()


def test_a_model_that_computes_with_torch_is_run_as_it_stands(
    make_runner: Callable[..., ModelRunner], model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    class Doubling:
        def forward(self, *args: Any, **options: Any) -> Tensor:
            return model.forward(*args, **options) * 2

        compute_logits = model.compute_logits

    doubled, plain = (_Bench(make_runner(num_blocks=20), used) for used in (Doubling(), model))
    with torch.inference_mode():
        for bench in (doubled, plain):
            bench.add("a", 100, first_block=0)
        for _ in range(4):
            assert torch.equal(doubled.forward({"a": 3}), plain.forward({"a": 3}) * 2)
    assert doubled.replays.num_recorded == 0 and plain.replays.num_recorded == 1
    assert [record.message for record in caplog.records if "not replayed" in record.message]


def test_recordings_are_dropped_beyond_their_room_the_oldest_first(
    make_runner: Callable[..., ModelRunner], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = _Bench(make_runner(num_blocks=40), model)
    bench.add("a", 200, first_block=0)
    with torch.inference_mode():
        for count in (1, 1, 2, 2):
            bench.forward({"a": count})
        monkeypatch.setattr("octavo.worker.replays._MAX_BYTES", bench.replays._num_bytes)
        for count in (1, 3, 3):  # 2 is now the one that was used longest ago
            bench.forward({"a": count})
        assert sorted(bench.replays._passes) == [(1, False), (3, False)]
        for count in (2, 2, 1):
            bench.forward({"a": count})
        assert sorted(bench.replays._passes) == [(1, False), (2, False)]
