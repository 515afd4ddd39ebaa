"""What a source of drafts offers. Knows one request's tokens at a time; no step, cost or batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

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
