"""A model that proposes, as steps see it: it may fail or be slow. Knows no cost and no tensors.

A request on which it raises, or is slow time and again, goes on without its drafts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from octavo.speculative.base import Outlook
from octavo.speculative.proposer import BatchProposer, Drafted, GoesOn, Proposal
from octavo.speculative.sources import DraftCounts
from octavo.types import SchedulerOutput

_log = logging.getLogger(__name__)

MAX_SECONDS = 2.0  # of one call: a model's first pass over a prompt's chunk, at most
_MAX_SLOW = 3  # calls for one request that may take longer
_NOTHING = Drafted({})


class GuardedBatch:
    """A `BatchProposer` that never raises."""

    def __init__(
        self,
        proposer: BatchProposer,
        *,
        counts: DraftCounts,
        seconds: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._proposer = proposer
        self._counts = counts
        self._seconds = seconds
        self._num_slow: dict[str, int] = {}  # of live requests that it may propose to
        self._has_logged_error = self._has_logged_slow = False

    def begin(self, step: SchedulerOutput) -> None:
        for request_id in step.finished_request_ids:
            self._num_slow.pop(request_id, None)
        for request in step.new_requests:
            self._num_slow[request.request_id] = 0
        try:
            self._proposer.begin(step)
        except Exception as error:  # it no longer knows whom it drafts for
            for request_id in list(self._num_slow):
                self._fail(request_id, error)

    def is_able(self, request_id: str) -> bool:
        """Whether it has neither failed on the request nor been slow too often."""
        return request_id in self._num_slow

    def propose(
        self, outlooks: Sequence[Outlook], *, depths: Sequence[int], goes_on: GoesOn
    ) -> Drafted:
        """At most so many tokens for each, and no more than outlooks have room for."""
        asked = [
            (outlook, min(depth, outlook.max_drafts))
            for outlook, depth in zip(outlooks, depths, strict=True)
            if min(depth, outlook.max_drafts) > 0 and self.is_able(outlook.request_id)
        ]
        if not asked:
            return _NOTHING
        began = self._seconds()
        try:
            found = self._ask(asked, goes_on)
        except Exception as error:
            return self._ask_each(asked, goes_on, error)
        if self._seconds() - began > MAX_SECONDS:
            for outlook, _ in asked:
                self._note_slow(outlook.request_id)
        return found

    def _ask(self, asked: Sequence[tuple[Outlook, int]], goes_on: GoesOn) -> Drafted:
        outlooks = [outlook for outlook, _ in asked]
        return self._proposer.propose(
            outlooks, depths=[depth for _, depth in asked], goes_on=goes_on
        )

    def _ask_each(
        self, asked: Sequence[tuple[Outlook, int]], goes_on: GoesOn, error: Exception
    ) -> Drafted:
        """One by one, as one of them made it fail."""
        proposals: dict[str, Proposal] = {}
        for one in asked:
            try:
                if len(asked) > 1:
                    proposals.update(self._ask([one], goes_on).proposals)
                else:
                    self._fail(one[0].request_id, error)
            except Exception as own_error:
                self._fail(one[0].request_id, own_error)
        return Drafted(proposals)

    def _fail(self, request_id: str, error: Exception) -> None:
        self._counts.num_requests_failed += 1
        del self._num_slow[request_id]
        if not self._has_logged_error:
            self._has_logged_error = True
            _log.error("request %s goes on without a model's drafts", request_id, exc_info=error)

    def _note_slow(self, request_id: str) -> None:
        self._num_slow[request_id] += 1
        if self._num_slow[request_id] < _MAX_SLOW:
            return
        del self._num_slow[request_id]
        self._counts.num_requests_slow += 1
        if not self._has_logged_slow:
            self._has_logged_slow = True
            _log.warning(
                "request %s goes on without a model's drafts: %d took more than %g s to propose",
                request_id,
                _MAX_SLOW,
                MAX_SECONDS,
            )
