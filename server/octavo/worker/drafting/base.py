"""What drafts by models are made of. Knows requests' rows and rows of logits; no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from octavo.types import SchedulerOutput
from octavo.worker.input_batch import InputBatch


class StepWatcher(Protocol):
    """Sees what the target computed."""

    def see(self, batch: InputBatch) -> None:
        """A batch was computed, and the table knows what of it was accepted. Must not raise."""

    def warm(self) -> None:
        """Runs what it will run, so that nothing is run for the first time for a request. Writes
        into the first block, which counts as never written afterwards."""


class NoWatcher:
    """`StepWatcher` that does not look."""

    def see(self, batch: InputBatch) -> None:
        pass

    def warm(self) -> None:
        pass


@dataclass(slots=True, kw_only=True)
class Job:
    """Drafts of one request in the making."""

    request_id: str
    row: int  # of the request table
    num_known: int
    depth: int  # most drafts
    drafts: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guesses:
    """What a pass says of the next tokens of S requests."""

    all_logits: Tensor  # [at least S, V']
    rows: Sequence[int] | None = None  # of all_logits, one for each request; None: all
    # Of each request the likeliest token and its chance (NaN: a logit is not finite); None: see
    # the logits.
    best: tuple[Sequence[int], Sequence[float]] | None = None

    @property
    def logits(self) -> Tensor:
        """[S, V']; may be changed."""
        return self.all_logits if self.rows is None else self.all_logits[list(self.rows)]


class Guesser(StepWatcher, Protocol):
    """A model with K/V of its own under the target's block ids. It catches up with what requests
    have become when it is asked to, and then goes on by its own guesses."""

    @property
    def num_read(self) -> int:
        """Tokens that the last `catch_up` read."""

    def begin(self, step: SchedulerOutput) -> None:
        """A step comes: requests that it brings, and those that ended."""

    def catch_up(self, jobs: Sequence[Job]) -> tuple[list[Job], Guesses | None]:
        """Those jobs that can be drafted for, and guesses at their next tokens."""

    def go_on(self, jobs: Sequence[Job], kept: Sequence[int]) -> Guesses:
        """Guesses behind the last draft of each job. ``kept``: the places that these jobs had in
        the call before, rising."""
