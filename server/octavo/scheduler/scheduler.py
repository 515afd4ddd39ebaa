"""The scheduler's verbs: add, abort, schedule, update. Knows token counts and block ids; knows
nothing of tensors, text, HTTP or what time it is.

``schedule`` advances the counts as it plans, ``update`` brings the tokens later, so that a step may
be planned while those before it still run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping

from octavo.config import SchedulerConfig
from octavo.kvcache import invariants
from octavo.kvcache.manager import KVCacheManager
from octavo.scheduler import news
from octavo.scheduler.live import Counters, LiveRequests
from octavo.scheduler.plan import Plan, blame
from octavo.scheduler.planner import Planner
from octavo.scheduler.policy import make_policy
from octavo.scheduler.request import Request, Status
from octavo.types import (
    EngineOutput,
    EngineRequest,
    FinishReason,
    ModelOutput,
    SchedulerOutput,
    StepStats,
    TokenLogprobs,
    WorkerStats,
)


class Scheduler:
    """Decides every step of the requests it is given.

    Steps are updated (or failed) in the order they were scheduled; any number may be in flight.
    The id of a request that ended or was preempted goes to the worker with the next step that
    computes anything. Its blocks may be another's in that very step: steps run in order.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        kv: KVCacheManager,
        max_model_len: int,
        max_num_batched_tokens: int,
        max_drafts: int = 0,
    ) -> None:
        if max_num_batched_tokens < 1 or config.max_num_seqs < 1:
            raise ValueError(
                "max_num_batched_tokens and max_num_seqs must be at least 1, "
                f"got {max_num_batched_tokens} and {config.max_num_seqs}"
            )
        self._kv = kv
        self._max_model_len = max_model_len
        self._max_drafts = max_drafts  # for one request in a step, whatever the worker wants
        policy = make_policy(config.scheduling_policy)
        self._live = LiveRequests(kv=kv, policy=policy)
        self._inflight: deque[Plan] = deque()
        self._planner = Planner(
            self._live,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_chunk=config.long_prefill_token_threshold,
            inflight=self._inflight,
        )
        self._next_step = 0
        self._num_added = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._live.by_id)

    @property
    def num_unfinished(self) -> int:
        return len(self._live.by_id)

    # ---- requests come and go -----------------------------------------------------------------

    def add(self, request: EngineRequest, *, now: float = 0.0) -> None:
        """Queues a request. Raises ValueError for one that could never run to its end."""
        self._check(request)
        parent = self._live.by_id.get(request.fork_of) if request.fork_of is not None else None
        if parent is not None and (
            parent.prompt_token_ids != request.prompt_token_ids
            or parent.cache_salt != request.cache_salt
        ):
            raise ValueError(
                f"fork_of must name a request with the same prompt and cache_salt; "
                f"{request.request_id!r} and {request.fork_of!r} differ"
            )
        table = self._kv.new_table(
            request.prompt_token_ids,
            cache_salt=request.cache_salt,
            like=parent.table if parent is not None else None,
        )
        shares_nothing = (
            len(request.prompt_token_ids) == 1 or request.params.prompt_logprobs is not None
        )
        self._num_added += 1
        self._live.add(
            Request(
                request,
                order=self._num_added,
                max_model_len=self._max_model_len,
                table=table,
                parent=None if shares_nothing else parent,
                now=now,
            )
        )

    def _check(self, request: EngineRequest) -> None:
        num_prompt, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
        if request.request_id in self._live.by_id:
            raise ValueError(f"request_id {request.request_id!r} is in use by a live request")
        if num_prompt == 0:
            raise ValueError("the prompt must hold at least 1 token, got 0")
        if num_prompt + min(max_tokens, 1) > self._max_model_len:
            raise ValueError(
                f"the prompt has {num_prompt} tokens, and max_model_len is {self._max_model_len} "
                f"tokens for prompt and output together"
            )
        capacity = self._kv.num_blocks * self._kv.block_size
        # The last token is sampled and never computed.
        num_slots = max(num_prompt, min(num_prompt + max_tokens, self._max_model_len) - 1)
        if num_slots > capacity:
            raise ValueError(
                f"the prompt of {num_prompt} tokens with max_tokens={max_tokens} takes "
                f"{num_slots} tokens of K/V cache, which holds {capacity}"
            )

    def abort(self, request_ids: Iterable[str], *, now: float = 0.0) -> list[EngineOutput]:
        """Ends requests wherever they are; unknown ids are ignored. Returns their last outputs."""
        outputs = []
        for request_id in request_ids:
            request = self._live.by_id.get(request_id)
            if request is not None:
                self._live.retire(request)
                outputs.append(news.of_ended(request, FinishReason.ABORT, now=now))
        return outputs

    def reset_prefix_cache(self) -> None:
        """Nothing computed so far serves prefix hits any more; live requests are unharmed."""
        self._kv.reset_prefix_cache()

    # ---- steps --------------------------------------------------------------------------------

    def schedule(self, now: float) -> SchedulerOutput:
        """Plans the next step. One without scheduled tokens is neither submitted nor updated."""
        plan = self._planner.plan(self._next_step, now=now)
        if self._kv.check_invariants:
            self.check_invariants()
        if not plan.entries:
            return SchedulerOutput(step=plan.step)
        self._next_step += 1
        self._inflight.append(plan)
        if self._kv.tier.num_slots:
            plan.moves = self._kv.tier.take_moves()
            self._live.counters.saved_blocks += len(plan.moves.saves)
            self._live.counters.loaded_blocks += len(plan.moves.loads)
        finished_ids, self._live.dropped_ids = tuple(self._live.dropped_ids), []
        return plan.output(finished_ids)

    def update(self, output: ModelOutput, now: float) -> list[EngineOutput]:
        """Takes in the results of the oldest step in flight; news of the requests in it."""
        assert self._inflight, f"results of step {output.step}, and none is in flight"
        plan = self._inflight[0]
        assert plan.step == output.step, f"results of step {output.step}, due are {plan.step}'s"
        if output.damaged_blocks:  # first: what failed because of them has an excuse
            self._restart_damaged(output.damaged_blocks)
        outputs = self._fail(output.errors, now=now) if output.errors else []
        self._inflight.popleft()
        sampled, logprobs = output.sampled_token_ids, output.logprobs
        verified = output.num_draft_tokens
        chunks = output.prompt_logprobs
        num_generated = 0
        self._planner.num_drafts = min(output.num_drafts_wanted, self._max_drafts)
        for request, epoch, start, _, samples, drafts in plan.entries:
            if request.epoch != epoch:
                continue
            request_id = request.request_id
            prompt_logprobs: tuple[TokenLogprobs, ...] = ()
            if chunks and request_id in chunks:
                prompt_logprobs = news.undelivered(request, start, chunks[request_id])
            if samples:
                if request.params.max_tokens == 0:
                    # Only the prompt was to be computed; what was sampled after it is dropped.
                    ended = self._end(request, FinishReason.LENGTH, (), (), prompt_logprobs, now)
                    outputs.append(ended)
                    continue
                tokens = sampled.get(request_id, ())
                scores = logprobs.get(request_id, ()) if logprobs else ()
                assert 1 <= len(tokens) <= 1 + drafts, f"{request_id}: {len(tokens)} tokens"
                told: tuple[int, int] | None = None
                if drafts:
                    self._take_back(request, 1 + drafts - len(tokens))
                    if request_id in verified:
                        told = verified[request_id], len(tokens) - 1
                reason = request.append(tokens[0])
                for taken in range(1, len(tokens)):
                    if reason is not None:
                        tokens, scores = tokens[:taken], scores[:taken]
                        break
                    reason = request.append(tokens[taken])
                num_generated += len(tokens)
                request.last_token_time = now
                if request.first_token_time == 0.0:
                    request.first_token_time = now
                if reason is None:
                    running = news.of_running(request, tokens, scores, prompt_logprobs, told)
                    outputs.append(running)
                else:
                    ended = self._end(request, reason, tokens, scores, prompt_logprobs, now, told)
                    outputs.append(ended)
            elif prompt_logprobs:
                outputs.append(news.of_running(request, (), (), prompt_logprobs))
        self._live.counters.generation_tokens += num_generated
        if self._kv.check_invariants:
            self.check_invariants()
        return outputs

    def _take_back(self, request: Request, num_rejected: int) -> None:
        """Drafts that were counted as accepted and were not."""
        request.num_tokens -= num_rejected
        # One that was preempted meanwhile has computed nothing; it comes back with its tokens.
        if request.status is Status.RUNNING:
            request.num_computed -= num_rejected

    def fail_step(self, message: str, *, now: float, newest: bool = False) -> list[EngineOutput]:
        """Gives up the oldest step in flight (or the newest): all requests in it end in error."""
        plans = list(self._inflight)[-1 if newest else 0 :]
        plan = plans[0]
        suspects = {entry[0] for entry in plan.entries}
        # Its saves may never have happened.
        unsaved = plan.moves.saves.keys()
        self._kv.forget(unsaved)
        _, victims = blame(plans, suspects, bad_keys=unsaved)
        self._inflight.remove(plan)
        outputs: list[EngineOutput] = []
        for request, epoch, *_ in plan.entries:
            if request.epoch == epoch:
                outputs.append(self._end_in_error(request, message, now=now))
        self._void(plans, victims - suspects)
        return outputs

    def stats(
        self, now: float, *, host_seconds: float = 0.0, worker: WorkerStats | None = None
    ) -> StepStats:
        """The state now, and the counters since the last call, which it sets to zero."""
        live, pool, counters = self._live, self._kv.pool, self._live.counters
        live.counters = Counters()
        num_slots = num_used = 0
        for request in live.running.values():
            num_slots += request.num_slots
            num_used += request.num_computed
        return StepStats(
            time=now,
            num_running=len(live.running),
            num_waiting=len(live.waiting),
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_unowned - pool.num_cached,
            num_cached_blocks=pool.num_cached,
            num_owned_blocks=pool.num_blocks - pool.num_unowned,
            num_wasted_slots=num_slots - num_used,
            num_scheduled_tokens=counters.num_scheduled_tokens,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            prefix_cache_queries=counters.prefix_cache_queries,
            prefix_cache_hits=counters.prefix_cache_hits,
            prefix_cache_host_hits=counters.prefix_cache_host_hits,
            num_host_slots=self._kv.tier.num_slots,
            num_host_blocks=len(self._kv.tier),
            saved_blocks=counters.saved_blocks,
            loaded_blocks=counters.loaded_blocks,
            damaged_blocks=counters.damaged_blocks,
            preemptions=counters.preemptions,
            host_seconds=host_seconds,
            worker=worker,
        )

    def check_invariants(self) -> None:
        """Raises `kvcache.invariants.InvariantError` on a contradiction. O(blocks)."""
        live = self._live
        tables = {r.request_id: (r.table, r.num_computed) for r in live.by_id.values()}
        # Room for drafts that were rejected is kept: by two steps, where they overlap.
        invariants.check(self._kv, tables=tables, slack=2 * self._max_drafts)
        assert len(live.running) + len(live.waiting) == len(live.by_id)
        for request in live.running.values():
            assert request.num_slots == len(request.table.block_ids) * self._kv.block_size
            assert request.num_computed <= request.num_tokens <= request.limit

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        prompt_logprobs: tuple[TokenLogprobs, ...],
        now: float,
        drafts: tuple[int, int] | None = None,
    ) -> EngineOutput:
        if request.status is Status.RUNNING:
            # Steps already collected computed all known tokens but the last: let them be found.
            num_tokens = max(request.num_prompt_tokens, len(request.token_ids) - 1)
            num_tokens = min(num_tokens, request.num_computed)
            self._kv.register(request.table, token_ids=request.token_ids, num_tokens=num_tokens)
        self._live.retire(request)
        return news.of_ended(
            request,
            reason,
            now=now,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            drafts=drafts,
        )

    def _fail(self, errors: Mapping[str, str], *, now: float) -> list[EngineOutput]:
        """Ends the requests of the oldest step that failed alone."""
        plans = list(self._inflight)
        suspects = {e[0]: e[1] for e in plans[0].entries if e[0].request_id in errors}
        # One that was aborted meanwhile has no output any more, but others may build on it.
        guilty, victims = blame(plans, set(suspects))
        outputs = [
            self._end_in_error(request, errors[request.request_id], now=now)
            for request, epoch in suspects.items()
            if request in guilty and request.epoch == epoch
        ]
        self._void(plans, victims)
        return outputs

    def _restart_damaged(self, blocks: Collection[int]) -> None:
        """Starts everyone anew who builds on these blocks, which the oldest step loaded badly."""
        plans = list(self._inflight)
        loads = plans[0].moves.loads
        bad_keys = {key for key, move in loads.items() if move.block in blocks}
        self._live.counters.damaged_blocks += len(bad_keys)
        _, victims = blame(plans, set(), bad_keys=bad_keys)
        self._void(plans, victims)

    def _end_in_error(self, request: Request, message: str, *, now: float) -> EngineOutput:
        """Ends it; what it computed serves no hits, what it found in the cache still does."""
        num_found = request.num_cached_tokens // self._kv.block_size
        self._kv.forget(request.table.keys[num_found:])
        self._live.retire(request)
        return news.of_ended(request, FinishReason.ERROR, now=now, error=message)

    def _void(self, plans: list[Plan], victims: set[Request]) -> None:
        """Forgets what these steps registered (whoever did), and restarts who built on it."""
        for plan in plans:
            self._kv.forget([key for _, key in plan.registered])
        for request in sorted(victims, key=lambda request: request.order):
            self._live.restart(request)
