"""A proposer that may fail or be slow, and what is counted of drafts. Knows no cost and no batch.

A request whose proposer raises, or is slow time and again, goes on without drafts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from octavo.speculative.base import Outlook
from octavo.speculative.proposer import NO_PROPOSAL, Proposal, Proposer
from octavo.types import SchedulerOutput, WorkerStats

_log = logging.getLogger(__name__)

MAX_SECONDS = 5e-3  # of one proposal
_MAX_SLOW = 3  # proposals of one request that may take longer: the machine's fault, perhaps


@dataclass(slots=True, kw_only=True)
class DraftCounts:
    """All drafts since the start."""

    num_drafts: int = 0  # times a request got drafts
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    # Beside what the same tokens would have taken without drafts; and what that would have been.
    seconds_saved: float = 0.0
    seconds_without: float = 0.0
    seconds_drafting: float = 0.0
    gain: float | None = None  # throughput of the last minute beside none, less 1; None = unknown
    num_switched_off: int = 0  # times that drafts did not pay
    num_guarded: int = 0  # of those, times that the guarantee called for it
    num_requests_failed: int = 0  # whose proposer raised
    num_requests_slow: int = 0

    def since(self, before: DraftCounts) -> WorkerStats:
        """The difference to an earlier state, as it is told to the engine."""
        old = before.accepted_per_position
        old = [*old, *[0] * (len(self.accepted_per_position) - len(old))]
        pairs = zip(self.accepted_per_position, old, strict=True)
        failed = self.num_requests_failed + self.num_requests_slow
        return WorkerStats(
            drafts=self.num_drafts - before.num_drafts,
            draft_tokens=self.num_draft_tokens - before.num_draft_tokens,
            accepted_tokens=self.num_accepted_tokens - before.num_accepted_tokens,
            accepted_per_position=tuple(new - was for new, was in pairs),
            draft_seconds_saved=self.seconds_saved - before.seconds_saved,
            draft_seconds_without=self.seconds_without - before.seconds_without,
            drafting_seconds=self.seconds_drafting - before.seconds_drafting,
            speculation_gain=self.gain,
            speculation_guarded=self.num_guarded - before.num_guarded,
            speculation_switched_off=self.num_switched_off - before.num_switched_off,
            failed_proposers=failed - before.num_requests_failed - before.num_requests_slow,
        )

    def add(self, drafts: Mapping[str, Sequence[int]], tokens: Mapping[str, Sequence[int]]) -> None:
        """What a step made of its drafts."""
        for request_id, draft in drafts.items():
            num_accepted = len(tokens.get(request_id, (0,))) - 1
            self.num_drafts += 1
            self.num_draft_tokens += len(draft)
            self.num_accepted_tokens += num_accepted
            positions = self.accepted_per_position
            if len(positions) < len(draft):
                positions += [0] * (len(draft) - len(positions))
            for i in range(num_accepted):
                positions[i] += 1


class Counting:
    """A drafter that tells what its ``counts`` have counted."""

    def __init__(self) -> None:
        self.counts = DraftCounts()
        self._told = DraftCounts()

    def take_stats(self) -> WorkerStats | None:
        if self.counts == self._told:
            return None
        stats = self.counts.since(self._told)
        positions = list(self.counts.accepted_per_position)
        self._told = replace(self.counts, accepted_per_position=positions)
        return stats


class GuardedProposer:
    """A proposer as steps see it; nothing here raises."""

    def __init__(
        self,
        proposer: Proposer,
        *,
        counts: DraftCounts,
        seconds: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._proposer = proposer
        self._counts = counts
        self._seconds = seconds
        self._num_slow: dict[str, int] = {}  # of live requests, slow proposals
        self._has_logged_error = self._has_logged_slow = False

    def begin(self, step: SchedulerOutput) -> None:
        """Requests that a step ends, and those that it brings."""
        for request_id in step.finished_request_ids:
            if self._num_slow.pop(request_id, None) is not None:
                self._end(request_id)
        for request in step.new_requests:
            request_id = request.request_id
            if self._num_slow.pop(request_id, None) is not None:
                self._end(request_id)
            try:
                self._proposer.begin(
                    request_id,
                    request.token_ids,
                    num_prompt_tokens=request.num_prompt_tokens,
                    salt=request.cache_salt,
                )
            except Exception as error:
                self._fail(request_id, error)
            else:
                self._num_slow[request_id] = 0

    def extend(self, tokens: Mapping[str, Sequence[int]]) -> None:
        for request_id, new in tokens.items():
            if request_id in self._num_slow:
                try:
                    self._proposer.extend(request_id, new)
                except Exception as error:
                    self._fail(request_id, error)

    def propose(self, outlook: Outlook, *, max_drafts: int) -> Proposal:
        """At most so many tokens, and no more than the outlook has room for."""
        request_id = outlook.request_id
        num_slow = self._num_slow.get(request_id)
        if num_slow is None:
            return NO_PROPOSAL
        most = min(max_drafts, outlook.max_drafts)
        began = self._seconds()
        try:
            proposal = self._proposer.propose(request_id, outlook.token_ids, max_drafts=most)
        except Exception as error:
            self._fail(request_id, error)
            return NO_PROPOSAL
        if self._seconds() - began > MAX_SECONDS:
            self._num_slow[request_id] = num_slow + 1
            if num_slow + 1 == _MAX_SLOW:
                self._drop_slow(request_id)
        if len(proposal.token_ids) > most:
            probs = proposal.probs
            return Proposal(proposal.token_ids[:most], None if probs is None else probs[:most])
        return proposal

    def _fail(self, request_id: str, error: Exception) -> None:
        self._counts.num_requests_failed += 1
        if not self._has_logged_error:
            self._has_logged_error = True
            _log.error("request %s goes on without drafts", request_id, exc_info=error)
        if self._num_slow.pop(request_id, None) is not None:
            self._end(request_id)

    def _drop_slow(self, request_id: str) -> None:
        self._counts.num_requests_slow += 1
        if not self._has_logged_slow:
            self._has_logged_slow = True
            _log.warning(
                "request %s goes on without drafts: %d took more than %g ms to propose",
                request_id,
                _MAX_SLOW,
                MAX_SECONDS * 1e3,
            )
        del self._num_slow[request_id]
        self._end(request_id)

    def _end(self, request_id: str) -> None:
        try:
            self._proposer.end(request_id)
        except Exception:
            self._counts.num_requests_failed += 1
