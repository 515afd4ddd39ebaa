"""Several front ends of one engine: each hears of its own requests, and all of what is nobody's."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq

from octavo.engine import ipc
from octavo.engine.owners import Owners
from octavo.types import (
    EngineOutput,
    EngineOutputs,
    EngineRequest,
    FinishReason,
    SamplingParams,
    StepStats,
)


def request(name: str) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_token_ids=(1,), params=SamplingParams())


def output(name: str, reason: FinishReason | None = None) -> EngineOutput:
    return EngineOutput(request_id=name, new_token_ids=(7,), finish_reason=reason)


def test_shares() -> None:
    owners, stats = Owners(), StepStats(num_running=3)
    owners.add([request("a"), request("b")], owner=0)
    owners.add([request("c")], owner=1)
    news = (output("c"), output("a", FinishReason.STOP), output("b"), output("unknown"))
    shares = owners.shares(EngineOutputs(outputs=news, stats=stats), owners=(0, 1))
    assert shares == {
        0: EngineOutputs(outputs=(news[1], news[2]), stats=stats),
        1: EngineOutputs(outputs=(news[0],), stats=stats),
    }
    assert owners.of(0) == ("b",)
    # Who has gone is told nothing; its requests still end.
    last = EngineOutputs(outputs=(output("c", FinishReason.ABORT),))
    assert owners.shares(last, owners=(0,)) == {0: EngineOutputs()}
    assert owners.of(1) == ()


def test_an_engine_with_two_front_ends(tmp_path: Path) -> None:
    addresses = [f"ipc://{tmp_path}/{number}" for number in range(2)]
    context = zmq.Context()
    fronts = [ipc.open_socket(context, address, bind=True) for address in addresses]
    for front in fronts:
        front.set(zmq.RCVTIMEO, 10_000)
    end = ipc.EngineEnd(addresses)
    try:
        assert end.receive(wait=False) == []
        added = [ipc.AddRequests((request("a"),)), ipc.AddRequests((request("b"),))]
        for front, message in zip(fronts, added, strict=True):
            front.send(ipc.encode(message))
            assert end.receive(wait=True) == [message]
        end.send(ipc.Step(EngineOutputs(outputs=(output("b"), output("a")))))
        heard = [ipc.decode_to_front_end(front.recv()) for front in fronts]
        assert heard == [ipc.Step(EngineOutputs(outputs=(output(name),))) for name in "ab"]
        fronts[0].send(ipc.encode(ipc.FrontEndGone(1)))
        assert end.receive(wait=True) == [ipc.AbortRequests(("b",))]
        end.send(ipc.Step(EngineOutputs(outputs=(output("b", FinishReason.ABORT),))))
        end.send(ipc.Dead("over"))
        last = [ipc.decode_to_front_end(fronts[0].recv()) for _ in range(2)]
        assert last == [ipc.Step(EngineOutputs()), ipc.Dead("over")]
        with pytest.raises(zmq.Again):
            fronts[1].recv(zmq.NOBLOCK)
    finally:
        end.close()
        for front in fronts:
            front.close()
        context.term()
