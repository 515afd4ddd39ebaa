"""One live request as the scheduler sees it. Knows its tokens and counts; knows no other request.

Draw its tokens as one line::

    [0, num_computed)           K/V written, or due in a step already submitted
    [0, len(token_ids))         known here
    [len(token_ids), num_tokens) sampled by a step in flight: the worker has them, we do not yet
    [0, limit)                  the most it may ever have

Nothing says in which phase a request is: ``num_computed`` chases ``num_tokens``, and a step that
reaches it samples one token more. While a step with drafts is in flight both count as if all were
accepted; its results take back those that were not.
"""

from __future__ import annotations

from enum import Enum, auto

from octavo.kvcache.manager import BlockTable
from octavo.types import EngineRequest, FinishReason, RequestTimes

NEVER = 1 << 62


class Status(Enum):
    WAITING = auto()  # never scheduled
    PREEMPTED = auto()  # waiting again, its blocks given up
    RUNNING = auto()
    FINISHED = auto()


class Request:
    """Mutable, owned by one Scheduler; two requests are never equal, whatever their ids."""

    __slots__ = (
        "arrival_time",
        "cache_salt",
        "end",
        "epoch",
        "first_step",
        "first_token_time",
        "is_lookup_due",
        "is_prompt_done",
        "last_token_time",
        "limit",
        "num_cached_tokens",
        "num_computed",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "num_slots",
        "num_tokens",
        "order",
        "params",
        "parent",
        "priority",
        "prompt_token_ids",
        "queued_time",
        "register_at",
        "request_id",
        "scheduled_time",
        "status",
        "stop_reason",
        "stops",
        "table",
        "token_ids",
    )

    def __init__(
        self,
        request: EngineRequest,
        *,
        order: int,
        max_model_len: int,
        table: BlockTable,
        parent: Request | None,
        now: float,
    ) -> None:
        params = request.params
        self.request_id = request.request_id
        self.params = params
        self.priority = request.priority
        self.cache_salt = request.cache_salt
        self.order = order  # of arrival here; unique
        self.prompt_token_ids = request.prompt_token_ids
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.token_ids = list(request.prompt_token_ids)
        self.limit = min(self.num_prompt_tokens + params.max_tokens, max_model_len)
        # The last token is never computed; a prompt always is.
        self.end = max(self.num_prompt_tokens, self.limit - 1)
        eos = () if params.ignore_eos else params.eos_token_ids
        self.stops = frozenset((*eos, *params.stop_token_ids))
        self.stop_reason: int | None = None

        self.status = Status.WAITING
        self.parent = parent  # until first scheduled: whose prompt blocks to share
        self.epoch = 0  # results of steps submitted in an earlier epoch are void
        self.num_computed = 0
        self.num_tokens = self.num_prompt_tokens
        self.first_step = -1  # since it was last admitted
        self.is_prompt_done = False
        self.num_prompt_logprobs = 0  # delivered: of positions 1 .. num_prompt_logprobs

        self.table = table
        self.num_slots = 0  # len(table.block_ids) * block_size
        self.register_at = NEVER  # tokens, at which the next block is full

        self.num_cached_tokens = 0
        self.is_lookup_due = True  # whether `num_cached_tokens` is still to be found out
        self.num_preemptions = 0
        self.arrival_time = request.arrival_time
        self.queued_time = now
        self.scheduled_time = 0.0
        self.first_token_time = 0.0
        self.last_token_time = 0.0

    @property
    def is_waiting(self) -> bool:
        return self.status is Status.WAITING or self.status is Status.PREEMPTED

    def append(self, token_id: int) -> FinishReason | None:
        """Takes the next sampled token; why the request ends with it, or None."""
        token_ids = self.token_ids
        token_ids.append(token_id)
        if token_id in self.stops:
            params = self.params
            # Before min_tokens the sampler masks these, so none can come; were one forced by
            # allowed_token_ids, it must not end the request either.
            if len(token_ids) - self.num_prompt_tokens > params.min_tokens:
                is_eos = not params.ignore_eos and token_id in params.eos_token_ids
                self.stop_reason = None if is_eos else token_id
                return FinishReason.STOP
        return FinishReason.LENGTH if len(token_ids) >= self.limit else None

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether some prompt position's logprob is still to be delivered."""
        return (
            self.params.prompt_logprobs is not None
            and self.num_prompt_logprobs < self.num_prompt_tokens - 1
        )

    def rewind(self) -> None:
        """Back to nothing computed. Tokens in flight still count and arrive."""
        self.status = Status.PREEMPTED
        self.num_computed = 0

    def drop_inflight(self) -> None:
        """Whatever steps in flight yield for it is void."""
        self.epoch += 1
        self.num_tokens = len(self.token_ids)

    def times(self, *, finished: float) -> RequestTimes:
        return RequestTimes(
            arrival=self.arrival_time,
            queued=self.queued_time,
            scheduled=self.scheduled_time,
            first_token=self.first_token_time,
            last_token=self.last_token_time,
            finished=finished,
            num_preemptions=self.num_preemptions,
        )
