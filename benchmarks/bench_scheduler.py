"""Host time of a step, without the model: schedule, pack, update, encode. Knows no device.

Run: ``python -m benchmarks.bench_scheduler [--write]``. A fake executor takes the model's place and
is not timed. Each case runs R requests in steady decoding, with one of them ending and another
being admitted every few steps, under overlap (a step in flight while the next is planned).
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median, quantiles

import msgspec

from benchmarks.machine import keep_row, passport
from octavo.config import SchedulerConfig
from octavo.engine.fake import FakeExecutor
from octavo.kvcache.manager import KVCacheManager
from octavo.scheduler.scheduler import Scheduler
from octavo.types import EngineOutputs, EngineRequest, SamplingParams

BLOCK_SIZE = 16
PROMPT_LEN, OUTPUT_LEN = 64, 512
CASES = tuple((running, blocks) for blocks in (12_000, 100_000) for running in (16, 64, 256))
SMALL_CACHE = ((16, 1_000),)  # what 1,000 blocks hold
TITLES = {
    "running": "running",
    "blocks": "blocks",
    "median": "median_ms",
    "p90": "p90_ms",
    "schedule": "schedule_ms",
    "update": "update_ms",
    "encode": "encode_ms",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds of one step's parts."""

    schedule: float
    update: float
    encode: float

    @property
    def total(self) -> float:
        return self.schedule + self.update + self.encode


def requests() -> Iterator[EngineRequest]:
    """Endless; staggered lengths, so that they do not all end in the same step."""
    number = 0
    while True:
        prompt = tuple((number * 131 + i) % 49_152 for i in range(PROMPT_LEN))
        max_tokens = OUTPUT_LEN - (number * 37) % 256
        params = SamplingParams(max_tokens=max_tokens, seed=number, eos_token_ids=(0,))
        yield EngineRequest(
            request_id=f"cmpl-{number:012x}-0", prompt_token_ids=prompt, params=params
        )
        number += 1


def run_case(num_running: int, num_blocks: int, *, num_steps: int) -> list[Sample]:
    """``num_steps`` steps of steady state with ``num_running`` requests in each."""
    kv = KVCacheManager(num_blocks, block_size=BLOCK_SIZE)
    # The pool as it is in service: every block written once, so that allocating evicts.
    filler = kv.new_table(range(num_blocks * BLOCK_SIZE))
    kv.grow(filler, num_tokens=num_blocks * BLOCK_SIZE)
    kv.register(filler, token_ids=(), num_tokens=num_blocks * BLOCK_SIZE)
    kv.free(filler)
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=num_running),
        kv=kv,
        max_model_len=2048,
        max_num_batched_tokens=2048,
    )
    executor = FakeExecutor(block_size=BLOCK_SIZE, vocab_size=49_152)
    encoder = msgspec.msgpack.Encoder()
    source = requests()
    samples: list[Sample] = []
    inflight: deque[float] = deque()
    clock = time.perf_counter
    for _ in range(num_running + 8):
        scheduler.add(next(source))
    num_warm = num_steps // 4
    while len(samples) < num_steps + num_warm:
        while len(inflight) < 2:
            began = clock()
            step = scheduler.schedule(began)
            inflight.append(clock() - began)
            executor.submit(step)
        result = executor.collect()
        began = clock()
        outputs = scheduler.update(result, began)
        stats = scheduler.stats(began)
        updated = clock()
        encoder.encode(EngineOutputs(outputs=tuple(outputs), stats=stats))
        encoded = clock()
        assert len(samples) <= num_warm or stats.num_running > 0.9 * num_running
        samples.append(Sample(inflight.popleft(), updated - began, encoded - updated))
        for output in outputs:
            if output.finish_reason is not None:
                scheduler.add(next(source))
    return samples[num_warm:]


def row_of(num_running: int, num_blocks: int, samples: list[Sample]) -> dict[str, object]:
    totals = [sample.total * 1e3 for sample in samples]
    deciles = quantiles(totals, n=10)
    return {
        "name": "scheduler.step",
        "running": num_running,
        "blocks": num_blocks,
        "steps": len(samples),
        "median_ms": round(median(totals), 4),
        "p10_ms": round(deciles[0], 4),
        "p90_ms": round(deciles[-1], 4),
        "schedule_ms": round(median(s.schedule for s in samples) * 1e3, 4),
        "update_ms": round(median(s.update for s in samples) * 1e3, 4),
        "encode_ms": round(median(s.encode for s in samples) * 1e3, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="timed steps per case")
    parser.add_argument("--write", action="store_true", help="append rows to benchmarks/results")
    args = parser.parse_args()
    about = {**passport(), "msgspec": msgspec.__version__}
    print("".join(f"{title:>9}" for title in TITLES), " (ms)")
    gc.freeze()
    for num_running, num_blocks in (*SMALL_CACHE, *CASES):
        samples = run_case(num_running, num_blocks, num_steps=args.steps)
        row = row_of(num_running, num_blocks, samples)
        print("".join(f"{row[key]!s:>9}" for key in TITLES.values()))
        if args.write:
            keep_row("scheduler", {**row, **about})


if __name__ == "__main__":
    main()
