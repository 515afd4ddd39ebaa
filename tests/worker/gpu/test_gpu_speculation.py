"""Drafts on the GPU's engine: what a request gets is what it gets without them, in fewer steps.

As in test_gpu_engine, but the model draws from few tokens, so that some drafts are accepted and
others are not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from octavo.models import Model
from octavo.sampling.sampler import NON_FINITE_MESSAGE
from octavo.types import EngineRequest, FinishReason, SamplingParams, SchedulerOutput
from octavo.worker.gpu import draft_planner
from octavo.worker.gpu.draft_planner import FixedPlanner
from octavo.worker.gpu.graphs import GraphSizes
from tests.worker.gpu.conftest import DEVICE, Engine, make_runtime
from tests.worker.gpu.driver import PARAMS as ALL_PARAMS
from tests.worker.gpu.driver import PROMPT, Driver, Outcome, crowd, subject
from tests.worker.gpu.toy_model import POISONS, RAISES, ToyModel

pytestmark = pytest.mark.usefixtures("quick_sampling")

NUM_TOKENS = 10
FEW = range(20, 24)  # tokens that are drawn
PARAMS = {
    kind: replace(params, max_tokens=NUM_TOKENS, bad_words_token_ids=((22,), (20, 21)))
    if kind == "everything"
    else replace(params, max_tokens=NUM_TOKENS)
    for kind, params in ALL_PARAMS.items()
}
PLAIN = {
    "greedy": PARAMS["greedy"],
    "seeded": SamplingParams(max_tokens=NUM_TOKENS, seed=2**63 + 5, temperature=0.4),
}


class NarrowModel(ToyModel):
    """Draws from a few tokens."""

    def compute_logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        logits = super().compute_logits(hidden, out=out)
        logits[:, : FEW.start] -= 100.0
        logits[:, FEW.stop :] -= 100.0
        return logits


Make = Callable[..., Driver]
Without = Callable[..., dict[str, Outcome]]


@pytest.fixture
def make_driver(make_engine: Callable[..., Engine], gpu_model: Model) -> Make:
    """(max_drafts, max_inflight, can_find, sizes...) -> driver"""

    def make(
        *, max_drafts: int = 3, max_inflight: int = 2, can_find: bool = True, **sizes: Any
    ) -> Driver:
        toy: Any = NarrowModel(gpu_model.spec, device=DEVICE)
        runtime = make_runtime(can_capture=False)
        changed = {"max_model_len": 128, "max_drafts": max_drafts} | sizes
        if max_drafts and "planner" not in changed:
            changed["planner"] = FixedPlanner(max_drafts, max_samples=32)
        engine = make_engine(using=toy, runtime=runtime, **changed)
        return Driver(engine, max_inflight=max_inflight, can_find=can_find)

    return make


@pytest.fixture(scope="module")
def known() -> dict[EngineRequest, Outcome]:
    """Outcomes of requests without drafts."""
    return {}


@pytest.fixture
def without(make_driver: Make, known: dict[EngineRequest, Outcome]) -> Without:
    """What requests get without drafts, one step in flight, and none forked or found."""

    def found(*requests: EngineRequest) -> dict[str, Outcome]:
        asked = [replace(request, fork_of=None, cache_salt=None) for request in requests]
        new = [request for request in asked if request not in known]
        outcomes = make_driver(max_drafts=0, max_inflight=1, can_find=False).run(new)
        known.update({request: outcomes[request.request_id] for request in new})
        return {request.request_id: known[request] for request in asked}

    return found


def subjects(params: Mapping[str, SamplingParams] = PARAMS, **more: Any) -> list[EngineRequest]:
    return [subject(given, name=kind, **more) for kind, given in params.items()]


def few_tokens(size: int, *, seed: int = 1) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.choice(FEW) for _ in range(size))


SURROUNDINGS: dict[str, dict[str, Any]] = {
    "one draft": {"max_drafts": 1},
    "one step in flight": {"max_inflight": 1},
    "three steps in flight": {"max_inflight": 3},
    "small chunks": {"max_num_tokens": 13},
    "few samples": {"planner": FixedPlanner(3, max_samples=10)},
    "graphs": {
        "graph_sizes": GraphSizes(
            decode=(4, 8), mixed=(16, 64), sampling=(4, 8, 16), max_drafts=3, drafting=(4, 8, 16)
        )
    },
}


@pytest.mark.parametrize("around", SURROUNDINGS)
def test_drafts_change_no_token(around: str, make_driver: Make, without: Without) -> None:
    """Greedy, seeded and with every parameter there is, log-probabilities too, while prompts of
    others are read in chunks."""
    driver, others = make_driver(**SURROUNDINGS[around]), crowd(2)
    if around == "graphs":
        driver.run([subject(PLAIN["greedy"], name="first")])  # graphs of drafts are asked for
        while driver.engine.runner.capture_one():
            pass
    found = driver.run([*others[:1], *subjects(), *others[1:]])
    want = without(*subjects(), *others)
    for name in want:
        assert found[name] == want[name], name
    assert 0 < driver.num_accepted < driver.num_drafts
    assert 0 < driver.num_told_accepted <= driver.num_accepted
    assert driver.num_told_accepted < driver.num_told <= driver.num_drafts
    assert (driver.num_replayed > 0) == (around == "graphs")
    driver.check_that_nothing_leaked()


def test_accepted_drafts_save_steps(make_driver: Make) -> None:
    steps = []
    for max_drafts in (0, 1, 3):
        driver = make_driver(max_drafts=max_drafts)
        long = replace(PLAIN["greedy"], max_tokens=30)
        driver.run([subject(long, prompt=few_tokens(20))])
        steps.append(driver.num_steps)
        # A step without work tells what the last one did; two more were in flight.
        assert driver.num_steps + driver.num_accepted >= 30
    assert steps[2] < steps[1] < steps[0]


def test_runs_end_where_requests_do(make_driver: Make, without: Without) -> None:
    """By a stop token inside a run, by max_tokens, by the context's end."""
    prompt = few_tokens(30)
    (plain,) = without(subject(replace(PLAIN["greedy"], max_tokens=60), prompt=prompt)).values()
    for size in (1, 2, 4, 7):
        driver = make_driver(max_model_len=48)
        stop = plain.tokens[size]
        stops = replace(PLAIN["greedy"], max_tokens=60, stop_token_ids=(stop,), min_tokens=size)
        found = driver.run(
            [
                subject(stops, name="stops", prompt=prompt),
                subject(replace(PLAIN["greedy"], max_tokens=size), name="length", prompt=prompt),
                subject(replace(PLAIN["greedy"], max_tokens=60), name="context", prompt=prompt),
            ]
        )
        assert found["stops"].finish is FinishReason.STOP
        assert found["stops"].tokens[-1] == stop and len(found["stops"].tokens) > size
        assert found["length"].tokens == plain.tokens[:size]
        assert found["context"].tokens == plain.tokens[: 48 - len(prompt)]
        assert found["length"].finish is found["context"].finish is FinishReason.LENGTH
        assert driver.num_accepted > 0
        driver.check_that_nothing_leaked()


def test_preemption_takes_drafts_in_flight_back(make_driver: Make, without: Without) -> None:
    driver = make_driver(num_blocks=11, max_drafts=3)
    requests = [
        subject(
            replace(PARAMS[kind], max_tokens=24), name=f"{kind}-{i}", prompt=few_tokens(30, seed=i)
        )
        for i, kind in enumerate(("greedy", "seeded", "everything", "greedy", "seeded"))
    ]
    found = driver.run(requests)
    assert driver.num_preemptions > 0 and 0 < driver.num_accepted < driver.num_drafts
    assert found == without(*requests)
    driver.check_that_nothing_leaked()


def test_forks_and_prefix_hits_are_drafted_for(make_driver: Make, without: Without) -> None:
    prompt = few_tokens(39)

    def choice(index: int, name: str, **more: Any) -> EngineRequest:
        params = SamplingParams(max_tokens=12, seed=index, temperature=0.7, logprobs=1)
        return subject(params, name=name, prompt=prompt, **more)

    driver = make_driver(max_num_tokens=30)
    forks = [choice(i, f"fork-{i}", fork_of="fork-0" if i else None) for i in range(3)]
    later = [choice(i, f"later-{i}") for i in range(2)]
    found = driver.run(forks, later)
    assert driver.num_hits > 0 and 0 < driver.num_accepted < driver.num_drafts
    assert found == without(*forks, *later)
    driver.check_that_nothing_leaked()


def test_requests_that_end_early_take_their_drafts_with_them(
    make_driver: Make, without: Without
) -> None:
    """Aborted with drafts in flight; their rows go on to others at once."""
    driver = make_driver(max_num_seqs=4, max_inflight=3)
    long = replace(PLAIN["greedy"], max_tokens=60)
    gone = [subject(long, name=f"gone-{i}", prompt=few_tokens(20, seed=i)) for i in range(4)]
    driver.add(*gone, *subjects())
    for _ in range(6):
        driver.step()
    driver.core.abort([request.request_id for request in gone])
    found = driver.run([])
    want = without(*subjects())
    for kind in PARAMS:
        assert found[kind] == want[kind], kind
    assert all(found[request.request_id].finish is FinishReason.ABORT for request in gone)
    driver.check_that_nothing_leaked()


def test_failures_stay_with_their_request(
    make_driver: Make, without: Without, caplog: pytest.LogCaptureFixture
) -> None:
    """NaN beside drafts, nothing left to draw, then a step that cannot be launched."""
    driver = make_driver()
    forbidden = replace(
        PARAMS["greedy"], allowed_token_ids=(21,), bad_words_token_ids=((21, 21, 21),)
    )
    bad = [
        subject(PARAMS["greedy"], name="nan", prompt=(*PROMPT[:9], POISONS, 25)),
        subject(forbidden, name="nothing left", prompt=(21, 20, 21, 20, 21, 21)),
    ]
    found = driver.run([*bad, *subjects()])
    want = without(*bad, *subjects())
    assert found["nan"].error == want["nan"].error == NON_FINITE_MESSAGE
    assert "forbid every token" in str(found["nothing left"].error)
    assert found["nothing left"].tokens == want["nothing left"].tokens == [21, 21]
    for kind in PARAMS:
        assert found[kind] == want[kind], kind
    driver.run([subject(PARAMS["greedy"], name="raises", prompt=(50, RAISES, 51))])
    assert "a kernel met a bad token" in caplog.text
    driver.run([subject(PARAMS["seeded"], name="after")])
    assert driver.outcomes["after"] == want["seeded"]
    driver.check_that_nothing_leaked()


class Recorder:
    """A planner that drafts as many tokens as it is told to, and keeps what steps yielded."""

    def __init__(self, counts: Iterator[int], *, num_wanted: int) -> None:
        self.num_wanted = num_wanted
        self.outcomes: list[draft_planner.Outcome] = []
        self._counts = counts

    def choose(self, step: SchedulerOutput) -> Mapping[str, int]:
        drafts = {name: min(room, next(self._counts)) for name, room in step.max_drafts.items()}
        return {name: count for name, count in drafts.items() if count}

    def learn(self, outcome: draft_planner.Outcome) -> None:
        self.outcomes.append(outcome)

    def add_stats(self, stats: Any) -> Any:
        return stats


def test_each_request_has_its_own_number_of_drafts(make_driver: Make, without: Without) -> None:
    rng = random.Random(3)
    planner = Recorder(iter(lambda: rng.randint(0, 5), -1), num_wanted=5)
    driver = make_driver(max_drafts=5, planner=planner, max_inflight=3)
    requests = [
        subject(params, name=f"{kind}-{i}", prompt=few_tokens(9, seed=i))
        for i, (kind, params) in enumerate([*PARAMS.items(), *PLAIN.items()])
    ]
    found = driver.run(requests)
    assert found == without(*requests)
    drafts = [pair for outcome in planner.outcomes for pair in outcome.drafts.values()]
    assert {number for number, _ in drafts} >= {1, 2, 3, 4}
    assert all(found in (0, number) for number, found in drafts)
    assert {found > 0 for _, found in drafts} == {False, True}
    for outcome in planner.outcomes:
        for name, (number, _) in outcome.drafts.items():
            assert 1 <= len(outcome.tokens[name]) <= 1 + number
    plain = [outcome for outcome in planner.outcomes if outcome.is_plain]
    assert any(outcome.num_tokens > outcome.num_requests for outcome in plain)
    assert len(plain) < len(planner.outcomes)
    assert all(outcome.seconds > 0 for outcome in planner.outcomes)
    driver.check_that_nothing_leaked()
