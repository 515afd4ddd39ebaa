"""Scheduler, cache and GPU runner together: what a request gets, whatever happens around it.

The model is a toy whose every bit depends on the request's own tokens and on where they lie; the
K/V cache starts as NaN. Tokens are drawn and scored by the CPU's ops, which give the same for the
same logits and need no interpreter. All else is what serves: uploads, the table, step inputs,
parameters, what is appended on the device.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from torch import Tensor

from octavo.clock import VirtualClock
from octavo.config import SchedulerConfig
from octavo.engine.core import STEP_FAILED, EngineCore
from octavo.kvcache.manager import KVCacheManager
from octavo.models import Model
from octavo.sampling.sampler import NON_FINITE_MESSAGE
from octavo.scheduler.scheduler import Scheduler
from octavo.types import EngineRequest, FinishReason, SamplingParams, TokenLogprobs
from octavo.worker.gpu import sampler, scores
from octavo.worker.gpu.executor import GpuExecutor
from octavo.worker.gpu.graphs import GraphSizes
from octavo_kernels import sampling
from octavo_kernels.sampling import TopLogprobs
from tests.worker.gpu.conftest import DEVICE, Engine, make_runtime
from tests.worker.gpu.toy_model import POISONS, RAISES, ToyModel

rng = random.Random(4)
PROMPT = tuple(rng.randrange(20, 97) for _ in range(39))
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
        )
        self.core = EngineCore(
            scheduler, GpuExecutor(engine.runner), VirtualClock(), max_inflight=max_inflight
        )
        self.outcomes: dict[str, Outcome] = {}
        self.num_preemptions = self.num_hits = self.num_replayed = 0

    def add(self, *requests: EngineRequest) -> None:
        for request in requests:
            self.core.add_request(request)

    def step(self) -> None:
        turn = self.core.step()
        assert turn.stats is not None
        self.num_replayed += turn.stats.worker.graph_steps if turn.stats.worker else 0
        self.num_preemptions += turn.stats.preemptions
        self.num_hits += turn.stats.prefix_cache_hits
        for news in turn.outputs:
            outcome = self.outcomes.setdefault(news.request_id, Outcome())
            outcome.tokens += news.new_token_ids
            outcome.logprobs += news.new_logprobs
            outcome.prompt_logprobs += news.new_prompt_logprobs
            outcome.finish, outcome.error = news.finish_reason, news.error

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


@pytest.fixture(autouse=True)
def quick_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(
        logits: Tensor, *, workspace: Any, out: tuple[Tensor, Tensor], **columns: Any
    ) -> Any:
        on_cpu = {name: column.cpu() for name, column in columns.items()}
        for mine, found in zip(out, sampling.sample(logits.cpu(), **on_cpu), strict=True):
            mine.copy_(found)
        return out

    def topn_logprobs(logits: Tensor, *, chosen: Tensor, num_best: int) -> TopLogprobs:
        tokens = chosen.cpu().clamp(min=0)
        found = sampling.topn_logprobs(logits.cpu(), chosen=tokens, num_best=num_best)
        return TopLogprobs(**{n: getattr(found, n).to(DEVICE) for n in TopLogprobs.__slots__})

    monkeypatch.setattr(sampler, "sample", sample)
    monkeypatch.setattr(scores, "topn_logprobs", topn_logprobs)


Make = Callable[..., Driver]


@pytest.fixture
def make_driver(make_engine: Callable[..., Engine], gpu_model: Model) -> Make:
    def make(*, max_inflight: int = 2, can_find: bool = True, **sizes: Any) -> Driver:
        toy: Any = ToyModel(gpu_model.spec, device=DEVICE)
        runtime = make_runtime(can_capture=False)
        engine = make_engine(using=toy, runtime=runtime, **{"max_model_len": 128} | sizes)
        return Driver(engine, max_inflight=max_inflight, can_find=can_find)

    return make


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcome]:
    """Outcomes of the subject with nobody else, one step in flight; made when first asked for."""
    return {}


@pytest.fixture
def expect(make_driver: Make, alone: dict[str, Outcome]) -> Callable[[str], Outcome]:
    def found(kind: str) -> Outcome:
        if kind not in alone:
            driver = make_driver(max_inflight=1)
            alone[kind] = driver.run([subject(PARAMS[kind])])["subject"]
            assert len(alone[kind].tokens) == NUM_TOKENS
            assert alone[kind].error is None
        return alone[kind]

    return found


SURROUNDINGS: dict[str, dict[str, Any]] = {
    "crowd": {},
    "small chunks": {"max_num_tokens": 13},
    "warm cache": {},
    "shared prompt": {"max_inflight": 3},
    "large blocks": {"block_size": 64, "num_blocks": 16},
    "little room in an upload": {"num_words": 560},
    "graphs": {"graph_sizes": GraphSizes(decode=(4, 8), mixed=(16, 64), sampling=(4, 8))},
}


@pytest.mark.parametrize("around", SURROUNDINGS)
def test_surroundings_do_not_change_a_bit(
    around: str, make_driver: Make, expect: Callable[[str], Outcome]
) -> None:
    driver = make_driver(**SURROUNDINGS[around])
    while driver.engine.runner.capture_one():
        pass
    subjects = [subject(params, name=kind) for kind, params in PARAMS.items()]
    waves: list[list[EngineRequest]] = [[*crowd(2), *subjects, *crowd(3)[2:]]]
    if around == "warm cache":
        waves = [crowd(1, prompt=PROMPT), subjects]
    elif around == "shared prompt":  # prefix hits within one step
        waves = [[*crowd(2, prompt=PROMPT), *subjects]]
    found = driver.run(*waves)
    for kind in PARAMS:
        assert found[kind] == expect(kind), kind
    if around in ("warm cache", "shared prompt"):
        assert driver.num_hits > 0
    assert (driver.num_replayed > 0) == (around == "graphs")
    driver.check_that_nothing_leaked()


def test_graphs_draw_plain_requests(make_driver: Make, expect: Callable[[str], Outcome]) -> None:
    """Two of them and padding: an unused place must not append to anyone's tokens."""
    driver = make_driver(graph_sizes=GraphSizes(decode=(4,), sampling=(4,)))
    while driver.engine.runner.capture_one():
        pass
    seeded = replace(PARAMS["seeded"], logprobs=None)
    found = driver.run([subject(PARAMS["greedy"], name="greedy"), subject(seeded, name="seeded")])
    assert driver.num_replayed > 0
    for kind in found:
        assert found[kind].tokens == expect(kind).tokens
    driver.check_that_nothing_leaked()


def test_preemption_does_not_change_a_bit(
    make_driver: Make, expect: Callable[[str], Outcome]
) -> None:
    """Five requests of up to 48 tokens, four of which fit into the cache."""
    driver = make_driver(num_blocks=11)
    twins = [
        subject(PARAMS["seeded"], name=f"twin-{i}", prompt=(*PROMPT[:30], 20 + i)) for i in range(2)
    ]
    subjects = [subject(params, name=kind, cache_salt=kind) for kind, params in PARAMS.items()]
    found = driver.run([*subjects, *twins])
    assert driver.num_preemptions > 0
    for kind in PARAMS:
        assert found[kind] == expect(kind), kind
    driver.check_that_nothing_leaked()


def test_forks_are_as_their_own_requests(make_driver: Make) -> None:
    """The prompt ends inside a block, which each fork gets a copy of."""

    def choice(index: int, fork_of: str | None) -> EngineRequest:
        params = SamplingParams(max_tokens=6, seed=index, logprobs=1)
        return subject(params, name=f"choice-{index}", fork_of=fork_of)

    driver = make_driver(max_num_tokens=30)
    found = driver.run([choice(i, "choice-0" if i else None) for i in range(3)])
    assert len({tuple(outcome.tokens) for outcome in found.values()}) == 3
    apart = make_driver(can_find=False)
    for index in range(3):
        alone = apart.run([choice(index, None)])[f"choice-{index}"]
        assert found[f"choice-{index}"] == alone
    driver.check_that_nothing_leaked()


def test_requests_that_end_early_leave_nothing_behind(
    make_driver: Make, expect: Callable[[str], Outcome]
) -> None:
    """Aborted before, in and between steps, and stopped by a token while the next step runs."""
    driver = make_driver(max_num_tokens=20)
    stop = expect("greedy").tokens[3]
    stopping = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, stop_token_ids=(stop,))
    names = [f"gone-{i}" for i in range(4)]
    driver.add(*(subject(PARAMS["everything"], name=name) for name in names[:3]))
    driver.core.abort(["gone-0"])
    driver.add(subject(stopping, name="stops"), *(subject(p, name=k) for k, p in PARAMS.items()))
    driver.step()
    driver.core.abort(["gone-1"])
    driver.add(subject(PARAMS["seeded"], name=names[3]))
    for _ in range(4):
        driver.step()
    driver.core.abort(names)
    found = driver.run([])
    assert all(found[name].finish is FinishReason.ABORT for name in names)
    assert found["stops"].finish is FinishReason.STOP
    assert found["stops"].tokens == expect("greedy").tokens[:4]
    for kind in PARAMS:
        assert found[kind] == expect(kind), kind
    driver.check_that_nothing_leaked()


def test_more_requests_than_rows_take_turns(
    make_driver: Make, expect: Callable[[str], Outcome]
) -> None:
    driver = make_driver(max_num_seqs=1)
    found = driver.run([subject(PARAMS[kind], name=kind) for kind in ("seeded", "greedy")])
    for kind in ("seeded", "greedy"):
        assert found[kind] == expect(kind), kind
    driver.check_that_nothing_leaked()


def test_nan_fails_its_request_alone(make_driver: Make, expect: Callable[[str], Outcome]) -> None:
    """One poisoned in its prompt, one in a prompt that is scored, one with nothing to draw; each
    has a step in flight when that is found."""
    driver = make_driver()
    forbidden = SamplingParams(
        max_tokens=NUM_TOKENS, allowed_token_ids=(30,), bad_words_token_ids=((30,),), logprobs=1
    )
    scored = SamplingParams(max_tokens=NUM_TOKENS, prompt_logprobs=1)
    bad = [
        subject(PARAMS["greedy"], name="nan", prompt=(*PROMPT[:9], POISONS, 25)),
        subject(scored, name="nan scored", prompt=(*PROMPT[:20], POISONS)),
        subject(forbidden, name="nothing left"),
    ]
    good = [subject(params, name=kind, prompt=PROMPT) for kind, params in PARAMS.items()]
    found = driver.run([*bad[:1], *good, *bad[1:]], bad)
    for name in ("nan", "nan scored"):
        assert found[name].error == NON_FINITE_MESSAGE
    assert "forbid every token" in str(found["nothing left"].error)
    for request in bad:
        assert found[request.request_id].tokens == []
        assert found[request.request_id].finish is FinishReason.ERROR
    for kind in PARAMS:
        assert found[kind] == expect(kind), kind
    driver.check_that_nothing_leaked()


def test_a_step_that_cannot_be_launched_ends_its_requests_and_no_others(
    make_driver: Make, expect: Callable[[str], Outcome], caplog: pytest.LogCaptureFixture
) -> None:
    """Its diffs are applied all the same: rows are freed and given on, blocks come and go."""
    driver = make_driver(max_num_seqs=3)
    driver.add(subject(PARAMS["greedy"], name="first"))
    driver.step()
    driver.add(subject(PARAMS["greedy"], name="raises", prompt=(50, RAISES, 51)))
    waiting = [subject(params, name=kind) for kind, params in PARAMS.items()]
    found = driver.run(waiting)
    assert "a kernel met a bad token" in caplog.text
    assert found["raises"].error == found["first"].error == STEP_FAILED
    assert found["first"].tokens == expect("greedy").tokens[: len(found["first"].tokens)]
    for kind in PARAMS:
        if found[kind].error is None:
            assert found[kind] == expect(kind), kind
    driver.check_that_nothing_leaked()


def test_parameters_that_cannot_be_applied_fail_their_request_alone(
    make_driver: Make, expect: Callable[[str], Outcome]
) -> None:
    driver = make_driver()
    broken: Any = SamplingParams(max_tokens=NUM_TOKENS, temperature="hot")  # type: ignore[arg-type]
    subjects = [subject(params, name=kind) for kind, params in PARAMS.items()]
    found = driver.run([subject(broken, name="broken"), *subjects])
    assert "sampling parameters cannot be applied" in str(found["broken"].error)
    for kind in PARAMS:
        assert found[kind] == expect(kind), kind
    driver.check_that_nothing_leaked()
