"""The process border: what goes in comes out, type by type, and nothing else passes."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.engine import ipc
from octavo.types import (
    EngineInfo,
    EngineOutput,
    EngineOutputs,
    EngineRequest,
    FinishReason,
    RequestTimes,
    SamplingParams,
    StepStats,
    TokenLogprobs,
)

REALS = st.floats(allow_nan=False)
IDS = st.integers(0, 2**31 - 1)
TOKENS = st.lists(IDS, max_size=5).map(tuple)
TEXT = st.text(max_size=8)


def frozen(kind: type, **fields: st.SearchStrategy) -> st.SearchStrategy:
    return st.builds(kind, **fields)


PARAMS = frozen(
    SamplingParams,
    max_tokens=IDS,
    temperature=REALS,
    logit_bias=st.lists(st.tuples(IDS, REALS), max_size=3).map(tuple),
    allowed_token_ids=st.none() | TOKENS,
    bad_words_token_ids=st.lists(TOKENS, max_size=2).map(tuple),
    seed=st.integers(0, 2**64 - 1),
    ignore_eos=st.booleans(),
    logprobs=st.none() | IDS,
)
REQUESTS = frozen(
    EngineRequest,
    request_id=TEXT,
    prompt_token_ids=TOKENS,
    params=PARAMS,
    arrival_time=REALS,
    priority=st.integers(-5, 5),
    cache_salt=st.none() | TEXT,
    fork_of=st.none() | TEXT,
)
LOGPROBS = frozen(
    TokenLogprobs,
    token_id=IDS,
    logprob=st.floats(max_value=0, allow_nan=False),
    rank=IDS,
    top=st.lists(st.tuples(IDS, REALS), max_size=3).map(tuple),
)
OUTPUTS = frozen(
    EngineOutput,
    request_id=TEXT,
    new_token_ids=TOKENS,
    new_logprobs=st.lists(LOGPROBS, max_size=2).map(tuple),
    new_prompt_logprobs=st.lists(LOGPROBS, max_size=2).map(tuple),
    num_cached_tokens=IDS,
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_reason=st.none() | IDS,
    error=st.none() | TEXT,
    is_bad_request=st.booleans(),
    times=st.none() | frozen(RequestTimes, arrival=REALS, queued=REALS, finished=REALS),
    drafts=st.none() | st.tuples(IDS, IDS),
)
STEPS = frozen(
    EngineOutputs,
    outputs=st.lists(OUTPUTS, max_size=3).map(tuple),
    stats=st.none() | frozen(StepStats, time=REALS, num_running=IDS, host_seconds=REALS),
)


@given(st.lists(REQUESTS, max_size=3).map(tuple), st.lists(TEXT, max_size=3).map(tuple))
def test_to_engine_round_trip(
    requests: tuple[EngineRequest, ...], request_ids: tuple[str, ...]
) -> None:
    for message in (ipc.AddRequests(requests), ipc.AbortRequests(request_ids)):
        assert ipc.decode_to_engine(ipc.encode(message)) == message


@given(STEPS)
def test_steps_round_trip(outputs: EngineOutputs) -> None:
    decoded = ipc.decode_to_front_end(ipc.encode(ipc.Step(outputs)))
    assert decoded == ipc.Step(outputs)
    assert isinstance(decoded, ipc.Step)
    for output in decoded.outputs.outputs:
        assert isinstance(output, EngineOutput)
        assert output.finish_reason is None or isinstance(output.finish_reason, FinishReason)


def test_other_messages_round_trip() -> None:
    info = EngineInfo(
        model="m",
        architecture="a",
        device="cpu",
        dtype="float32",
        kv_cache_dtype="float32",
        vocab_size=10,
        max_model_len=20,
        block_size=16,
        num_blocks=3,
        max_num_seqs=4,
        max_num_batched_tokens=5,
        eos_token_ids=(1, 2),
        phases={"load": 1.5},
    )
    for message in (
        ipc.Ready(info),
        ipc.Failed(message="no", is_user_error=True),
        ipc.Dead("gone"),
    ):
        assert ipc.decode_to_front_end(ipc.encode(message)) == message


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        ipc.decode_to_engine(ipc.encode(ipc.Dead("the other direction")))
    wrong = msgspec.msgpack.encode({"type": "add", "requests": [{"request_id": 5}]})
    with pytest.raises(msgspec.ValidationError):
        ipc.decode_to_engine(wrong)
