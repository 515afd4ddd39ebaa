"""``POST /v1/completions``. Knows the format of completions, whole and streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.api.errors import ApiError
from octavo.api.front import Front
from octavo.api.generation import Job, Usage, gather_job, make_job
from octavo.api.live import LiveStream
from octavo.api.logprobs import LogprobFormat, prompt_text
from octavo.api.prompts import completion_prompts, is_batch
from octavo.api.request_body import answering, documented, read_model
from octavo.api.schemas import MAX_TOTAL_CHOICES, CompletionRequest, StreamOptions
from octavo.api.sse import Event, ShortForm, last_event, make_event, respond
from octavo.engine.outputs import ChoiceDelta, ChoiceResult, best_choices
from octavo.types import TokenLogprobs


def routes(front: Front) -> APIRouter:
    """The endpoint, for one front end."""
    router = APIRouter()

    @router.post(
        "/v1/completions",
        summary="Go on with a text",
        openapi_extra=documented(CompletionRequest),
    )
    @answering
    async def completions(request: Request) -> Response:
        limit = front.server.max_body_bytes
        body = await read_model(request, CompletionRequest, limit=limit)
        job = await _prepare(front, body, request_id=request.state.request_id)
        answer = _CompletionAnswer(front, body, job)
        return await respond(request, answer, is_streamed=bool(body.stream))

    return router


async def _prepare(front: Front, body: CompletionRequest, *, request_id: str) -> Job:
    front.check_model(body.model)
    per_prompt = max(body.n or 1, body.best_of or 1)
    num_prompts = len(body.prompt) if is_batch(body.prompt) else 1
    if num_prompts * per_prompt > MAX_TOTAL_CHOICES:
        raise ApiError(
            f"{num_prompts} prompts with n={per_prompt} choices each are "
            f"{num_prompts * per_prompt}; at most {MAX_TOTAL_CHOICES} are allowed per request",
            param="n",
        )
    logprobs = body.logprobs
    if logprobs is None and per_prompt > (body.n or 1):
        logprobs = 0  # which are best is decided by them
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
    return make_job(
        front,
        body,
        kind="cmpl",
        request_id=request_id,
        prompts=await completion_prompts(front, body),
        per_prompt=per_prompt,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


class _CompletionAnswer:
    """One request's answer."""

    def __init__(self, front: Front, body: CompletionRequest, job: Job) -> None:
        self._front = front
        self._body = body
        self._job = job
        as_ids = bool(body.return_tokens_as_token_ids)
        self._logprobs = LogprobFormat(front.tokenizer, as_token_ids=as_ids)
        self._echoes = [self._echo_of(p) for p in range(len(job.prompts))]

    def _echo_of(self, prompt_index: int) -> tuple[str, list[int]]:
        if not self._body.echo:
            return "", []
        prompt = self._job.prompts[prompt_index]
        text = self._job.choices[prompt_index * self._job.per_prompt].text
        return prompt_text(self._front.tokenizer, prompt.token_ids, given=prompt.text, params=text)

    async def whole(self) -> Response:
        job = self._job
        results = await gather_job(self._front, job)
        usage = Usage(job)
        for result in results:
            usage.add(result)
        choices: list[dict[str, Any]] = []
        for p in range(len(job.prompts)):
            of_prompt = results[p * job.per_prompt : (p + 1) * job.per_prompt]
            prompt_logprobs = of_prompt[0].prompt_logprobs
            n = self._body.n or 1
            kept = best_choices(of_prompt, n=n) if n < len(of_prompt) else of_prompt
            for result in kept:
                choices.append(self.choice(result, p, prompt_logprobs, index=len(choices)))
        answer: dict[str, Any] = {
            "id": job.response_id,
            "object": "text_completion",
            "created": job.created,
            "model": job.model,
            "choices": choices,
            "usage": usage.as_dict(),
        }
        if self._body.return_spec_stats:
            answer["spec_stats"] = usage.spec_stats
        return Response(msgspec.json.encode(answer), media_type="application/json")

    def choice(
        self,
        news: ChoiceResult | ChoiceDelta,
        prompt_index: int,
        prompt_logprobs: tuple[TokenLogprobs, ...] | None,
        *,
        index: int,
        is_first: bool = True,
    ) -> dict[str, Any]:
        """A choice, or a chunk of one. ``is_first``: it begins the choice's text."""
        body = self._body
        echo, _ = self._echoes[prompt_index] if is_first else ("", [])
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + news.text,
            "logprobs": None,
            "finish_reason": news.finish_reason,
            "stop_reason": news.stop_reason,
        }
        if body.logprobs is not None:
            choice["logprobs"] = self._logprob_lists(
                news, prompt_index, prompt_logprobs if is_first else None
            )
        if body.prompt_logprobs is not None and is_first and prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._logprobs.prompt(
                _cut(prompt_logprobs, body.prompt_logprobs)
            )
        if body.return_token_ids:
            choice["token_ids"] = news.token_ids
            if is_first:
                choice["prompt_token_ids"] = self._job.prompts[prompt_index].token_ids
        return choice

    def _logprob_lists(
        self,
        news: ChoiceResult | ChoiceDelta,
        prompt_index: int,
        prompt_logprobs: tuple[TokenLogprobs, ...] | None,
    ) -> dict[str, Any]:
        echo, echo_offsets = self._echoes[prompt_index]
        entries: list[TokenLogprobs | int] = list(news.logprobs)
        offsets = [len(echo) + offset for offset in news.text_offsets]
        if self._body.echo and prompt_logprobs is not None:
            first = self._job.prompts[prompt_index].token_ids[0]
            entries = [first, *_cut(prompt_logprobs, self._body.logprobs or 0), *entries]
            offsets = echo_offsets + offsets
        return self._logprobs.completion(entries, offsets)

    def live(self) -> LiveStream:
        return LiveStream(self._front, self._job, _CompletionEvents(self._body, self._job, self))


class _CompletionEvents:
    """A completion in server-sent events. Implements `octavo.api.live.Events`."""

    def __init__(self, body: CompletionRequest, job: Job, answer: _CompletionAnswer) -> None:
        options = body.stream_options or StreamOptions()
        self._body = body
        self._job = job
        self._answer = answer
        self._has_usage, self._is_continuous = bool(options.include_usage), options.is_continuous
        self._wants_tokens = body.logprobs is not None or bool(body.return_token_ids)
        self._wants_stats = bool(body.return_spec_stats)
        self._event = self._make_event()
        self._short = ShortForm(self._event, self._text_choice)
        self._usage = Usage(job)
        self._begun = [False] * len(job.choices)
        self._prompt_logprobs: list[tuple[TokenLogprobs, ...] | None] = [None] * len(job.prompts)

    def _make_event(self, **more: Any) -> Event:
        job = self._job
        return make_event(
            has_usage_key=self._has_usage,
            id=job.response_id,
            object="text_completion",
            created=job.created,
            model=job.model,
            **more,
        )

    @property
    def has_short_form(self) -> bool:
        return not (self._wants_tokens or self._is_continuous or self._wants_stats)

    def _text_choice(self, index: int, text: str) -> dict[str, Any]:
        return self._answer.choice(
            ChoiceDelta(index=index, text=text),
            self._job.choices[index].prompt_index,
            None,
            index=index,
            is_first=False,
        )

    def of_text(self, index: int, text: str, token_id: int) -> bytes:
        if not self._begun[index]:
            return self.of_delta(ChoiceDelta(index=index, text=text, token_ids=(token_id,)))
        self._usage.add_token()
        return self._short(index, text) if text else b""

    def of_delta(self, delta: ChoiceDelta) -> bytes:
        self._usage.add(delta)
        p = self._job.choices[delta.index].prompt_index
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs[p] = delta.prompt_logprobs
        is_first = not self._begun[delta.index]
        if not self._is_shown(delta, is_first=is_first):
            return b""
        self._begun[delta.index] = True
        choice = self._answer.choice(
            delta, p, self._prompt_logprobs[p], index=delta.index, is_first=is_first
        )
        return self._event([choice], self._usage.as_dict() if self._is_continuous else None)

    def last(self) -> bytes:
        return last_event(
            self._make_event,
            self._usage,
            has_usage=self._has_usage,
            has_spec_stats=self._wants_stats,
        )

    def _is_shown(self, delta: ChoiceDelta, *, is_first: bool) -> bool:
        """Whether there is anything to show yet."""
        if delta.text or delta.finish_reason:
            return True
        return is_first and bool(self._body.echo) or (bool(delta.token_ids) and self._wants_tokens)


def _cut(entries: Sequence[TokenLogprobs], num_top: int) -> list[TokenLogprobs]:
    """With ``num_top`` alternatives each: echo and prompt_logprobs may differ in how many."""
    return [
        entry
        if len(entry.top) <= num_top
        else TokenLogprobs(
            token_id=entry.token_id,
            logprob=entry.logprob,
            rank=entry.rank,
            top=entry.top[:num_top],
        )
        for entry in entries
    ]
