"""One API request's generations: what is asked of the engine, and who waits for it.

Knows choices, admission and clients that leave; nothing of response formats.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from starlette.requests import Request

from octavo.api.errors import UnavailableError
from octavo.api.front import Front
from octavo.api.params import check_priority, generation_options, params_of
from octavo.api.prompts import Prompt
from octavo.api.schemas import Generation
from octavo.engine.options import choice_seed
from octavo.engine.outputs import Choice, ChoiceDelta, ChoiceResult, DraftStats, read_choices
from octavo.types import EngineRequest, FinishReason

log = logging.getLogger(__name__)

T = TypeVar("T")
_serial = itertools.count()


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All choices of one API request, ready for the engine."""

    response_id: str
    created: int  # Unix seconds
    model: str
    prompts: tuple[Prompt, ...]
    choices: tuple[Choice, ...]  # those of prompt p are [p * per_prompt, (p + 1) * per_prompt)
    per_prompt: int


def make_job(
    front: Front,
    body: Generation,
    *,
    kind: str,
    request_id: str,
    prompts: Sequence[Prompt],
    per_prompt: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> Job:
    """``kind``: the response id's prefix. Raises `ApiError`."""
    model = front.check_model(body.model)
    check_priority(front, body)
    options = generation_options(front, body, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    least = min(prompt.max_tokens for prompt in prompts)
    params, texts = params_of(front, options, max_tokens=least, seed=0), options.text_params()
    front.check_admission(len(prompts) * per_prompt)
    response_id = f"{kind}-{body.request_id or request_id}"
    # Clients may repeat an id while its first use still runs, and processes may share an engine,
    # whose ids are unique.
    unique = f"{response_id}-{os.getpid():x}-{next(_serial):x}"
    arrival = time.monotonic()
    choices: list[Choice] = []
    for p, prompt in enumerate(prompts):
        seed = front.seeds.draw() if body.seed is None else body.seed
        first_id = f"{unique}-{len(choices)}"
        for i in range(per_prompt):
            request = EngineRequest(
                request_id=f"{unique}-{len(choices)}",
                prompt_token_ids=prompt.token_ids,
                params=replace(
                    params,
                    max_tokens=prompt.max_tokens,
                    seed=choice_seed(seed, i),
                    # The same for all choices of a prompt: computed once.
                    prompt_logprobs=prompt_logprobs if i == 0 else None,
                ),
                arrival_time=arrival,
                priority=body.priority or 0,
                cache_salt=body.cache_salt,
                fork_of=first_id if i else None,
            )
            choice = Choice(index=len(choices), prompt_index=p, request=request, text=texts)
            choices.append(choice)
    if front.server.enable_log_requests:
        lengths = [len(prompt.token_ids) for prompt in prompts]
        log.info("%s: prompt tokens %s, %s, %s", response_id, lengths, params, texts)
    return Job(
        response_id=response_id,
        created=int(time.time()),
        model=model,
        prompts=tuple(prompts),
        choices=tuple(choices),
        per_prompt=per_prompt,
    )


async def run_job(front: Front, job: Job) -> AsyncGenerator[ChoiceDelta, None]:
    """The job's deltas as they come. Closing it early frees all its requests."""
    with front.lifecycle.active():
        deltas = read_choices(front.engine, job.choices, tokenizer=front.tokenizer)
        async with aclosing(deltas):
            async for delta in deltas:
                if delta.finish_reason is FinishReason.ABORT:
                    raise UnavailableError(
                        "The server ended the request: it is shutting down", code="aborted"
                    )
                if front.metrics is not None and isinstance(delta.stop_reason, str):
                    request_id = job.choices[delta.index].request.request_id
                    front.metrics.on_stop_string(request_id)
                yield delta


async def gather_job(front: Front, job: Job) -> list[ChoiceResult]:
    """Every choice, whole, in the order of ``job.choices``."""
    results = [ChoiceResult(index=choice.index) for choice in job.choices]
    async with aclosing(run_job(front, job)) as deltas:
        async for delta in deltas:
            results[delta.index].add(delta)
    return results


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled if the client leaves first. The request's body
    must have been read. Raises `ClientGoneError`."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(client_gone(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


async def client_gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Usage:
    """Token counts of one API request. A prompt counts once, however many choices it has; every
    choice's tokens and drafts count, also those `best_of` drops."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._prompt_tokens = sum(len(prompt.token_ids) for prompt in job.prompts)
        self._completion_tokens = 0
        self._cached = [0] * len(job.prompts)
        self._draft_stats = DraftStats()

    def add(self, news: ChoiceDelta | ChoiceResult) -> None:
        """Counts what is new of a choice, or a whole one."""
        self._completion_tokens += len(news.token_ids)
        choice = self._job.choices[news.index]
        if choice.request.fork_of is None and news.num_cached_tokens:
            self._cached[choice.prompt_index] = news.num_cached_tokens
        if isinstance(news, ChoiceResult):
            self._draft_stats += news.draft_stats
        elif news.drafts is not None:
            self._draft_stats += DraftStats.of_step(news.drafts)

    def add_token(self) -> None:
        """Counts one more token of any choice."""
        self._completion_tokens += 1

    @property
    def spec_stats(self) -> dict[str, Any]:
        """What ``return_spec_stats`` asks for; tokens counted by `add_token` are not in it."""
        stats = self._draft_stats
        return {
            "num_drafts": stats.num_drafts,
            "num_draft_tokens": stats.num_draft_tokens,
            "num_accepted_tokens": stats.num_accepted_tokens,
            "num_accepted_tokens_per_pos": stats.num_accepted_tokens_per_pos,
            "mean_accepted_length": round(stats.mean_accepted_length, 4),
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached)},
        }
