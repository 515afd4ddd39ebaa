"""Steps through the GPU's runner and through the CPU's: the same tokens, the same scores."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from octavo.types import (
    BlockCopy,
    ModelOutput,
    NewRequest,
    SamplingParams,
    SchedulerOutput,
    TokenLogprobs,
)
from octavo.worker.gpu.graphs import GraphSizes
from octavo.worker.model_runner import ModelRunner
from tests.worker.gpu.conftest import Engine

SIZES = {"max_num_seqs": 4, "max_num_tokens": 32, "max_model_len": 64, "num_blocks": 8}
PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "seeded": SamplingParams(seed=11),
    "everything": SamplingParams(
        min_tokens=3,
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
        logprobs=3,
        prompt_logprobs=2,
    ),
}


def request(name: str, tokens: Any, blocks: Any, **changed: Any) -> NewRequest:
    given: dict[str, Any] = {
        "token_ids": tuple(tokens),
        "num_prompt_tokens": len(tokens),
        "num_computed_tokens": 0,
        "block_ids": tuple(blocks),
        "params": PARAMS["greedy"],
    }
    return NewRequest(request_id=name, **given | changed)


def steps() -> list[SchedulerOutput]:
    """Chunked prompts, decodes, a new block, a fork, a resumption; one ends, its row goes on."""
    first = request("a", range(10, 18), [3], params=PARAMS["greedy"])
    second = request("b", range(40, 54), [7], params=PARAMS["everything"])
    fork = request("c", range(40, 54), [5], params=PARAMS["seeded"], num_computed_tokens=13)
    return [
        SchedulerOutput(
            step=0, new_requests=(first, second), num_scheduled_tokens={"a": 3, "b": 14}
        ),
        SchedulerOutput(
            step=1,
            new_requests=(fork,),
            num_scheduled_tokens={"b": 1, "c": 1, "a": 5},
            block_copies=(BlockCopy(src=7, dst=5),),
        ),
        SchedulerOutput(step=2, num_scheduled_tokens={"a": 1, "b": 1, "c": 1}),
        SchedulerOutput(
            step=3,
            num_scheduled_tokens={"a": 1, "b": 1},
            new_block_ids={"b": (2,)},
            finished_request_ids=("c",),
        ),
    ]


def run(engine: Engine) -> list[ModelOutput]:
    """Two steps in flight."""
    flights, found = [], []
    for step in steps():
        flights.append(engine.runner.launch(step))
        if len(flights) == 2:
            found.append(engine.runner.finish(flights.pop(0)))
    return found + [engine.runner.finish(flight) for flight in flights]


def check_close(found: ModelOutput, want: ModelOutput) -> None:
    assert found.sampled_token_ids == want.sampled_token_ids
    assert list(found.sampled_token_ids) == list(want.sampled_token_ids)
    assert found.errors == want.errors
    for mine, theirs in (
        (found.logprobs, want.logprobs),
        (found.prompt_logprobs, want.prompt_logprobs),
    ):
        assert mine.keys() == theirs.keys()
        for request_id in mine:
            for a, b in zip(mine[request_id], theirs[request_id], strict=True):
                check_score(a, b)


def check_score(a: TokenLogprobs, b: TokenLogprobs) -> None:
    assert (a.token_id, a.rank) == (b.token_id, b.rank)
    assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert [token for token, _ in a.top] == [token for token, _ in b.top]
    assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=1e-4)


def test_steps_yield_what_they_yield_on_the_cpu(
    make_engine: Callable[..., Engine],
    make_runner: Callable[..., ModelRunner],
) -> None:
    """Every step is launched before the one before it is finished; decodes are graphs."""
    graphs = GraphSizes(decode=(4,), sampling=(2,))
    engine = make_engine(graph_sizes=graphs, **SIZES)
    while engine.runner.capture_one():
        pass
    cpu = make_runner(num_blocks=8, max_num_seqs=4)
    found = run(engine)
    for output, step in zip(found, steps(), strict=True):
        assert output.step == step.step
        check_close(output, cpu.execute(step))
    replayed = sum(output.worker.graph_steps for output in found if output.worker)
    assert replayed == 2


@pytest.mark.gpu
def test_graphs_are_the_same_bits_as_kernel_by_kernel(make_engine: Callable[..., Engine]) -> None:
    graphs = GraphSizes(decode=(2, 4), mixed=(8, 32), sampling=(1, 2, 4))
    captured, eager = make_engine(graph_sizes=graphs, **SIZES), make_engine(**SIZES)
    run(captured)  # whatever is made at first use is made
    captured.runner.finish(
        captured.runner.launch(SchedulerOutput(step=9, finished_request_ids=("a", "b", "c")))
    )
    while captured.runner.capture_one():
        pass
    for mine, other in zip(run(captured), run(eager), strict=True):
        assert replace(mine, worker=None) == replace(other, worker=None)


@pytest.mark.gpu
def test_launching_a_step_never_waits_for_the_device(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(**SIZES)
    run(engine)
    again = make_engine(**SIZES)
    # As at a server's start: the first copy tells the device where these caches lie, and waits.
    copy = SchedulerOutput(step=9, block_copies=(BlockCopy(src=0, dst=0),))
    again.runner.finish(again.runner.launch(copy))
    with warnings.catch_warnings():  # that the mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        flights = [again.runner.launch(step) for step in steps()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for flight in flights:
        again.runner.finish(flight)
