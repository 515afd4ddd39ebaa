"""Scheduler, cache and GPU runner together: what a request gets, whatever happens around it.

The model is a toy whose every bit depends on the request's own tokens and on where they lie; the
K/V cache starts as NaN. Tokens are drawn and scored by the CPU's ops, which give the same for the
same logits and need no interpreter. All else is what serves: uploads, the table, step inputs,
parameters, what is appended on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from octavo.engine.core import STEP_FAILED
from octavo.models import Model
from octavo.sampling.sampler import NON_FINITE_MESSAGE
from octavo.types import EngineRequest, FinishReason, SamplingParams
from octavo.worker.gpu.graphs import GraphSizes
from tests.worker.gpu.conftest import DEVICE, Engine, make_runtime
from tests.worker.gpu.driver import NUM_TOKENS, PARAMS, PROMPT, Driver, Outcome, crowd, subject
from tests.worker.gpu.toy_model import POISONS, RAISES, ToyModel

pytestmark = pytest.mark.usefixtures("quick_sampling")

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
