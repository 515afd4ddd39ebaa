"""Same request, same bits: tokens and log-probabilities whatever happens around a request.

The real scheduler, cache, worker and kernels on a tiny random model whose cache starts as NaN.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from octavo.clock import VirtualClock
from octavo.config import SchedulerConfig
from octavo.engine.core import EngineCore
from octavo.kvcache.manager import KVCacheManager
from octavo.scheduler.scheduler import Scheduler
from octavo.types import EngineRequest, SamplingParams, TokenLogprobs
from octavo.worker.executor import InlineExecutor, ThreadExecutor
from octavo.worker.model_runner import ModelRunner
from octavo_kernels import parallel

Make = Callable[..., ModelRunner]
rng = random.Random(4)
PROMPT = tuple(rng.randrange(2, 300) for _ in range(77))
PARAMS = {
    "greedy": SamplingParams(max_tokens=20, temperature=0.0, logprobs=3),
    "seeded": SamplingParams(max_tokens=20, temperature=1.0, seed=2**63 + 5, logprobs=3),
    "everything": SamplingParams(
        max_tokens=20,
        min_tokens=4,
        temperature=0.8,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias=((7, 1.5), (9, -3.0)),
        bad_words_token_ids=((8,), (5, 6)),
        seed=77,
        eos_token_ids=(1,),
        ignore_eos=True,
        logprobs=3,
    ),
    "scored prompt": SamplingParams(
        max_tokens=20, temperature=0.7, seed=1, logprobs=1, prompt_logprobs=2
    ),
}


@dataclass
class Outcome:
    """All that a client would get."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


def run(
    runner: ModelRunner,
    waves: Sequence[Sequence[EngineRequest]],
    *,
    num_blocks: int = 400,
    step_tokens: int = 256,
    max_num_seqs: int = 40,
    is_threaded: bool = False,
) -> tuple[dict[str, Outcome], int]:
    """(outcome of each request, preemptions). A wave starts when the one before has ended."""
    kv = KVCacheManager(num_blocks, block_size=16, check_invariants=True)
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=max_num_seqs),
        kv=kv,
        max_model_len=256,
        max_num_batched_tokens=step_tokens,
    )
    executor = (ThreadExecutor if is_threaded else InlineExecutor)(runner)
    core = EngineCore(scheduler, executor, VirtualClock(), max_inflight=2 if is_threaded else 1)
    outcomes: dict[str, Outcome] = {}
    preemptions = 0
    for wave in waves:
        for request in wave:
            core.add_request(request)
        while core.has_work:
            turn = core.step()
            assert turn.stats is not None
            preemptions += turn.stats.preemptions
            for news in turn.outputs:
                assert news.error is None, news.error
                outcome = outcomes.setdefault(news.request_id, Outcome())
                outcome.tokens += news.new_token_ids
                outcome.logprobs += news.new_logprobs
                outcome.prompt_logprobs += news.new_prompt_logprobs
    core.close()
    return outcomes, preemptions


def subject(params: SamplingParams) -> EngineRequest:
    return EngineRequest(request_id="subject", prompt_token_ids=PROMPT, params=params)


def crowd(size: int, *, prompt: Sequence[int] | None = None) -> list[EngineRequest]:
    others = random.Random(8)
    kinds = list(PARAMS.values())
    return [
        EngineRequest(
            request_id=f"other-{i}",
            prompt_token_ids=tuple(
                prompt or [others.randrange(2, 300) for _ in range(others.randint(1, 90))]
            ),
            params=kinds[i % len(kinds)],
        )
        for i in range(size)
    ]


@pytest.fixture
def alone(make_runner: Make) -> Callable[[SamplingParams], Outcome]:
    return lambda params: run(make_runner(num_blocks=400), [[subject(params)]])[0]["subject"]


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize(
    "around",
    ["crowd", "small chunks", "one token chunks", "overlapped", "warm cache", "shared prompt"],
)
def test_surroundings_do_not_change_a_bit(
    kind: str, around: str, make_runner: Make, alone: Callable[[SamplingParams], Outcome]
) -> None:
    target = subject(PARAMS[kind])
    options: dict[str, Any] = {}
    waves = [[target]]
    if around == "crowd":
        others = crowd(32)
        waves = [[*others[:16], target, *others[16:]]]
    elif around == "small chunks":
        waves, options = [[*crowd(5), target]], {"step_tokens": 23}
    elif around == "one token chunks":
        options = {"step_tokens": 1}
    elif around == "overlapped":
        waves, options = [[target, *crowd(9)]], {"is_threaded": True, "step_tokens": 61}
    elif around == "warm cache":
        waves = [crowd(1, prompt=PROMPT), [target]]
    elif around == "shared prompt":  # prefix hits within one step
        waves = [[*crowd(3, prompt=PROMPT), target, *crowd(8)[3:]]]
    found, _ = run(make_runner(num_blocks=400), waves, **options)
    want = alone(PARAMS[kind])
    assert found["subject"] == want
    assert len(want.tokens) == 20 and len(want.logprobs) == 20
    if PARAMS[kind].prompt_logprobs is not None:
        assert [score.token_id for score in want.prompt_logprobs] == list(PROMPT[1:])


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("is_threaded", [False, True])
def test_preemption_does_not_change_a_bit(
    kind: str, is_threaded: bool, make_runner: Make, alone: Callable[[SamplingParams], Outcome]
) -> None:
    requests = [subject(PARAMS[kind])] + [
        EngineRequest(
            request_id=f"twin-{i}",
            prompt_token_ids=(*PROMPT[:60], i),
            params=PARAMS[kind],
            cache_salt=str(i),
        )
        for i in range(3)
    ]
    found, preemptions = run(
        make_runner(num_blocks=18), [requests], num_blocks=18, is_threaded=is_threaded
    )
    assert preemptions > 0
    assert found["subject"] == alone(PARAMS[kind])
    for twin in requests[1:]:
        apart, _ = run(make_runner(num_blocks=400), [[twin]])
        assert found[twin.request_id] == apart[twin.request_id]


def test_forks_are_as_their_own_requests(make_runner: Make) -> None:
    def choice(index: int, fork_of: str | None) -> EngineRequest:
        params = SamplingParams(max_tokens=12, seed=index, logprobs=1)
        return EngineRequest(
            request_id=f"choice-{index}", prompt_token_ids=PROMPT, params=params, fork_of=fork_of
        )

    forked, _ = run(
        make_runner(num_blocks=400),
        [[choice(i, "choice-0" if i else None) for i in range(5)]],
        step_tokens=30,
    )
    for index in range(5):
        apart, _ = run(make_runner(num_blocks=400), [[choice(index, None)]])
        assert forked[f"choice-{index}"] == apart[f"choice-{index}"]
    assert len({tuple(outcome.tokens) for outcome in forked.values()}) == 5


def test_the_number_of_threads_does_not_change_a_bit(make_runner: Make) -> None:
    requests = [subject(PARAMS["seeded"]), *crowd(12)]
    before = parallel.num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            parallel.set_num_threads(threads)
            found.append(run(make_runner(num_blocks=400), [requests], step_tokens=90)[0])
    finally:
        parallel.set_num_threads(before)
    assert found[0] == found[1] == found[2]
