"""``POST /v1/chat/completions``. Knows the format of chat answers, whole and streamed."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.api.front import Front
from octavo.api.generation import Job, Usage, gather_job, make_job
from octavo.api.live import LiveStream
from octavo.api.logprobs import LogprobFormat
from octavo.api.prompts import fit, render_chat
from octavo.api.request_body import answering, documented, read_model
from octavo.api.schemas import ChatCompletionRequest, StreamOptions
from octavo.api.sse import Event, ShortForm, last_event, make_event, respond
from octavo.engine.outputs import ChoiceDelta, ChoiceResult


def routes(front: Front) -> APIRouter:
    """The endpoint, for one front end."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        openapi_extra=documented(ChatCompletionRequest),
    )
    @answering
    async def chat_completions(request: Request) -> Response:
        limit = front.server.max_body_bytes
        body = await read_model(request, ChatCompletionRequest, limit=limit)
        job = await _prepare(front, body, request_id=request.state.request_id)
        answer = _ChatAnswer(front, body, job)
        return await respond(request, answer, is_streamed=bool(body.stream))

    return router


async def _prepare(front: Front, body: ChatCompletionRequest, *, request_id: str) -> Job:
    front.check_model(body.model)
    max_tokens = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
    token_ids = await render_chat(front, body)
    prompt = fit(front, body, token_ids, text=None, max_tokens=max_tokens)
    return make_job(
        front,
        body,
        kind="chatcmpl",
        request_id=request_id,
        prompts=[prompt],
        per_prompt=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )


class _ChatAnswer:
    """One request's answer."""

    def __init__(self, front: Front, body: ChatCompletionRequest, job: Job) -> None:
        self._front = front
        self.body = body
        self.job = job
        as_ids = bool(body.return_tokens_as_token_ids)
        self.logprobs = LogprobFormat(front.tokenizer, as_token_ids=as_ids)
        goes_on = body.continue_final_message
        self.role = body.messages[-1].role if goes_on else front.server.response_role

    async def whole(self) -> Response:
        job = self.job
        results = await gather_job(self._front, job)
        usage = Usage(job)
        for result in results:
            usage.add(result)
        answer: dict[str, Any] = {
            "id": job.response_id,
            "object": "chat.completion",
            "created": job.created,
            "model": job.model,
            "choices": [self._choice(result) for result in results],
            "usage": usage.as_dict(),
        }
        if self.body.return_spec_stats:
            answer["spec_stats"] = usage.spec_stats
        prompt_logprobs = results[0].prompt_logprobs
        if prompt_logprobs is not None:
            answer["prompt_logprobs"] = self.logprobs.prompt(prompt_logprobs)
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = job.prompts[0].token_ids
        return Response(msgspec.json.encode(answer), media_type="application/json")

    def _choice(self, result: ChoiceResult) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": result.index,
            "message": {"role": self.role, "content": result.text, "refusal": None},
            "logprobs": self.logprobs.chat(result.logprobs) if self.body.logprobs else None,
            "finish_reason": result.finish_reason,
            "stop_reason": result.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = result.token_ids
        return choice

    def live(self) -> LiveStream:
        return LiveStream(self._front, self.job, _ChatEvents(self))


class _ChatEvents:
    """A chat answer in server-sent events. Implements `octavo.api.live.Events`."""

    def __init__(self, answer: _ChatAnswer) -> None:
        self._body, self._job = answer.body, answer.job
        self._role, self._logprobs = answer.role, answer.logprobs
        options = self._body.stream_options or StreamOptions()
        self._has_usage, self._is_continuous = bool(options.include_usage), options.is_continuous
        self._wants_tokens = bool(self._body.logprobs or self._body.return_token_ids)
        self._wants_stats = bool(self._body.return_spec_stats)
        self._event = self._make_event()
        self._short = ShortForm(self._event, self._text_choice)
        self._usage = Usage(self._job)
        self._has_begun = False

    def _make_event(self, **more: Any) -> Event:
        job = self._job
        return make_event(
            has_usage_key=self._has_usage,
            id=job.response_id,
            object="chat.completion.chunk",
            created=job.created,
            model=job.model,
            **more,
        )

    @property
    def has_short_form(self) -> bool:
        return not (self._wants_tokens or self._is_continuous or self._wants_stats)

    def _text_choice(self, index: int, text: str) -> dict[str, Any]:
        (choice,) = self._chunk(ChoiceDelta(index=index, text=text))
        return choice

    def of_text(self, index: int, text: str, token_id: int) -> bytes:
        if not self._has_begun:
            return self.of_delta(ChoiceDelta(index=index, text=text, token_ids=(token_id,)))
        self._usage.add_token()
        return self._short(index, text) if text else b""

    def of_delta(self, delta: ChoiceDelta) -> bytes:
        self._usage.add(delta)
        usage = self._usage.as_dict() if self._is_continuous else None
        data = b"".join(self._event([choice], usage) for choice in self._chunk(delta))
        if self._has_begun:
            return data
        self._has_begun = True
        first = self._make_event(**self._prompt_fields(delta))
        return b"".join(first([choice], usage) for choice in self._opening()) + data

    def last(self) -> bytes:
        return last_event(
            self._make_event,
            self._usage,
            has_usage=self._has_usage,
            has_spec_stats=self._wants_stats,
        )

    def _opening(self) -> list[dict[str, Any]]:
        """The chunks that tell each choice's role."""
        delta = {"role": self._role, "content": ""}
        return [
            {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
            for choice in self._job.choices
        ]

    def _prompt_fields(self, delta: ChoiceDelta) -> dict[str, Any]:
        """What the first chunks tell of the prompt, if asked."""
        fields: dict[str, Any] = {}
        if delta.prompt_logprobs is not None:
            fields["prompt_logprobs"] = self._logprobs.prompt(delta.prompt_logprobs)
        if self._body.return_token_ids:
            fields["prompt_token_ids"] = self._job.prompts[0].token_ids
        return fields

    def _chunk(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """At most one: none when there is nothing to show yet."""
        body = self._body
        has_tokens = bool(delta.token_ids) and (body.logprobs or body.return_token_ids)
        if not (delta.text or has_tokens or delta.finish_reason):
            return []
        choice: dict[str, Any] = {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.text or not delta.finish_reason else {},
            "logprobs": None,
            "finish_reason": delta.finish_reason,
        }
        if body.logprobs and delta.logprobs:
            choice["logprobs"] = self._logprobs.chat(delta.logprobs)
        if delta.finish_reason:
            choice["stop_reason"] = delta.stop_reason
        if body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return [choice]
