"""Plans a step: which tokens are computed next, on which blocks. Knows no results.

One rule: each request's ``num_computed`` chases its ``num_tokens`` within one token budget a step;
first those that run, then those that wait.
"""

from __future__ import annotations

from collections.abc import Collection

from octavo.scheduler.live import LiveRequests
from octavo.scheduler.plan import Plan
from octavo.scheduler.request import NEVER, Request, Status
from octavo.types import NewRequest


class Planner:
    """Advances the counts of the requests it schedules, as if the step had already run.

    Args:
        max_num_seqs: most requests running at once.
        max_num_batched_tokens: most tokens in a step.
        max_chunk: most tokens of one request in a step; 0 = no such limit.
        inflight: the plans of steps whose results are not in yet; the scheduler keeps it.
    """

    def __init__(
        self,
        live: LiveRequests,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_chunk: int,
        inflight: Collection[Plan],
    ) -> None:
        self._live = live
        self._kv = live.kv
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_chunk = max_chunk or NEVER
        self._inflight = inflight
        self.num_drafts = 0  # room for so many in each request's step, where it costs nobody else

    def plan(self, step: int, *, now: float) -> Plan:
        plan = Plan(step=step, budget=self._max_num_batched_tokens)
        self._continue_running(plan)
        if len(self._live.waiting) and not plan.has_preempted:
            self._admit_waiting(plan, now)
        self._live.counters.num_scheduled_tokens += self._max_num_batched_tokens - plan.budget
        return plan

    def _continue_running(self, plan: Plan) -> None:
        full_blocks: list[Request] = []
        running = Status.RUNNING
        for request in tuple(self._live.running.values()):
            start = request.num_computed
            num_left = request.num_tokens - start
            # The second: it awaits the results of its last token. The third: just preempted.
            if num_left <= 0 or start >= request.end or request.status is not running:
                continue
            if plan.budget <= 0:
                break
            end = start + 1
            if num_left > 1:
                end = start + min(num_left, self._max_chunk, plan.budget)
                plan.num_reserved += self._num_blocks_left(request, end)
            if end > request.num_slots and not self._grow(request, end, plan):
                continue
            drafts = 0
            if self.num_drafts and num_left == 1 and start >= request.num_prompt_tokens:
                drafts = self._add_drafts(request, end, plan)
            self._commit(request, start, end + drafts, plan, drafts)
            if end >= request.register_at:
                full_blocks.append(request)
        # Only now: until here a request could still be taken back out of the step.
        for request in full_blocks:
            if request.request_id in plan.num_scheduled:
                self._register(request, plan)

    def _add_drafts(self, request: Request, end: int, plan: Plan) -> int:
        """How many drafts may follow a running request's token, in blocks that nobody waits for."""
        drafts = min(self.num_drafts, plan.budget - 1, request.end - end)
        if drafts <= 0:
            return 0
        if end + drafts > request.num_slots:
            kv = self._kv
            missing = kv.blocks_for(end + drafts) - len(request.table.block_ids)
            if missing <= kv.num_available - plan.num_reserved - len(self._live.running):
                self._grow(request, end + drafts, plan)
        return min(drafts, request.num_slots - end)

    def _num_blocks_left(self, request: Request, end: int) -> int:
        """Blocks that its known tokens beyond ``end`` will take."""
        return self._kv.blocks_for(request.num_tokens) - self._kv.blocks_for(end)

    def _commit(self, request: Request, start: int, end: int, plan: Plan, drafts: int = 0) -> None:
        """Puts tokens ``[start, end)``, which have their blocks, into the step; the last of them
        may be drafts, which count as accepted until the results are in."""
        request.num_computed = end
        request.num_tokens += drafts
        samples = end == request.num_tokens
        if samples and end < request.limit:
            request.num_tokens = end + 1
        if start < request.num_prompt_tokens:
            num_left = request.num_prompt_tokens - start
            self._live.counters.prompt_tokens += min(end - start, num_left)
            request.is_prompt_done = request.is_prompt_done or end - start >= num_left
        plan.budget -= end - start
        plan.num_scheduled[request.request_id] = end - start
        if drafts:
            plan.max_drafts[request.request_id] = drafts
        plan.entries.append((request, request.epoch, start, end, samples, drafts))

    def _grow(self, request: Request, num_tokens: int, plan: Plan) -> bool:
        """Gets blocks for a running request, preempting as needed; False if it gave way itself."""
        kv, live = self._kv, self._live
        while (fresh := kv.grow(request.table, num_tokens=num_tokens)) is None:
            assert len(live.running) > 1, f"{request.request_id} alone outgrew the cache"
            victim = live.policy.victim(live.running.values())
            if victim.request_id in plan.num_scheduled:
                plan.undo(victim)
            plan.has_preempted = True
            live.preempt(victim)
            if victim is request:
                return False
        request.num_slots += len(fresh) * kv.block_size
        # Perhaps for the second time in the step: for its token, then for drafts.
        before = plan.new_block_ids.get(request.request_id, ())
        plan.new_block_ids[request.request_id] = (*before, *fresh)
        return True

    def _register(self, request: Request, plan: Plan) -> None:
        """Makes the blocks that this step fills with known tokens findable."""
        token_ids, table = request.token_ids, request.table
        num_tokens = min(request.num_computed, len(token_ids))
        for _, key in self._kv.register(table, token_ids=token_ids, num_tokens=num_tokens):
            plan.registered.append((request, key))
        if self._kv.enable_prefix_caching:
            request.register_at = (table.num_registered + 1) * self._kv.block_size

    def _admit_waiting(self, plan: Plan, now: float) -> None:
        """Waiting requests in order, until one finds no room: nobody overtakes it."""
        num_visited = 0
        passed_over: list[Request] = []
        for request in self._live.waiting:
            if plan.budget <= 0 or len(self._live.running) >= self._max_num_seqs:
                break
            if request.status is Status.PREEMPTED and self._is_inflight(request):
                break  # it resumes with all its tokens only, and the last are about to arrive
            if self._awaits_parent(request, plan):
                passed_over.append(request)
            elif not self._admit(request, plan, now):
                break
            num_visited += 1
        self._live.waiting.drop_first(num_visited, keep=passed_over)

    def _is_inflight(self, request: Request) -> bool:
        return any(request.request_id in plan.num_scheduled for plan in self._inflight)

    def _awaits_parent(self, request: Request, plan: Plan) -> bool:
        """Whether a fork is to wait for its parent's prompt; lets go of a parent of no use."""
        parent = request.parent
        if parent is None:
            return False
        if parent.status is Status.RUNNING:
            # Copies precede the step's forward pass, so only what earlier steps compute counts.
            ready = parent.num_computed - plan.num_scheduled.get(parent.request_id, 0)
            return parent.first_step == plan.step or ready < request.num_prompt_tokens - 1
        if parent.is_waiting and not parent.is_prompt_done:
            return True
        request.parent = None
        return False

    def _admit(self, request: Request, plan: Plan, now: float) -> bool:
        """Gives a waiting request blocks and its first tokens of the step; False: no room.

        Room is asked for all its known tokens, not just this step's, on top of what the known
        tokens of running ones will take: two long prompts never preempt each other half-way.
        """
        kv, table, parent = self._kv, request.table, request.parent
        # A block for each that runs, within reason: who is admitted into the last blocks is soon
        # preempted again (measured: under overload 4 to 12 % less is computed than with a 64th).
        headroom = min(len(self._live.running), kv.num_blocks // 16)
        room = kv.num_available - plan.num_reserved - headroom
        num_host_hits = 0
        if parent is not None:
            start = request.num_prompt_tokens - 1
            if kv.blocks_for(request.num_tokens) - start // kv.block_size > room:
                return False
            copy = kv.fork(table, parent=parent.table, num_tokens=start)
            if copy is not None:
                plan.block_copies.append(copy)
        else:
            hits = self._find_hits(request)
            start = len(hits) * kv.block_size
            if kv.num_blocks_missing(hits, num_tokens=request.num_tokens) > room:
                return False
            loaded = kv.attach(table, hits)
            plan.registered += [(request, key) for _, key in loaded]
            num_host_hits = len(loaded)
        shared = tuple(table.keys[: start // kv.block_size])
        plan.admitted.append((request, shared, parent))
        end = min(request.num_tokens, start + min(self._max_chunk, plan.budget))
        fresh = kv.grow(table, num_tokens=end)
        assert fresh is not None, "room was there"
        plan.num_reserved += self._num_blocks_left(request, end)
        self._start(request, start, plan, now, num_host_hits * kv.block_size)
        self._commit(request, start, end, plan)
        self._register(request, plan)
        return True

    def _find_hits(self, request: Request) -> list[int]:
        max_tokens = request.num_tokens - 1  # at least one is computed, so that one is sampled
        if request.needs_prompt_logits:
            # A token that is not computed yields no logits for the position after it.
            max_tokens = min(max_tokens, request.num_prompt_logprobs)
        return self._kv.find_hits(request.table, token_ids=request.token_ids, max_tokens=max_tokens)

    def _start(
        self, request: Request, start: int, plan: Plan, now: float, num_host_tokens: int
    ) -> None:
        """Moves a waiting request, with ``start`` tokens found or forked, to the running ones;
        ``num_host_tokens`` of them were found in the host tier alone."""
        if request.is_lookup_due:
            request.is_lookup_due = False
            request.num_cached_tokens = start
        if request.status is Status.WAITING:
            request.scheduled_time = now
            is_looked_up = request.parent is None and not request.needs_prompt_logits
            if is_looked_up and self._kv.enable_prefix_caching:
                self._live.counters.prefix_cache_queries += request.num_prompt_tokens
                self._live.counters.prefix_cache_hits += start
                self._live.counters.prefix_cache_host_hits += num_host_tokens
        self._live.start(request)
        request.parent = None
        request.first_step = plan.step
        request.num_slots = len(request.table.block_ids) * self._kv.block_size
        has_output = len(request.token_ids) > request.num_prompt_tokens
        plan.new_requests.append(
            NewRequest(
                request_id=request.request_id,
                token_ids=tuple(request.token_ids) if has_output else request.prompt_token_ids,
                num_prompt_tokens=request.num_prompt_tokens,
                num_computed_tokens=start,
                block_ids=tuple(request.table.block_ids),
                params=request.params,
                cache_salt=request.cache_salt,
            )
        )
