"""Engine news to text: what each choice of one API request says, as it comes.

Knows tokens, text and when to end a request; knows nothing of HTTP, JSON or scheduling.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from octavo.engine.protocols import Engine
from octavo.text.detokenizer import Detokenizer, TextParams
from octavo.text.tokenizer import Tokenizer
from octavo.types import EngineOutput, EngineRequest, FinishReason, TokenLogprobs


class RequestFailedError(RuntimeError):
    """One request failed; the others go on. ``is_bad_request``: through its own fault."""

    def __init__(self, message: str, *, is_bad_request: bool = False) -> None:
        super().__init__(message)
        self.is_bad_request = is_bad_request


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One generation of an API request: what the engine runs and how its tokens are read."""

    index: int  # in the response
    prompt_index: int
    request: EngineRequest
    text: TextParams


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftStats:
    """What speculation did for a choice, or for several; all zero without it."""

    num_drafts: int = 0  # steps that verified drafts
    num_draft_tokens: int = 0
    num_accepted_tokens_per_pos: tuple[int, ...] = ()

    @property
    def num_accepted_tokens(self) -> int:
        return sum(self.num_accepted_tokens_per_pos)

    @property
    def mean_accepted_length(self) -> float:
        """Tokens that a step with drafts yielded, the one drawn without their help included."""
        return 1.0 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 0.0

    def __add__(self, other: DraftStats) -> DraftStats:
        mine, more = self.num_accepted_tokens_per_pos, other.num_accepted_tokens_per_pos
        return DraftStats(
            num_drafts=self.num_drafts + other.num_drafts,
            num_draft_tokens=self.num_draft_tokens + other.num_draft_tokens,
            num_accepted_tokens_per_pos=tuple(
                a + b for a, b in itertools.zip_longest(mine, more, fillvalue=0)
            ),
        )

    @staticmethod
    def of_step(drafts: tuple[int, int] | None) -> DraftStats:
        """Of one step, as `EngineOutput.drafts` tells it."""
        if drafts is None:
            return DraftStats()
        num_tokens, num_accepted = drafts
        per_pos = (1,) * num_accepted + (0,) * (num_tokens - num_accepted)
        return DraftStats(
            num_drafts=1, num_draft_tokens=num_tokens, num_accepted_tokens_per_pos=per_pos
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceDelta:
    """What is new of one choice. `token_ids`, `logprobs` (if asked for) and `text_offsets` run in
    parallel; `text` may lag behind them (held back) and never shows the token that ended it."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    text_offsets: tuple[int, ...] = ()  # characters of the choice's text before each token
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # positions 1 to P-1, all at once
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    drafts: tuple[int, int] | None = None  # verified and accepted, in the step behind this

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.token_ids or self.finish_reason)


class ChoiceReader:
    """Reads one choice's `EngineOutput`s, in order, into `ChoiceDelta`s. No I/O: the offline
    front end uses it as well."""

    def __init__(self, choice: Choice, *, tokenizer: Tokenizer) -> None:
        self._choice = choice
        self._detokenizer = Detokenizer(
            tokenizer, params=choice.text, context=choice.request.prompt_token_ids[-8:]
        )
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._owes_prompt_logprobs = choice.request.params.prompt_logprobs is not None
        self._num_cached = 0  # as last read
        self._has_short_form = (
            not self._owes_prompt_logprobs
            and choice.request.params.logprobs is None
            and not choice.text.stop
        )

    def read_text(self, output: EngineOutput) -> str | None:
        """The text of an output that tells one token and nothing else, as most do. None for any
        other, which has not been read then: it is for `read`."""
        tokens = output.new_token_ids
        if (
            len(tokens) != 1
            or output.finish_reason is not None
            or output.num_cached_tokens != self._num_cached
            or not self._has_short_form
        ):
            return None
        return self._detokenizer.push_free(tokens[0])

    def read(self, output: EngineOutput) -> ChoiceDelta:
        """After a delta with ``finish_reason`` nothing may be read any more; if ``output`` had
        none, the engine still runs the request and must be told. Raises `RequestFailedError`."""
        if output.finish_reason is FinishReason.ERROR:
            raise RequestFailedError(
                output.error or "the request failed", is_bad_request=output.is_bad_request
            )
        self._num_cached = output.num_cached_tokens
        if self._owes_prompt_logprobs:
            self._prompt_logprobs += output.new_prompt_logprobs
        text, num_tokens, offsets = self._text_of(output)
        finish_reason, stop_reason = output.finish_reason, output.stop_reason
        end: int | str | None = stop_reason
        if self._detokenizer.stopped_by is not None:
            finish_reason, end = FinishReason.STOP, self._detokenizer.stopped_by
        return ChoiceDelta(
            index=self._choice.index,
            text=text,
            token_ids=output.new_token_ids[:num_tokens],
            logprobs=output.new_logprobs[:num_tokens],
            text_offsets=offsets,
            prompt_logprobs=self._due_prompt_logprobs(output),
            num_cached_tokens=output.num_cached_tokens,
            finish_reason=finish_reason,
            stop_reason=end,
            drafts=output.drafts,
        )

    def _due_prompt_logprobs(self, output: EngineOutput) -> tuple[TokenLogprobs, ...] | None:
        has_all = output.new_token_ids or output.finish_reason is not None
        if not (self._owes_prompt_logprobs and has_all):
            return None
        self._owes_prompt_logprobs = False
        return tuple(self._prompt_logprobs)

    def _text_of(self, output: EngineOutput) -> tuple[str, int, tuple[int, ...]]:
        """New text, how many of the new tokens count, and each one's place in the text."""
        detokenizer = self._detokenizer
        tokens = output.new_token_ids
        ends_by_token = (
            output.finish_reason is FinishReason.STOP
            and not self._choice.text.include_stop_str_in_output
        )
        pieces: list[str] = []
        offsets: list[int] = []
        for i, token_id in enumerate(tokens):
            offsets.append(detokenizer.num_chars)
            if ends_by_token and i == len(tokens) - 1:
                break  # EOS or a stop token ends the text and is no part of it
            pieces.append(detokenizer.push(token_id))
            if detokenizer.stopped_by is not None:
                break
        if output.finish_reason is not None:
            pieces.append(detokenizer.flush())
        return "".join(pieces), len(offsets), tuple(offsets)


@dataclass(slots=True, kw_only=True)
class ChoiceResult:
    """A whole choice, gathered from its deltas."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text_offsets: list[int] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    draft_stats: DraftStats = DraftStats()
    _pieces: list[str] = field(default_factory=list)

    def add(self, delta: ChoiceDelta) -> None:
        self._pieces.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.text_offsets += delta.text_offsets
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        if delta.drafts is not None:
            self.draft_stats += DraftStats.of_step(delta.drafts)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.text = "".join(self._pieces)
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    @property
    def cumulative_logprob(self) -> float:
        return sum(entry.logprob for entry in self.logprobs)


def best_choices(results: Sequence[ChoiceResult], *, n: int) -> list[ChoiceResult]:
    """The ``n`` results of highest cumulative logprob, best first; ties keep their order."""
    return sorted(results, key=lambda result: -result.cumulative_logprob)[:n]


async def read_choices(
    engine: Engine, choices: Sequence[Choice], *, tokenizer: Tokenizer
) -> AsyncGenerator[ChoiceDelta, None]:
    """Runs all choices at once; their deltas as they come, each choice's in order.

    Leaving early (`aclose`), or one choice failing, aborts what still runs. Raises
    `RequestFailedError`, `EngineDeadError`.
    """
    if len(choices) == 1:
        news = _read_one(engine, choices[0], tokenizer)
    else:
        news = _read_many(engine, choices, tokenizer)
    async with aclosing(news):
        async for delta in news:
            if not delta.is_empty:
                yield delta


async def _read_one(
    engine: Engine, choice: Choice, tokenizer: Tokenizer
) -> AsyncGenerator[ChoiceDelta, None]:
    reader = ChoiceReader(choice, tokenizer=tokenizer)
    last: ChoiceDelta | None = None
    stream = engine.generate(choice.request)
    try:
        async for output in stream:
            delta = reader.read(output)
            if delta.finish_reason is not None:
                last = delta
                break
            yield delta
    finally:  # before the client hears of the end: a request ended by a stop string is freed
        if (close := getattr(stream, "aclose", None)) is not None:
            await close()
    if last is None:
        raise RequestFailedError("the engine ended the request without saying why")
    yield last


async def _read_many(
    engine: Engine, choices: Sequence[Choice], tokenizer: Tokenizer
) -> AsyncGenerator[ChoiceDelta, None]:
    queue: asyncio.Queue[ChoiceDelta | Exception] = asyncio.Queue()

    async def pump(choice: Choice) -> None:
        try:
            async with aclosing(_read_one(engine, choice, tokenizer)) as deltas:
                async for delta in deltas:
                    queue.put_nowait(delta)
        except Exception as error:  # raised where the deltas are read
            queue.put_nowait(error)

    # Created in order, tasks start in order: a fork's parent reaches the engine before it.
    tasks = [asyncio.create_task(pump(choice)) for choice in choices]
    num_running = len(tasks)
    try:
        while num_running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            num_running -= item.finish_reason is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
