"""The nouns of Octavo, one type per arrow between rooms. Knows the standard library only.

Read this file first. A request walks through it from top to bottom::

    HTTP body -> EngineRequest -> (scheduler) -> SchedulerOutput -> (worker) -> ModelOutput
              -> (scheduler) -> EngineOutput -> (detokenizer) -> SSE chunk

Everything here is frozen: whoever holds one may keep it. What there is of every token is a named
tuple, made, sent and read in a third of a dataclass's time; still, name what you pass. Times are
seconds of the machine's monotonic clock, which every process of one machine shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


class DeviceLostError(RuntimeError):
    """The device cannot compute any more, and its process must end; the message names the requests
    of all steps in flight."""


class FinishReason(StrEnum):
    """Why a request ended; the values are OpenAI's ``finish_reason`` strings, vLLM's labels."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token of one request is chosen, wholly in token ids.

    ``temperature == 0`` is greedy. ``top_k == 0`` means no top-k. Values are checked by the front
    end (`octavo.api`), which also turns words into token ids; the engine trusts them.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    seed: int = 0  # 64 bits; drawn by the front end when the client gave none
    ignore_eos: bool = False
    eos_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # alternatives per generated token; None = none, 0 = chosen only
    prompt_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One generation, front end -> engine. ``n > 1`` is ``n`` of these; all but the first name it
    as ``fork_of`` and share its prompt's blocks, copied on write."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival_time: float = 0.0
    priority: int = 0  # lower runs first, only under the priority policy
    cache_salt: str | None = None
    fork_of: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCopy:
    """Copy one whole K/V block before the step's forward pass (copy on write)."""

    src: int
    dst: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMove:
    """Copy one whole K/V block between the cache and a slot of the host tier."""

    block: int
    slot: int
    tag: int  # int64 that stands for the contents: a load gets what was saved under its own tag


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """Whole data of a request the worker has not got: first time, forked, or resumed.

    ``token_ids`` are all known tokens (prompt, then what was generated before a preemption);
    ``[0, num_computed_tokens)`` have their K/V in ``block_ids`` already.
    """

    request_id: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: tuple[int, ...]
    params: SamplingParams
    cache_salt: str | None = None  # whose it is: drafts are not made from another's tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOutput:
    """What one step computes, scheduler -> worker. Diffs only: a worker knows running requests.

    The order of ``num_scheduled_tokens`` is the order of the batch. A request samples in this step
    when its computed tokens reach all its known tokens; the sampled token is known to the worker
    at once, to the scheduler only when `ModelOutput` arrives, so the next step may already be
    scheduled with it (overlap). Workers apply, in order: ``finished_request_ids``,
    ``new_requests``, ``new_block_ids``, ``saves``, ``loads``, ``block_copies``, then the forward
    pass. No block or slot occurs twice among the saves, nor among the loads.

    ``max_drafts``: of a request's scheduled tokens the last so many are room for drafts behind its
    one token to compute, which the worker may fill, in part or not at all. It keeps the drafts that
    agree with what it draws after them, so it alone knows where the request's next step begins.
    """

    step: int
    new_requests: tuple[NewRequest, ...] = ()
    num_scheduled_tokens: Mapping[str, int] = field(default_factory=dict)
    max_drafts: Mapping[str, int] = field(default_factory=dict)
    new_block_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    saves: tuple[BlockMove, ...] = ()  # cache -> host tier: blocks that this step overwrites
    loads: tuple[BlockMove, ...] = ()  # host tier -> cache
    block_copies: tuple[BlockCopy, ...] = ()
    finished_request_ids: tuple[str, ...] = ()  # rows to free; preempted ones too

    @property
    def num_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())


class TokenLogprobs(NamedTuple):
    """Natural-log probabilities at one position, from the raw logits (before any parameter)."""

    token_id: int
    logprob: float
    rank: int  # 1 = most likely
    top: tuple[tuple[int, float], ...] = ()  # (token_id, logprob), best first


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStats:
    """What the worker did beside the results, counted since it last told."""

    graph_steps: int = 0  # forward passes launched as a captured graph
    eager_steps: int = 0  # and kernel by kernel
    graphs_captured: int = 0
    kernel_compiles: int = 0  # by Triton, since the server was ready
    drafts: int = 0  # times that a request got drafts
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()
    draft_seconds_saved: float = 0.0  # beside the same tokens without drafts; below 0 = lost
    draft_seconds_without: float = 0.0  # what steps that sought drafts would have taken without
    drafting_seconds: float = 0.0  # spent on finding drafts
    speculation_gain: float | None = None  # throughput of the last minute beside none, less 1
    speculation_switched_off: int = 0  # times that it did not pay
    speculation_guarded: int = 0  # of those, times that a minute would else have lost too much
    failed_proposers: int = 0  # requests that go on without drafts


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutput:
    """What one step yielded, worker -> scheduler. Requests that did not sample are absent.

    A request that sampled yielded one token, and one more for each draft that was accepted.
    """

    step: int
    sampled_token_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    logprobs: Mapping[str, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    prompt_logprobs: Mapping[str, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)  # these requests failed, alone
    # Blocks that this step loaded, and the host tier's copy was not what had been saved. What was
    # computed on them is void: the scheduler starts those requests anew.
    damaged_blocks: tuple[int, ...] = ()
    # Drafts that were verified, of requests that sampled; absent = none.
    num_draft_tokens: Mapping[str, int] = field(default_factory=dict)
    # Drafts for each request that would pay in a step like this one; 0 = none.
    num_drafts_wanted: int = 0
    worker: WorkerStats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimes:
    """When things happened to a request (monotonic seconds); sent once, as it finishes."""

    arrival: float
    queued: float  # reached the engine
    scheduled: float = 0.0  # first step; 0 = never
    first_token: float = 0.0
    last_token: float = 0.0
    finished: float = 0.0
    num_preemptions: int = 0


class EngineOutput(NamedTuple):
    """News of one request, engine -> front end. The last one carries ``finish_reason``."""

    request_id: str
    new_token_ids: tuple[int, ...] = ()
    new_logprobs: tuple[TokenLogprobs, ...] = ()
    new_prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0  # prompt tokens served by the prefix cache
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop token id that ended it; None for EOS
    error: str | None = None  # with FinishReason.ERROR: what the client is told
    is_bad_request: bool = False  # the error is the request's own fault (HTTP 400)
    times: RequestTimes | None = None
    # In the step that drew these tokens: drafts that were verified, and those that were accepted.
    drafts: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """A step in numbers, engine -> observability. Counters are increments since the last one."""

    time: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0  # never written, or forgotten
    num_cached_blocks: int = 0  # unowned, but a prefix hit would revive them
    num_owned_blocks: int = 0
    num_wasted_slots: int = 0  # allocated to running requests and not yet filled (fragmentation)
    num_scheduled_tokens: int = 0
    prompt_tokens: int = 0  # computed as prompt in this step
    generation_tokens: int = 0
    prefix_cache_queries: int = 0  # tokens
    prefix_cache_hits: int = 0  # tokens
    prefix_cache_host_hits: int = 0  # of those, the ones that came from the host tier
    num_host_slots: int = 0  # blocks that the host tier can hold
    num_host_blocks: int = 0  # that it holds
    saved_blocks: int = 0  # cache -> host tier
    loaded_blocks: int = 0  # host tier -> cache
    damaged_blocks: int = 0  # loaded, and not what had been saved
    preemptions: int = 0
    host_seconds: float = 0.0  # schedule + update, outside the model
    worker: WorkerStats | None = None

    @property
    def kv_cache_usage(self) -> float:
        """Share of blocks owned by live requests, 0 to 1."""
        return self.num_owned_blocks / self.num_blocks if self.num_blocks else 0.0

    @property
    def host_tier_usage(self) -> float:
        """Share of the host tier's slots that hold a block, 0 to 1."""
        return self.num_host_blocks / self.num_host_slots if self.num_host_slots else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOutputs:
    """Everything one step has to tell the front end: one message per step."""

    outputs: tuple[EngineOutput, ...] = ()
    stats: StepStats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the engine decided at start; the front end validates against it and prints it."""

    model: str
    architecture: str
    device: str
    dtype: str  # of the weights that are not quantised, and of activations
    kv_cache_dtype: str
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    quantization: str = "none"  # or how, and into which blocks: int8 (q8_64)
    num_host_slots: int = 0  # K/V blocks that the host tier can hold
    num_threads: int = 0  # CPU threads that compute; 0 = not told
    max_drafts: int = 0  # of one request in one step; 0 = no speculation
    speculation: str = "off"  # the method, and the model that drafts
    eos_token_ids: tuple[int, ...] = ()
    phases: Mapping[str, float] = field(default_factory=dict)  # start-up phase -> seconds
