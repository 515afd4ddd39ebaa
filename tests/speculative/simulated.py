"""A device that takes given times and accepts drafts with given chances, and a drafter on it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from octavo.speculative.base import Outlook
from octavo.speculative.controller import AutoDrafter, FixedDrafter
from octavo.speculative.proposer import Proposal, TokenIds
from octavo.types import NewRequest, SamplingParams, SchedulerOutput

RIGHT, WRONG = 1, 0
MAX_DRAFTS = 8
Cost = Callable[[int], float]  # tokens -> seconds


def interpolated(*points: tuple[int, float]) -> Cost:
    """Milliseconds by tokens, given at some."""
    xs, ys = zip(*points, strict=True)
    return lambda num_tokens: float(np.interp(num_tokens, xs, ys)) * 1e-3


# SmolLM2-135M on two cores; a GPU bound by bandwidth; and what has nothing to give away.
CPU = interpolated((1, 4.5), (2, 4.8), (4, 5.2), (8, 7), (16, 11), (32, 19), (512, 259))
FLAT = interpolated((1, 8.0), (512, 9.0))
LINEAR = interpolated((1, 1.0), (512, 512.0))


class VirtualSeconds:
    """A clock that others move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Guesser:
    """`Proposer` that has a draft in some steps, each token of which is right with some chance."""

    def __init__(self, seconds: VirtualSeconds, *, chance: float, seed: int = 0) -> None:
        self.chance = chance
        self.share = 1.0  # of calls with a proposal
        self.has_probs = True
        self.claimed: float | None = None  # the chance that it tells; None = the true one
        self.took = 40e-6
        self._seconds = seconds
        self._rng = random.Random(seed)

    def begin(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        num_prompt_tokens: int,
        salt: str | None,
    ) -> None:
        pass

    def extend(self, request_id: str, token_ids: Sequence[int]) -> None:
        pass

    def end(self, request_id: str) -> None:
        pass

    def propose(self, request_id: str, token_ids: TokenIds, *, max_drafts: int) -> Proposal:
        self._seconds.now += self.took
        if self._rng.random() >= self.share:
            return Proposal()
        tokens = [RIGHT if self._rng.random() < self.chance else WRONG for _ in range(max_drafts)]
        claimed = self.chance if self.claimed is None else self.claimed
        return Proposal(tokens, [claimed] * max_drafts if self.has_probs else None)


@dataclass
class Record:
    """Of each step: requests, tokens computed, tokens drawn, seconds, and those without drafts."""

    requests: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    without: list[float] = field(default_factory=list)  # for as many tokens drawn

    def speedup(self, start: int = 0) -> float:
        return sum(self.without[start:]) / sum(self.seconds[start:])

    def least_speedup(self, window: float = 60.0) -> float:
        """Over any so many seconds of steps."""
        ends = np.cumsum(self.seconds)
        gained = np.concatenate([[0.0], np.cumsum(self.without)])
        starts = np.concatenate([[0.0], ends])
        least = float("inf")
        for i, start in enumerate(starts[:-1]):
            j = int(np.searchsorted(starts, start + window))
            if j >= len(starts):
                break
            least = min(least, (gained[j] - gained[i]) / (starts[j] - start))
        return least

    def drafts(self, start: int = 0) -> float:
        """For each request and step."""
        requests = sum(self.requests[start:])
        return (sum(self.computed[start:]) - requests) / requests


class Simulation:
    """Steps of so many requests at a time, each drawing ``length`` tokens."""

    def __init__(
        self,
        cost: Cost,
        *,
        chance: float,
        length: int = 200,
        noise: float = 0.03,
        seed: int = 0,
        num_drafts: int | None = None,
    ) -> None:
        self.seconds = VirtualSeconds()
        self.guesser = Guesser(self.seconds, chance=chance, seed=seed)
        self.auto = AutoDrafter(self.guesser, max_drafts=MAX_DRAFTS, seconds=self.seconds)
        self.drafter: AutoDrafter | FixedDrafter = self.auto
        if num_drafts is not None:
            self.drafter = FixedDrafter(self.guesser, num_drafts=num_drafts, seconds=self.seconds)
        self.cost = cost
        self.record = Record()
        self._length = length
        self._noise = noise
        self._rng = random.Random(seed + 1)
        self._live: dict[str, int] = {}  # request -> tokens that it will yet draw
        self._finished: list[str] = []
        self._number = 0
        self._known = np.zeros(4, np.int32)

    def run(self, steps: int, *, requests: int) -> Record:
        """The record so far, of these steps and all before."""
        for _ in range(steps):
            self.step(requests)
        return self.record

    def step(self, requests: int) -> None:
        new = []
        while len(self._live) < requests:
            self._number += 1
            name = f"r{self._number}"
            # Not all at once: as if they had come one after the other.
            self._live[name] = max(1, int(self._length * self._rng.uniform(0.2, 1.8)))
            new.append(_new_request(name))
        wanted = self.drafter.num_wanted
        room = {n: min(wanted, left - 1) for n, left in self._live.items() if wanted and left > 1}
        counts = {name: 1 + room.get(name, 0) for name in self._live}
        began = self.seconds.now
        self.drafter.begin(
            SchedulerOutput(
                step=len(self.record.seconds),
                new_requests=tuple(new),
                num_scheduled_tokens=counts,
                max_drafts=room,
                finished_request_ids=tuple(self._finished),
            )
        )
        self._finished.clear()
        drafts = {}
        num_requests = len(self._live)
        if room:
            outlooks = [Outlook(name, self._known, most) for name, most in room.items()]
            drafts = dict(self.drafter.draft(outlooks, num_tokens=num_requests))
        assert all(1 <= len(draft) <= room[name] for name, draft in drafts.items())
        computed = num_requests + sum(map(len, drafts.values()))
        took = self.cost(computed) * max(0.5, self._rng.gauss(1.0, self._noise))
        self.seconds.now += took
        tokens = {name: (RIGHT,) * _num_drawn(drafts.get(name, ())) for name in self._live}
        self.drafter.learn(drafts, tokens, num_tokens=computed, seconds=took)
        drawn = sum(map(len, tokens.values()))
        self.record.requests.append(num_requests)
        self.record.computed.append(computed)
        self.record.drawn.append(drawn)
        self.record.seconds.append(self.seconds.now - began)
        # What these tokens would have taken on this device, with the same luck.
        self.record.without.append(
            took / self.cost(computed) * self.cost(num_requests) * drawn / num_requests
        )
        for name, found in tokens.items():
            self._live[name] -= len(found)
            if self._live[name] <= 0:
                del self._live[name]
                self._finished.append(name)


def _num_drawn(draft: Sequence[int]) -> int:
    number = 1
    for token in draft:
        if token != RIGHT:
            break
        number += 1
    return number


def _new_request(name: str) -> NewRequest:
    return NewRequest(
        request_id=name,
        token_ids=(5,),
        num_prompt_tokens=1,
        num_computed_tokens=0,
        block_ids=(),
        params=SamplingParams(),
    )
