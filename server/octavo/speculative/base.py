"""What the worker asks of speculation. Knows tokens and counts; no tensors, no scheduler.

Drafts never change what is generated (see `ModelRunner._accept`), only how many steps it takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from octavo.types import SchedulerOutput, WorkerStats


class Outlook(NamedTuple):
    """A request that computes its last known token in this step and may draft behind it."""

    request_id: str
    token_ids: npt.NDArray[np.int32]  # [L] its known tokens; valid during the call alone
    max_drafts: int


class Drafter(Protocol):
    """Decides which requests get which drafts. One for each worker, called in this order."""

    def begin(self, step: SchedulerOutput) -> None:
        """A step comes: requests that it brings, and those that ended."""

    def draft(self, outlooks: Sequence[Outlook], *, num_tokens: int) -> Mapping[str, Sequence[int]]:
        """Drafts for some of these requests, at least one and at most ``max_drafts`` for each.

        ``num_tokens``: that the step computes without any draft. Must not raise.
        """

    def learn(
        self,
        drafts: Mapping[str, Sequence[int]],
        tokens: Mapping[str, Sequence[int]],
        *,
        num_tokens: int,
        seconds: float,
    ) -> None:
        """What the step yielded: for each request that sampled one token, and one for each draft
        of its that was accepted. ``num_tokens`` (drafts included) took so many seconds."""

    @property
    def num_wanted(self) -> int:
        """Drafts for each request that would pay in a step like the last; 0 = none."""

    def take_stats(self) -> WorkerStats | None:
        """What was counted of drafts since the last call; None: nothing."""


class NoDrafts:
    """`Drafter` that never drafts."""

    num_wanted = 0

    def begin(self, step: SchedulerOutput) -> None:
        pass

    def take_stats(self) -> WorkerStats | None:
        return None

    def draft(self, outlooks: Sequence[Outlook], *, num_tokens: int) -> Mapping[str, Sequence[int]]:
        return {}

    def learn(
        self,
        drafts: Mapping[str, Sequence[int]],
        tokens: Mapping[str, Sequence[int]],
        *,
        num_tokens: int,
        seconds: float,
    ) -> None:
        pass
