"""Makes the engine's news of requests: the last border of a step. Decides nothing."""

from __future__ import annotations

from octavo.scheduler.request import Request
from octavo.types import EngineOutput, FinishReason, TokenLogprobs

# One output is made per running request and step; its own __new__ takes twice as long.
_new = tuple.__new__
assert len(EngineOutput._fields) == 11, "of_running() knows other fields"


def of_running(
    request: Request,
    tokens: tuple[int, ...],
    logprobs: tuple[TokenLogprobs, ...],
    prompt_logprobs: tuple[TokenLogprobs, ...],
    drafts: tuple[int, int] | None = None,
) -> EngineOutput:
    """News of a request that goes on."""
    rest = (request.num_cached_tokens, None, None, None, False, None, drafts)
    return _new(EngineOutput, (request.request_id, tokens, logprobs, prompt_logprobs, *rest))


def of_ended(
    request: Request,
    reason: FinishReason,
    *,
    now: float,
    tokens: tuple[int, ...] = (),
    logprobs: tuple[TokenLogprobs, ...] = (),
    prompt_logprobs: tuple[TokenLogprobs, ...] = (),
    error: str | None = None,
    drafts: tuple[int, int] | None = None,
) -> EngineOutput:
    """The last news of a request."""
    return EngineOutput(
        request_id=request.request_id,
        new_token_ids=tokens,
        new_logprobs=logprobs,
        new_prompt_logprobs=prompt_logprobs,
        num_cached_tokens=request.num_cached_tokens,
        finish_reason=reason,
        stop_reason=request.stop_reason,
        error=error,
        times=request.times(finished=now),
        drafts=drafts,
    )


def undelivered(
    request: Request, start: int, logprobs: tuple[TokenLogprobs, ...]
) -> tuple[TokenLogprobs, ...]:
    """Of a chunk's prompt logprobs (positions ``start + 1`` up) those that are news.

    After a preemption in the middle of a prompt, its beginning is computed a second time.
    """
    fresh = logprobs[request.num_prompt_logprobs - start :]
    request.num_prompt_logprobs += len(fresh)
    return fresh
