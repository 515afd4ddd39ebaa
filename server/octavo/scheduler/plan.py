"""One step while it is being planned and until its results are in. Knows who; decides nothing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from octavo.kvcache.tiers import Moves
from octavo.scheduler.request import Request
from octavo.types import BlockCopy, NewRequest, SchedulerOutput

# One request's share of a step: request, epoch, start, end, samples, drafts. It computes tokens
# ``[start, end)``, the last ``drafts`` of which are guesses. A bare tuple, since one is made per
# request and step.
Entry = tuple[Request, int, int, int, bool, int]


@dataclass(slots=True, eq=False)
class Plan:
    """What the scheduler has put into a step, and what depends on whom in it."""

    step: int
    budget: int  # tokens left
    num_reserved: int = 0  # available blocks that running requests' known tokens will take
    num_prompt_tokens: int = 0
    has_preempted: bool = False
    entries: list[Entry] = field(default_factory=list)
    num_scheduled: dict[str, int] = field(default_factory=dict)
    max_drafts: dict[str, int] = field(default_factory=dict)
    new_block_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    new_requests: list[NewRequest] = field(default_factory=list)
    block_copies: list[BlockCopy] = field(default_factory=list)
    moves: Moves = field(default_factory=Moves)
    # Who made which contents findable here, by key; who was admitted on contents of others, or by
    # fork. What comes from the host tier is both.
    registered: list[tuple[Request, bytes]] = field(default_factory=list)
    admitted: list[tuple[Request, tuple[bytes, ...], Request | None]] = field(default_factory=list)

    def undo(self, request: Request) -> None:
        """Takes a request that runs already back out of the step."""
        i = next(i for i, entry in enumerate(self.entries) if entry[0] is request)
        _, _, start, end, samples, drafts = self.entries.pop(i)
        self.budget += end - start
        del self.num_scheduled[request.request_id]
        self.max_drafts.pop(request.request_id, None)
        self.new_block_ids.pop(request.request_id, None)
        if samples and request.num_tokens > end:
            request.num_tokens -= 1
        request.num_tokens -= drafts

    def output(self, finished_request_ids: tuple[str, ...]) -> SchedulerOutput:
        return SchedulerOutput(
            step=self.step,
            new_requests=tuple(self.new_requests),
            num_scheduled_tokens=self.num_scheduled,
            max_drafts=self.max_drafts,
            new_block_ids=self.new_block_ids,
            saves=tuple(self.moves.saves.values()),
            loads=tuple(self.moves.loads.values()),
            block_copies=tuple(self.block_copies),
            finished_request_ids=finished_request_ids,
        )


def blame(
    plans: list[Plan], suspects: set[Request], *, bad_keys: Collection[bytes] = ()
) -> tuple[set[Request], set[Request]]:
    """Who failed, and whose computed tokens build on theirs.

    ``plans``: the failed step and those submitted after it, in order; ``suspects``: requests that
    failed in the first; ``bad_keys``: contents that are not what they should be, by nobody's fault.
    A request builds on another when it was admitted on contents the other registered in these
    steps, or by fork of it. Whoever depends was admitted later than the one it
    depends on, so one pass in order finds all. A suspect that builds on another has an excuse.
    """
    keys_of: dict[Request, list[bytes]] = {}
    newcomers: set[Request] = set()
    for plan in plans:
        newcomers.update(request for request, _, _ in plan.admitted)
        for owner, key in plan.registered:
            keys_of.setdefault(owner, []).append(key)
    guilty = suspects - newcomers
    victims: set[Request] = set()
    bad = {*bad_keys, *(key for request in guilty for key in keys_of.get(request, ()))}
    for plan in plans:
        for request, shared, parent in plan.admitted:
            if parent in guilty or parent in victims or not bad.isdisjoint(shared):
                victims.add(request)
            elif request in suspects:
                guilty.add(request)
            else:
                continue
            bad.update(keys_of.get(request, ()))
    return guilty, victims
