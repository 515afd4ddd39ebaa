"""The engine inside your own program: ``LLM("model").generate("Once upon a time")``.

No server and no second process; knows prompts and texts, and drives the engine's loop itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.checkpoint.source import resolve
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.engine.build import build_engine
from octavo.engine.interrupts import unbroken
from octavo.engine.options import (
    Defaults,
    GenerationOptions,
    SeedSource,
    check_token_ids,
    choice_seed,
    sampling_params,
)
from octavo.engine.outputs import (
    Choice,
    ChoiceDelta,
    ChoiceReader,
    ChoiceResult,
    DraftStats,
    RequestFailedError,
)
from octavo.text.chat_template import ChatTemplate, find_template
from octavo.text.detokenizer import TextParams
from octavo.text.tokenizer import Tokenizer
from octavo.types import (
    EngineInfo,
    EngineOutput,
    EngineRequest,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
)

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Params = SamplingParams | Mapping[str, Any] | None
_DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One of the ``n`` answers to a prompt."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]  # one per token if asked for
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    error: str | None = None  # with FinishReason.ERROR
    draft_stats: DraftStats = DraftStats()  # what speculation did


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A prompt and its answers; the short names are the first answer's."""

    prompt: str | None  # None if token ids were given
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Completion, ...]
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # of positions 1 and on

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason


@dataclass(slots=True)
class _Job:
    """One choice on its way."""

    prompt: str | None
    choice: Choice
    reader: ChoiceReader
    result: ChoiceResult
    error: str | None = None
    deltas: list[ChoiceDelta] = field(default_factory=list)


class LLM:
    """A loaded model. Not for use from several threads at once.

    ``model`` and ``options`` are those of ``octavo serve``: ``LLM("org/name",
    max_model_len=2048)``. Raises ValueError for an unknown option or a model that cannot be read.
    """

    def __init__(self, model: str = "", **options: Any) -> None:
        self.config = engine_config(model, options)
        files = resolve(self.config.model)
        self.tokenizer: Tokenizer = Tokenizer.from_dir(
            self.config.model.tokenizer or files.tokenizer_dir
        )
        uses_model = self.config.model.generation_config == "auto"
        self._defaults = (
            Defaults.from_generation_config(files.generation_config) if uses_model else Defaults()
        )
        self._seeds = SeedSource(self.config.model.seed)
        self._template: ChatTemplate | None = None
        self._ids = itertools.count()
        # Whoever turns the loop reads for all: each job, and those its caller waits for.
        self._live: dict[str, tuple[_Job, dict[str, _Job]]] = {}
        self.num_preemptions = 0  # of all requests so far
        self.info: EngineInfo
        self._core, self.info = build_engine(self.config)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] = None,
        *,
        use_tqdm: bool = False,
        **options: Any,
    ) -> list[Generation]:
        """Answers to all prompts, in their order; they run together.

        ``prompts``: a text or token ids, or several. ``params``: options by the API's names
        (`GenerationOptions`), also as keywords, or a `SamplingParams` wholly in token ids; a list
        has one for each prompt. A prompt that cannot run raises ValueError before any runs; one
        that fails later has ``finish_reason`` "error".
        """
        texts = _as_list(prompts)
        jobs = [
            self._jobs(prompt, each, options, default_max_tokens=_DEFAULT_MAX_TOKENS)
            for prompt, each in zip(texts, _per_prompt(params, len(texts)), strict=True)
        ]
        return self._run(jobs, use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        *,
        use_tqdm: bool = False,
        **options: Any,
    ) -> list[Generation]:
        """As `generate`, for one conversation or several: ``[{"role": "user", "content": "Hi"}]``.

        Without ``max_tokens`` an answer may fill what is left of the context.
        """
        talks = messages if messages and not isinstance(messages[0], Mapping) else [messages]
        jobs = [
            self._jobs(
                self.render_chat(talk),  # type: ignore[arg-type]
                params,
                options,
                default_max_tokens=self.info.max_model_len,
            )
            for talk in talks
        ]
        return self._run(jobs, use_tqdm=use_tqdm)

    def stream(
        self, prompt: Prompt, params: Mapping[str, Any] | None = None, **options: Any
    ) -> Iterator[ChoiceDelta]:
        """What is new of the answer to one prompt, as it comes. Leaving early aborts it."""
        jobs = self._jobs(prompt, params, options, default_max_tokens=self.info.max_model_len)
        running = self._start(jobs)
        try:
            is_over = False
            while not is_over:
                if running:  # they may have ended while another call turned the loop
                    self._step()
                is_over = not running
                for job in jobs:
                    yield from job.deltas
                    job.deltas.clear()
                    if job.error is not None:
                        raise RequestFailedError(job.error)
        finally:
            self._abort(running)

    def reset_prefix_cache(self) -> None:
        """Nothing computed so far serves prefix hits any more."""
        self._core.reset_prefix_cache()

    def render_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a conversation under the model's chat template. Raises ValueError."""
        if self._template is None:
            tokenizer = self.tokenizer
            source = find_template(None, folder=tokenizer.folder, config=tokenizer.config)
            if source is None:
                raise ValueError(f"{self.info.model} has no chat template; use generate()")
            self._template = ChatTemplate(source, special_tokens=tokenizer.named_tokens)
        text = self._template.render(messages)
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    # ---- one prompt ------------------------------------------------------------------------

    def _jobs(
        self,
        prompt: Prompt,
        params: Params,
        options: Mapping[str, Any],
        *,
        default_max_tokens: int,
    ) -> list[_Job]:
        """The choices of one prompt. Raises ValueError."""
        ids = tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        if not ids:
            raise ValueError("a prompt is empty")
        check_token_ids(ids, name="a prompt", info=self.info)
        if len(ids) > self.info.max_model_len:
            raise ValueError(
                f"a prompt has {len(ids)} tokens, more than the context of "
                f"{self.info.max_model_len}"
            )
        if isinstance(params, SamplingParams):
            if options:
                raise ValueError(f"give {', '.join(options)} within SamplingParams")
            n, text, base = 1, TextParams(min_tokens=params.min_tokens), params
        else:
            asked = GenerationOptions.from_mapping({**(params or {}), **options})
            n, text = asked.n, asked.text_params()
            base = sampling_params(
                asked,
                max_tokens=self._max_tokens(asked, len(ids), default=default_max_tokens),
                seed=self._seeds.draw() if asked.seed is None else asked.seed,
                defaults=self._defaults,
                info=self.info,
                tokenizer=self.tokenizer,
                max_logprobs=self.config.model.max_logprobs,
            )
        number = next(self._ids)
        return [self._job(number, i, prompt, ids, text, base) for i in range(n)]

    def _max_tokens(self, asked: GenerationOptions, num_prompt_tokens: int, *, default: int) -> int:
        limit = self.info.max_model_len
        room = limit - num_prompt_tokens
        if asked.max_tokens is None:
            usual = self._defaults.max_new_tokens
            return min(default if usual is None else usual, room)
        if asked.max_tokens > room:
            raise ValueError(
                f"the prompt has {num_prompt_tokens} tokens and max_tokens is {asked.max_tokens}, "
                f"more than the context of {limit} in all"
            )
        return asked.max_tokens

    def _job(
        self,
        number: int,
        index: int,
        prompt: Prompt,
        ids: tuple[int, ...],
        text: TextParams,
        base: SamplingParams,
    ) -> _Job:
        choice = Choice(
            index=index,
            prompt_index=number,
            request=EngineRequest(
                request_id=f"llm-{number}-{index}",
                prompt_token_ids=ids,
                params=dataclasses.replace(base, seed=choice_seed(base.seed, index)),
                arrival_time=time.monotonic(),
                fork_of=f"llm-{number}-0" if index else None,
            ),
            text=text,
        )
        return _Job(
            prompt=prompt if isinstance(prompt, str) else None,
            choice=choice,
            reader=ChoiceReader(choice, tokenizer=self.tokenizer),
            result=ChoiceResult(index=index),
        )

    # ---- the loop --------------------------------------------------------------------------

    def _run(self, groups: Sequence[list[_Job]], *, use_tqdm: bool) -> list[Generation]:
        # Lazy: only a bar that is asked for is imported.
        from tqdm import tqdm

        running = self._start([job for jobs in groups for job in jobs])
        try:
            with tqdm(total=len(running), desc="generations", disable=not use_tqdm) as bar:
                while running:
                    before = len(running)
                    self._step()
                    bar.update(before - len(running))
        finally:
            self._abort(running)
        return [self._generation(jobs) for jobs in groups]

    def _start(self, jobs: Sequence[_Job]) -> dict[str, _Job]:
        """Adds the jobs; those that have not ended are in the returned dict, by request id."""
        running = {job.choice.request.request_id: job for job in jobs}
        try:
            for request_id, job in running.items():
                self._live[request_id] = (job, running)
                self._core.add_request(job.choice.request)
        except BaseException:
            self._abort(running)
            raise
        return running

    def _step(self) -> None:
        """One engine step; takes every job that has ended out of its caller's dict."""
        assert self._core.has_work, "requests are running and the engine has nothing to do"
        with unbroken():
            step = self._core.step()
            if step.stats is not None:
                self.num_preemptions += step.stats.preemptions
            for output in step.outputs:
                job, running = self._live.get(output.request_id, (None, {}))
                if job is not None and self._read(job, output):
                    del self._live[output.request_id], running[output.request_id]

    def _read(self, job: _Job, output: EngineOutput) -> bool:
        """Whether the choice has ended."""
        try:
            delta = job.reader.read(output)
        except RequestFailedError as error:
            job.error = str(error)
            return True
        job.result.add(delta)
        job.deltas.append(delta)
        if delta.finish_reason is None:
            return False
        if output.finish_reason is None:  # by a stop string, of which the engine knows nothing
            self._core.abort([output.request_id])
        return True

    def _abort(self, running: dict[str, _Job]) -> None:
        if running:
            self._core.abort(list(running))
            for request_id in running:
                self._live.pop(request_id, None)
            running.clear()

    def _generation(self, jobs: Sequence[_Job]) -> Generation:
        first = jobs[0].choice.request.prompt_token_ids
        return Generation(
            prompt=jobs[0].prompt,
            prompt_token_ids=first,
            outputs=tuple(_completion(job) for job in jobs),
            num_cached_tokens=jobs[0].result.num_cached_tokens,
            prompt_logprobs=jobs[0].result.prompt_logprobs,
        )


def _completion(job: _Job) -> Completion:
    result = job.result
    reason = FinishReason.ERROR if job.error is not None else result.finish_reason
    assert reason is not None, "the request has not ended"
    return Completion(
        index=result.index,
        text=result.text,
        token_ids=tuple(result.token_ids),
        logprobs=tuple(result.logprobs),
        finish_reason=reason,
        stop_reason=result.stop_reason,
        error=job.error,
        draft_stats=result.draft_stats,
    )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _per_prompt(params: Params | Sequence[Params], count: int) -> list[Params]:
    if params is None or isinstance(params, SamplingParams | Mapping):
        return [params] * count
    if len(params) != count:
        raise ValueError(f"{count} prompts and {len(params)} params were given")
    return list(params)


def engine_config(model: str, options: Mapping[str, Any]) -> EngineConfig:
    """Sorts flat options into the components' configurations. Raises ValueError."""
    parts: dict[str, Any] = {}
    left = {"model": model, **options}
    if isinstance(left.get("speculative_config"), Mapping):  # as vLLM takes it
        left["speculative_config"] = json.dumps(left["speculative_config"])
    for name, config in (
        ("model", ModelConfig),
        ("cache", CacheConfig),
        ("scheduler", SchedulerConfig),
    ):
        names = [f.name for f in dataclasses.fields(config)]
        parts[name] = config(**{n: left.pop(n) for n in names if n in left})
    if left:
        known = [
            f.name
            for config in (ModelConfig, CacheConfig, SchedulerConfig)
            for f in dataclasses.fields(config)
        ]
        wrong = next(iter(left))
        near = difflib.get_close_matches(wrong, known, n=1)
        raise ValueError(
            f"unknown option {wrong!r}" + (f"; did you mean {near[0]}?" if near else "")
        )
    return EngineConfig(**parts)
