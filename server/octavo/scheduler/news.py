"""Makes the engine's news of requests: the last border of a step. Decides nothing."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from octavo.scheduler.request import Request
from octavo.types import EngineOutput, FinishReason, TokenLogprobs

# One output is made per running request and step, and a frozen dataclass's own __init__ would take
# most of an update's time; setting its slots directly takes a third of that.
_new_object = object.__new__
_set: dict[str, Any] = {f.name: EngineOutput.__dict__[f.name].__set__ for f in fields(EngineOutput)}
_set_request_id = _set.pop("request_id")
_set_tokens = _set.pop("new_token_ids")
_set_logprobs = _set.pop("new_logprobs")
_set_prompt_logprobs = _set.pop("new_prompt_logprobs")
_set_num_cached = _set.pop("num_cached_tokens")
_set_finish_reason = _set.pop("finish_reason")
_set_stop_reason = _set.pop("stop_reason")
_set_error = _set.pop("error")
_set_is_bad_request = _set.pop("is_bad_request")
_set_times = _set.pop("times")
assert not _set, f"of_running() leaves fields of EngineOutput unset: {list(_set)}"


def of_running(
    request: Request,
    tokens: tuple[int, ...],
    logprobs: tuple[TokenLogprobs, ...],
    prompt_logprobs: tuple[TokenLogprobs, ...],
) -> EngineOutput:
    """News of a request that goes on."""
    output = _new_object(EngineOutput)
    _set_request_id(output, request.request_id)
    _set_tokens(output, tokens)
    _set_logprobs(output, logprobs)
    _set_prompt_logprobs(output, prompt_logprobs)
    _set_num_cached(output, request.num_cached_tokens)
    _set_finish_reason(output, None)
    _set_stop_reason(output, None)
    _set_error(output, None)
    _set_is_bad_request(output, False)
    _set_times(output, None)
    return output


def of_ended(
    request: Request,
    reason: FinishReason,
    *,
    now: float,
    tokens: tuple[int, ...] = (),
    logprobs: tuple[TokenLogprobs, ...] = (),
    prompt_logprobs: tuple[TokenLogprobs, ...] = (),
    error: str | None = None,
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
