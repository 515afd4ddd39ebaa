"""One step while it is being planned and until its results are in. Knows who; decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.scheduler.request import Request
from octavo.types import BlockCopy, NewRequest, SchedulerOutput

# One request's share of a step: request, epoch, start, end, samples. It computes tokens
# ``[start, end)``. A bare tuple, since one is made per request and step.
Entry = tuple[Request, int, int, int, bool]


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
    new_block_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    new_requests: list[NewRequest] = field(default_factory=list)
    block_copies: list[BlockCopy] = field(default_factory=list)
    # Who made which blocks findable here; who was admitted on which blocks of others, or by fork.
    registered: list[tuple[Request, int, bytes]] = field(default_factory=list)
    admitted: list[tuple[Request, tuple[int, ...], Request | None]] = field(default_factory=list)

    def undo(self, request: Request) -> None:
        """Takes a request that runs already back out of the step."""
        i = next(i for i, entry in enumerate(self.entries) if entry[0] is request)
        _, _, start, end, samples = self.entries.pop(i)
        self.budget += end - start
        del self.num_scheduled[request.request_id]
        self.new_block_ids.pop(request.request_id, None)
        if samples and request.num_tokens > end:
            request.num_tokens -= 1

    def output(self, finished_request_ids: tuple[str, ...]) -> SchedulerOutput:
        return SchedulerOutput(
            step=self.step,
            new_requests=tuple(self.new_requests),
            num_scheduled_tokens=self.num_scheduled,
            new_block_ids=self.new_block_ids,
            block_copies=tuple(self.block_copies),
            finished_request_ids=finished_request_ids,
        )


def blame(plans: list[Plan], suspects: set[Request]) -> tuple[set[Request], set[Request]]:
    """Who failed, and whose computed tokens build on theirs.

    ``plans``: the failed step and those submitted after it, in order; ``suspects``: requests that
    failed in the first. A request builds on another when it was admitted on blocks the other
    registered in these steps, or by fork of it. Whoever depends was admitted later than the one it
    depends on, so one pass in order finds all. A suspect that builds on another has an excuse.
    """
    blocks_of: dict[Request, list[int]] = {}
    newcomers: set[Request] = set()
    for plan in plans:
        newcomers.update(request for request, _, _ in plan.admitted)
        for owner, block, _ in plan.registered:
            blocks_of.setdefault(owner, []).append(block)
    guilty = suspects - newcomers
    victims: set[Request] = set()
    bad_blocks = {block for request in guilty for block in blocks_of.get(request, ())}
    for plan in plans:
        for request, shared, parent in plan.admitted:
            if parent in guilty or parent in victims or not bad_blocks.isdisjoint(shared):
                victims.add(request)
            elif request in suspects:
                guilty.add(request)
            else:
                continue
            bad_blocks.update(blocks_of.get(request, ()))
    return guilty, victims
