"""Drafts of any quality leave every token and log-probability as it is without them.

The real scheduler, cache, worker and kernels on a tiny random model whose cache starts as NaN;
only the drafts are made up: right, wrong, or right up to a point.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from octavo.clock import VirtualClock
from octavo.config import SchedulerConfig
from octavo.engine.core import EngineCore
from octavo.kvcache.manager import KVCacheManager
from octavo.scheduler.scheduler import Scheduler
from octavo.speculative import NoDrafts, Outlook
from octavo.types import (
    EngineOutput,
    EngineRequest,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
)
from octavo.worker.executor import InlineExecutor, ThreadExecutor
from octavo.worker.model_runner import ModelRunner

Make = Callable[..., ModelRunner]
VOCAB_SIZE = 300
rng = random.Random(6)


@dataclass
class Outcome:
    """All that a client would get."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    drafts: list[tuple[int, int]] = field(default_factory=list, compare=False)

    def add(self, news: EngineOutput) -> None:
        assert len(news.new_logprobs) in (0, len(news.new_token_ids))
        self.tokens += news.new_token_ids
        self.logprobs += news.new_logprobs
        self.prompt_logprobs += news.new_prompt_logprobs
        if news.drafts is not None:
            self.drafts.append(news.drafts)
        self.reason, self.stop_reason, self.error = (
            news.finish_reason,
            news.stop_reason,
            news.error,
        )


class Oracle(NoDrafts):
    """Drafts from what requests are known to generate, spoilt with a given probability."""

    num_wanted = 5

    def __init__(
        self, outcomes: Mapping[str, Outcome], *, prompts: Mapping[str, int], error: float
    ):
        self._outcomes, self._prompts, self._error = outcomes, prompts, error
        self._rng = random.Random(3)
        self.num_drafted = self.num_accepted = 0

    def draft(self, outlooks: Sequence[Outlook], *, num_tokens: int) -> Mapping[str, Sequence[int]]:
        drafts = {}
        for name, token_ids, room in outlooks:
            output, truth = token_ids[self._prompts[name] :].tolist(), self._outcomes[name].tokens
            at = len(output)  # past the end where a step overlaps the one that ended the request
            assert output[: len(truth)] == truth[:at]
            truth = truth[at:]
            truth = (truth + [7] * room)[: self._rng.randint(0, room)]
            spoilt = [self._rng.randrange(VOCAB_SIZE) for _ in truth]
            pairs = zip(truth, spoilt, strict=True)
            if truth:
                drafts[name] = [b if self._rng.random() < self._error else a for a, b in pairs]
        return drafts

    def learn(
        self,
        drafts: Mapping[str, Sequence[int]],
        tokens: Mapping[str, Sequence[int]],
        *,
        num_tokens: int,
        seconds: float,
    ) -> None:
        for name, draft in drafts.items():
            if name not in tokens:
                continue  # the request failed
            assert 1 <= len(tokens[name]) <= 1 + len(draft)
            self.num_drafted += len(draft)
            self.num_accepted += len(tokens[name]) - 1


def run(
    runner: ModelRunner,
    requests: Sequence[EngineRequest],
    *,
    num_blocks: int = 400,
    step_tokens: int = 256,
    max_inflight: int = 1,
    max_drafts: int = 0,
) -> tuple[dict[str, Outcome], int]:
    """(outcome of each request, preemptions)."""
    kv = KVCacheManager(num_blocks, block_size=16, check_invariants=True)
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=40),
        kv=kv,
        max_model_len=256,
        max_num_batched_tokens=step_tokens,
        max_drafts=max_drafts,
    )
    executor = (ThreadExecutor if max_inflight > 1 else InlineExecutor)(runner)
    core = EngineCore(scheduler, executor, VirtualClock(), max_inflight=max_inflight)
    outcomes: dict[str, Outcome] = {}
    preemptions = 0
    for request in requests:
        core.add_request(request)
    while core.has_work:
        turn = core.step()
        assert turn.stats is not None
        preemptions += turn.stats.preemptions
        for news in turn.outputs:
            outcomes.setdefault(news.request_id, Outcome()).add(news)
    core.close()
    assert kv.pool.num_unowned == num_blocks
    return outcomes, preemptions


def check(
    make_runner: Make,
    requests: Sequence[EngineRequest],
    *,
    error: float,
    num_blocks: int = 400,
    **options: Any,
) -> tuple[dict[str, Outcome], int, Oracle]:
    """Runs with drafts what was run without, and compares all that clients get."""
    want, _ = run(make_runner(num_blocks=400), requests)
    prompts = {request.request_id: len(request.prompt_token_ids) for request in requests}
    oracle = Oracle(want, prompts=prompts, error=error)
    runner = make_runner(num_blocks=num_blocks, drafter=oracle)
    found, preemptions = run(runner, requests, num_blocks=num_blocks, max_drafts=5, **options)
    assert found == want
    assert oracle.num_drafted > 0
    return found, preemptions, oracle


def prompt(length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(2, VOCAB_SIZE) for _ in range(length))


PARAMS = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0, "seed": 2**63 + 5},
    "penalties": {
        "temperature": 0.0,
        "presence_penalty": 0.9,
        "frequency_penalty": 0.7,
        "repetition_penalty": 1.3,
    },
    "filters": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 5},
    "words": {
        "temperature": 0.7,
        "logit_bias": ((7, 1.5), (9, -3.0)),
        "bad_words_token_ids": tuple((i, j) for i in range(0, 300, 2) for j in range(0, 300, 7)),
        "seed": 6,
    },
    "allowed": {"temperature": 1.0, "allowed_token_ids": tuple(range(3, 40)), "seed": 8},
    "scored prompt": {"temperature": 0.7, "seed": 1, "prompt_logprobs": 2},
    "end": {
        "temperature": 1.0,
        "seed": 3,
        "min_tokens": 7,
        "stop_token_ids": tuple(range(0, 300, 8)),
        "eos_token_ids": (1,),
    },
}


@pytest.mark.parametrize("error", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("max_inflight", [1, 2])
@pytest.mark.parametrize("kind", PARAMS)
def test_drafts_change_nothing_but_the_number_of_steps(
    kind: str, max_inflight: int, error: float, make_runner: Make
) -> None:
    params: Any = PARAMS[kind]
    requests = [
        EngineRequest(
            request_id=f"r{i}",
            prompt_token_ids=prompt(length),
            params=SamplingParams(max_tokens=40, logprobs=3, **params),
        )
        for i, length in enumerate((50, 1, 33))
    ]
    found, _, oracle = check(make_runner, requests, error=error, max_inflight=max_inflight)
    if kind == "end":
        assert {outcome.reason for outcome in found.values()} == {FinishReason.STOP}
        assert all(8 <= len(outcome.tokens) < 40 for outcome in found.values())
    else:
        assert all(len(outcome.tokens) == 40 for outcome in found.values())
    if max_inflight == 1:  # else a step may begin before the one that ends the request is known
        told = [drafts for outcome in found.values() for drafts in outcome.drafts]
        sums = tuple(map(sum, zip(*told, strict=True)))
        assert sums == (oracle.num_drafted, oracle.num_accepted)
    share = oracle.num_accepted / oracle.num_drafted
    assert share > 0.7 if error == 0.0 else share < 0.6 if error == 0.4 else share < 0.1


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_everything_at_once_in_a_cache_that_is_too_small(
    max_inflight: int, make_runner: Make
) -> None:
    """Chunks, prefix hits, forks, preemption and drafts."""
    shared, requests = prompt(60), []
    for i in range(12):
        params: Any = list(PARAMS.values())[i % len(PARAMS)]
        requests.append(
            EngineRequest(
                request_id=f"r{i}",
                prompt_token_ids=shared if i % 3 else (*shared, i),
                params=SamplingParams(max_tokens=30 + i, logprobs=1, **params),
                fork_of="r1" if i in (2, 4) else None,
            )
        )
    _, preemptions, oracle = check(
        make_runner,
        requests,
        error=0.3,
        num_blocks=18,
        step_tokens=37,
        max_inflight=max_inflight,
    )
    assert preemptions > 0 and oracle.num_accepted > 0


@pytest.mark.parametrize("length", [200, 226, 250, 255])
def test_a_context_that_ends_is_filled_and_not_passed(length: int, make_runner: Make) -> None:
    request = EngineRequest(
        request_id="r",
        prompt_token_ids=prompt(length),
        params=SamplingParams(max_tokens=1000, temperature=0.0),
    )
    want, _ = run(make_runner(num_blocks=400), [request])
    oracle = Oracle(want, prompts={"r": length}, error=0.0)
    runner = make_runner(num_blocks=16, drafter=oracle)
    found, _ = run(runner, [request], num_blocks=16, max_drafts=5, max_inflight=2)
    assert found == want and len(found["r"].tokens) == 256 - length
    assert found["r"].reason is FinishReason.LENGTH


def test_a_token_that_cannot_be_drawn_fails_where_it_would_without_drafts(
    make_runner: Make,
) -> None:
    """After two tokens every id is a bad word's end."""
    allowed = (5, 6)
    params = SamplingParams(
        max_tokens=20,
        temperature=0.0,
        allowed_token_ids=allowed,
        bad_words_token_ids=tuple((a, b, c) for a in allowed for b in allowed for c in allowed),
    )
    request = EngineRequest(request_id="r", prompt_token_ids=prompt(20), params=params)
    want, _ = run(make_runner(num_blocks=400), [request])
    assert want["r"].error is not None and len(want["r"].tokens) == 2
    other = Outcome(tokens=[*want["r"].tokens, 5, 6, 5, 6])
    oracle = Oracle({"r": other}, prompts={"r": 20}, error=0.0)
    found, _ = run(make_runner(num_blocks=400, drafter=oracle), [request], max_drafts=5)
    assert found == want
