"""What a source of drafts offers. Knows one request's tokens at a time; no step, cost or batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from octavo.speculative.base import Outlook
from octavo.types import SchedulerOutput

TokenIds = npt.NDArray[np.int32]  # [L] a request's known tokens


class Proposal(NamedTuple):
    """A guess at the tokens that come next.

    ``probs[i]``: how likely ``token_ids[i]`` is accepted if those before it are; None = no idea.
    """

    token_ids: Sequence[int] = ()
    probs: Sequence[float] | None = None


NO_PROPOSAL = Proposal()


class Proposer(Protocol):
    """Guesses at live requests' next tokens; may raise, which costs that request its drafts."""

    def begin(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        num_prompt_tokens: int,
        salt: str | None,
    ) -> None:
        """A request comes, or comes anew after a preemption: prompt, then what it generated.

        ``salt``: whose it is. Nothing proposed to it may stem from tokens under another salt.
        """

    def extend(self, request_id: str, token_ids: Sequence[int]) -> None:
        """It generated these."""

    def end(self, request_id: str) -> None:
        """It ended or was preempted."""

    def propose(self, request_id: str, token_ids: TokenIds, *, max_drafts: int) -> Proposal:
        """At most ``max_drafts`` tokens behind ``token_ids``, all that it has; often none."""


class Drafted(NamedTuple):
    """What a model proposed for some requests, and what it took.

    It reads what requests have become in a first pass, which gives a draft for each, and gives one
    more for each in every further pass.
    """

    proposals: Mapping[str, Proposal]
    first_seconds: float = 0.0
    more_seconds: float = 0.0
    num_more: int = 0  # further passes
    num_read: int = 0  # tokens in the first pass


# Whether a request whose drafts so far have these chances should get one more.
GoesOn = Callable[[str, Sequence[float]], bool]


class BatchProposer(Protocol):
    """Guesses for several requests at once, in passes of a model that take time; may raise."""

    def begin(self, step: SchedulerOutput) -> None:
        """A step comes: requests that it brings, and those that ended."""

    def propose(
        self, outlooks: Sequence[Outlook], *, depths: Sequence[int], goes_on: GoesOn
    ) -> Drafted:
        """For each of these requests at most so many tokens; none where it must read more first."""
