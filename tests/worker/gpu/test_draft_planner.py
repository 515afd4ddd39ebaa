"""How many drafts steps have: what pays of a made-up device whose costs and tokens are known."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest

from octavo.config import SchedulerConfig
from octavo.types import SchedulerOutput, WorkerStats
from octavo.worker.gpu.chances import Chances
from octavo.worker.gpu.draft_planner import AutoPlanner, DraftPlanner, FixedPlanner, Outcome
from octavo.worker.gpu.lookup import max_drafts_of, speculation_of

SIZES = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass
class Device:
    """Steps of requests whose drafts are accepted with a chance of each request's own."""

    planner: DraftPlanner
    chances: list[float]
    seconds: Callable[[int], float]  # of a step, by its tokens
    max_inflight: int = 2
    rng: random.Random = field(default_factory=lambda: random.Random(5))
    num_tokens: int = 0
    took: float = 0.0
    num_drafts: list[int] = field(default_factory=list)  # of each step
    drafted: dict[str, int] = field(default_factory=dict)

    def run(self, num_steps: int) -> None:
        inflight: list[tuple[Mapping[str, int], int]] = []
        for number in range(num_steps):
            room = self.planner.num_wanted
            names = [f"r{i}" for i in range(len(self.chances))]
            drafts = self.planner.choose(
                SchedulerOutput(
                    step=number,
                    num_scheduled_tokens=dict.fromkeys(names, 1 + room),
                    max_drafts=dict.fromkeys(names, room) if room else {},
                )
            )
            assert all(0 < count <= room for count in drafts.values())
            inflight.append((drafts, len(names) + sum(drafts.values())))
            if len(inflight) == self.max_inflight:
                self.finish(*inflight.pop(0))

    def finish(self, drafts: Mapping[str, int], num_tokens: int) -> None:
        tokens = {}
        for i, chance in enumerate(self.chances):
            count, most = 1, drafts.get(f"r{i}", 0)
            while count <= most and self.rng.random() < chance:
                count += 1
            tokens[f"r{i}"] = (0,) * count
            self.drafted[f"r{i}"] = self.drafted.get(f"r{i}", 0) + most
        seconds = self.seconds(num_tokens) * self.rng.uniform(0.98, 1.02)
        self.took += seconds
        self.num_tokens += sum(map(len, tokens.values()))
        self.num_drafts.append(sum(drafts.values()))
        self.planner.learn(
            Outcome(
                num_requests=len(tokens),
                num_tokens=num_tokens,
                is_plain=True,
                tokens=tokens,
                seconds=seconds,
                is_typical=True,
                drafts={name: (count, count) for name, count in drafts.items()},
            )
        )

    @property
    def gain(self) -> float:
        """Tokens a second beside those without drafts."""
        plain = len(self.chances) / self.seconds(len(self.chances))
        return self.num_tokens / self.took / plain


def memory_bound(num_tokens: int) -> float:
    """About an 8B model's step on an H100: 6 ms, and arithmetic from some 200 tokens on."""
    return 6e-3 + 5e-6 * num_tokens + max(0, num_tokens - 200) * 25e-6


def auto(max_drafts: int = 7, max_samples: int = 512) -> AutoPlanner:
    return AutoPlanner(max_drafts, max_samples=max_samples, step_sizes=SIZES)


def test_one_request_that_repeats_itself_is_sped_up() -> None:
    device = Device(auto(), [0.9], memory_bound)
    device.run(600)
    assert device.gain > 3.0
    assert max(device.num_drafts[200:]) == 7


@pytest.mark.parametrize("size", [1, 16, 128])
def test_requests_that_never_repeat_lose_next_to_nothing(size: int) -> None:
    device = Device(auto(), [0.02] * size, lambda n: memory_bound(n) + 2e-5 * (n - size))
    device.run(3000)
    assert device.gain > 0.97
    assert sum(device.num_drafts[500:]) < 0.3 * 7 * 2500 * size


def test_a_crowd_has_drafts_where_they_are_free_and_none_where_they_cost() -> None:
    """128 requests: of chances worth it, up to where arithmetic begins; beyond, none."""
    free = Device(auto(), [0.7] * 128, lambda n: 6e-3 + 5e-6 * n)
    free.run(800)
    assert free.gain > 1.3
    dear = Device(auto(), [0.7] * 128, lambda n: 1e-3 + 1e-4 * n)
    dear.run(2000)
    assert dear.gain > 0.97
    assert sum(dear.num_drafts[1000:]) < 128 * 100


def test_requests_get_drafts_by_their_own_chances() -> None:
    chances = [0.85, 0.02, 0.02, 0.85, 0.02, 0.02, 0.02, 0.02]
    device = Device(auto(), chances, lambda n: 1e-3 + 1.5e-4 * n)
    device.run(3000)
    likely = device.drafted["r0"] + device.drafted["r3"]
    assert likely > 3 * (sum(device.drafted.values()) - likely)
    assert device.gain > 1.03


def test_what_speculation_brought_is_counted_once() -> None:
    planner = auto()
    device = Device(planner, [0.6, 0.6], memory_bound)
    stats = [planner.add_stats(WorkerStats(graph_steps=3))]
    for _ in range(5):
        device.run(60)
        stats.append(planner.add_stats(WorkerStats(graph_steps=3)))
    assert all(each.graph_steps == 3 for each in stats)
    assert sum(each.draft_tokens for each in stats) == sum(device.num_drafts) > 0
    accepted = sum(each.accepted_tokens for each in stats)
    assert accepted == device.num_tokens - 2 * len(device.num_drafts)
    assert sum(sum(each.accepted_per_position) for each in stats) == accepted
    assert sum(each.draft_seconds_saved for each in stats) > 0
    assert planner.add_stats(WorkerStats()) == WorkerStats()


def test_drafts_that_were_made_up_count_if_they_were_accepted() -> None:
    planner = FixedPlanner(2, max_samples=8)
    planner.learn(
        Outcome(
            num_requests=3,
            num_tokens=9,
            is_plain=True,
            tokens={"a": (1,), "b": (1, 2), "c": (1,), "failed": ()},
            seconds=1.0,
            is_typical=True,
            drafts={"a": (2, 0), "b": (2, 0), "c": (2, 2)},
        )
    )
    stats = planner.add_stats(WorkerStats())
    assert (stats.drafts, stats.draft_tokens, stats.accepted_tokens) == (2, 4, 1)


def test_a_fixed_number_shrinks_where_a_step_can_draw_no_more() -> None:
    planner = FixedPlanner(5, max_samples=16)

    def drafts(*rooms: int, others: int = 0) -> list[int]:
        counts = {f"r{i}": 1 + room for i, room in enumerate(rooms)}
        counts |= {f"other-{i}": 9 for i in range(others)}
        step = SchedulerOutput(
            step=0,
            num_scheduled_tokens=counts,
            max_drafts={f"r{i}": room for i, room in enumerate(rooms)},
        )
        chosen = planner.choose(step)
        return [chosen.get(f"r{i}", 0) for i in range(len(rooms))]

    assert planner.num_wanted == 5
    assert drafts(5) == [5]
    assert drafts(5, 2) == [5, 2]
    assert drafts(5, 5, 1) == [4, 4, 1]
    assert drafts(5, others=12) == [3]
    assert drafts(*[5] * 9) == [0] * 9


def test_chances_follow_what_was_accepted() -> None:
    chances = Chances()
    for _ in range(200):
        chances.learn("good", 4, num_accepted=4)
        chances.learn("bad", 4, num_accepted=0)
    good, bad, new = chances.survivals(["good", "bad", "new"], 4).tolist()
    assert good[3] > 0.8 and bad[0] < 0.1 and bad[0] < new[0] < good[0]
    for row in (good, bad, new):
        assert row == sorted(row, reverse=True)
    for _ in range(200):
        chances.pass_over("bad")
    assert chances.survivals(["bad"], 1)[0, 0] == pytest.approx(new[0], abs=0.1)
    chances.forget("good")
    assert chances.survivals(["good"], 4).tolist() == chances.survivals(["x"], 4).tolist()


def test_methods_of_a_gpu() -> None:
    def config(text: str) -> SchedulerConfig:
        return SchedulerConfig(speculative_config=text)

    assert speculation_of(config("")).method == "off"
    assert max_drafts_of(config("")) == max_drafts_of(config('{"method": "off"}')) == 0
    assert max_drafts_of(config('{"method": "auto"}')) == 7
    assert max_drafts_of(config('{"method": "auto", "num_speculative_tokens": 3}')) == 3
    assert max_drafts_of(config('{"method": "ngram", "num_speculative_tokens": 20}')) == 20
    with pytest.raises(ValueError, match=r"on a GPU must have a method of ngram, auto, off so far"):
        speculation_of(config('{"method": "suffix"}'))
    with pytest.raises(ValueError, match="can have no model so far"):
        speculation_of(config('{"method": "auto", "model": "./head"}'))
