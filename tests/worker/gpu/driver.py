"""Scheduler, cache and GPU runner driven together, and what clients would get of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.clock import VirtualClock
from octavo.config import SchedulerConfig
from octavo.engine.core import EngineCore
from octavo.kvcache.manager import KVCacheManager
from octavo.scheduler.scheduler import Scheduler
from octavo.types import EngineRequest, FinishReason, SamplingParams, TokenLogprobs
from octavo.worker.gpu.executor import GpuExecutor
from tests.worker.gpu.conftest import Engine
from tests.worker.gpu.toy_model import POISONS

_rng = random.Random(4)
PROMPT = tuple(_rng.randrange(20, 97) for _ in range(39))
NUM_TOKENS = 6
PARAMS = {
    "greedy": SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0),
    "seeded": SamplingParams(max_tokens=NUM_TOKENS, seed=2**63 + 5, logprobs=2),
    "everything": SamplingParams(
        max_tokens=NUM_TOKENS,
        min_tokens=4,
        temperature=0.8,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias=((27, 1.5), (29, -3.0), (POISONS, -100.0)),
        bad_words_token_ids=((28,), (25, 26)),
        seed=77,
        eos_token_ids=(1,),
        ignore_eos=True,
        logprobs=3,
        prompt_logprobs=2,
    ),
}


@dataclass
class Outcome:
    """All that a client would get."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    error: str | None = None


class Driver:
    """An engine core with two steps in flight, and what it told."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_inflight: int = 2,
        can_find: bool = True,
    ) -> None:
        sizes = engine.buffers.sizes
        self.engine = engine
        self.kv = KVCacheManager(
            sizes.num_blocks,
            block_size=sizes.block_size,
            enable_prefix_caching=can_find,
            check_invariants=True,
        )
        scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=sizes.max_num_seqs),
            kv=self.kv,
            max_model_len=sizes.max_model_len,
            max_num_batched_tokens=sizes.max_num_tokens,
            max_drafts=sizes.max_drafts,
        )
        self.core = EngineCore(
            scheduler, GpuExecutor(engine.runner), VirtualClock(), max_inflight=max_inflight
        )
        self.outcomes: dict[str, Outcome] = {}
        self.num_preemptions = self.num_hits = self.num_replayed = 0
        self.num_steps = self.num_drafts = self.num_accepted = 0
        self.num_told = self.num_told_accepted = 0  # drafts, by the requests' own news

    def add(self, *requests: EngineRequest) -> None:
        for request in requests:
            self.core.add_request(request)

    def step(self) -> None:
        turn = self.core.step()
        assert turn.stats is not None
        self.num_steps += 1
        if turn.stats.worker is not None:
            self.num_replayed += turn.stats.worker.graph_steps
            self.num_drafts += turn.stats.worker.draft_tokens
            self.num_accepted += turn.stats.worker.accepted_tokens
        self.num_preemptions += turn.stats.preemptions
        self.num_hits += turn.stats.prefix_cache_hits
        for news in turn.outputs:
            outcome = self.outcomes.setdefault(news.request_id, Outcome())
            outcome.tokens += news.new_token_ids
            outcome.logprobs += news.new_logprobs
            outcome.prompt_logprobs += news.new_prompt_logprobs
            outcome.finish, outcome.error = news.finish_reason, news.error
            if news.drafts is not None:
                self.num_told += news.drafts[0]
                self.num_told_accepted += news.drafts[1]

    def run(self, *waves: Sequence[EngineRequest]) -> dict[str, Outcome]:
        for wave in waves:
            self.add(*wave)
            while self.core.has_work:
                self.step()
        return self.outcomes

    def check_that_nothing_leaked(self) -> None:
        """One more request brings the worker what it was not told yet: who finished."""
        self.run([subject(SamplingParams(max_tokens=1), name="last")])
        assert len(self.engine.table) == 1
        assert self.engine.table.failed == {}
        assert self.kv.num_available == self.kv.num_blocks


def subject(
    params: SamplingParams,
    *,
    name: str = "subject",
    prompt: Sequence[int] = PROMPT,
    **more: Any,
) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_token_ids=tuple(prompt), params=params, **more)


def crowd(size: int, *, prompt: Sequence[int] | None = None) -> list[EngineRequest]:
    others = random.Random(8)
    kinds = list(PARAMS.values())
    return [
        subject(
            kinds[i % len(kinds)],
            name=f"other-{i}",
            prompt=prompt or [others.randrange(20, 97) for _ in range(others.randint(1, 50))],
        )
        for i in range(size)
    ]
