"""Who waits and who runs, and the blocks they hold. Knows no step and no token budget."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.kvcache.manager import KVCacheManager
from octavo.scheduler.policy import Policy, WaitingQueue
from octavo.scheduler.request import Request, Status


@dataclass(slots=True)
class Counters:
    """What happened since the counters were last read."""

    num_scheduled_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0  # prompt tokens looked up, once per request
    prefix_cache_hits: int = 0  # of those, found
    prefix_cache_host_hits: int = 0  # of those, in the host tier alone
    saved_blocks: int = 0  # to the host tier
    loaded_blocks: int = 0  # from it
    damaged_blocks: int = 0  # of those loaded
    preemptions: int = 0


class LiveRequests:
    """Every request between `add` and its end. A running one, and no other, owns blocks."""

    def __init__(self, *, kv: KVCacheManager, policy: Policy) -> None:
        self.kv = kv
        self.policy = policy
        self.by_id: dict[str, Request] = {}
        self.waiting = WaitingQueue(policy.key)
        self.running: dict[str, Request] = {}  # in the order of admission
        self.dropped_ids: list[str] = []  # stopped running; the worker is to be told
        self.counters = Counters()

    def add(self, request: Request) -> None:
        self.by_id[request.request_id] = request
        self.waiting.add(request)

    def start(self, request: Request) -> None:
        """It is about to run; the caller takes it from the waiting queue and gives it blocks."""
        request.status = Status.RUNNING
        self.running[request.request_id] = request

    def preempt(self, request: Request) -> None:
        """Takes its blocks; it will compute its tokens anew. What is in flight still counts."""
        self._stop(request)
        request.rewind()
        request.num_preemptions += 1
        self.counters.preemptions += 1
        self.waiting.add(request)

    def restart(self, request: Request) -> None:
        """As `preempt`, but what is in flight for it is void: it was computed on bad K/V."""
        if request.status is Status.RUNNING:
            self._stop(request)
            request.rewind()
            self.waiting.add(request)
        if request.status is not Status.FINISHED:
            request.drop_inflight()
            if request.first_token_time == 0.0:
                request.is_lookup_due = True  # what it was admitted on may be gone

    def retire(self, request: Request) -> None:
        """Ends it wherever it is; what is in flight for it is void."""
        if request.status is Status.RUNNING:
            self._stop(request)
        else:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        request.epoch += 1
        request.parent = None
        del self.by_id[request.request_id]

    def _stop(self, request: Request) -> None:
        del self.running[request.request_id]
        self.dropped_ids.append(request.request_id)
        self.kv.free(request.table)
