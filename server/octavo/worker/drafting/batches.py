"""Drafts for several requests at once by one model. Knows how drafts follow; no weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

from octavo.speculative import Drafted, GoesOn, Outlook, Proposal
from octavo.types import SchedulerOutput
from octavo.worker.drafting.base import Guesser, Job
from octavo.worker.drafting.drawer import Drawer
from octavo.worker.drafting.places import MAX_JOBS
from octavo.worker.request_table import RequestTable

_log = logging.getLogger(__name__)


class ModelProposer:
    """`BatchProposer` by a `Guesser`: it catches up with requests, then goes on draft by draft."""

    def __init__(
        self,
        guesser: Guesser,
        *,
        table: RequestTable,
        drawer: Drawer,
        seconds: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._guesser = guesser
        self._table = table
        self._drawer = drawer
        self._seconds = seconds

    def begin(self, step: SchedulerOutput) -> None:
        self._guesser.begin(step)

    def propose(
        self, outlooks: Sequence[Outlook], *, depths: Sequence[int], goes_on: GoesOn
    ) -> Drafted:
        jobs = [
            Job(
                request_id=outlook.request_id,
                row=self._table.row(outlook.request_id),
                num_known=len(outlook.token_ids),
                depth=depth,
            )
            for outlook, depth in zip(outlooks, depths, strict=True)
        ]
        first = more = 0.0
        num_more = num_read = 0
        for start in range(0, len(jobs), MAX_JOBS):
            times = self._draft(jobs[start : start + MAX_JOBS], goes_on)
            first += times[1] - times[0]
            more += times[-1] - times[1]
            num_more += len(times) - 2
            num_read += self._guesser.num_read
        return Drafted(
            proposals={job.request_id: Proposal(job.drafts, job.probs) for job in jobs},
            first_seconds=first,
            more_seconds=more,
            num_more=num_more,
            num_read=num_read,
        )

    @torch.inference_mode()
    def _draft(self, jobs: Sequence[Job], goes_on: GoesOn) -> list[float]:
        """The time at the start and after each pass."""
        times = [self._seconds()]
        live, guesses = self._guesser.catch_up(jobs)
        while live and guesses is not None:
            has_one = self._drawer.draw(guesses, live)
            times.append(self._seconds())
            kept = [
                index
                for index, job in enumerate(live)
                if has_one[index]
                and len(job.drafts) < job.depth
                and goes_on(job.request_id, job.probs)
            ]
            live = [live[index] for index in kept]
            if live:
                guesses = self._guesser.go_on(live, kept)
        if len(times) == 1:
            times.append(self._seconds())
        return times
