"""How the engine process ends when its engine cannot go on."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from octavo.config import EngineConfig
from octavo.engine import build, ipc, process
from octavo.engine.launch import EngineArguments
from octavo.types import DeviceLostError


def test_a_lost_device_ends_the_process_and_names_its_requests(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def step() -> None:
        raise DeviceLostError("the GPU failed (illegal access); requests in flight: cmpl-1, cmpl-2")

    core = SimpleNamespace(has_work=True, step=step)
    monkeypatch.setattr(build, "build_engine", lambda config, **_: (core, None))
    sent: list[Any] = []
    end: Any = SimpleNamespace(send=sent.append, receive=lambda wait: [])
    arguments = EngineArguments(config=EngineConfig(), addresses=())
    with caplog.at_level(logging.CRITICAL):
        code = process._run(arguments, end)
    assert code == 1
    assert "cmpl-1, cmpl-2" in caplog.text
    assert isinstance(sent[-1], ipc.Dead)
    assert "cmpl-1, cmpl-2" in sent[-1].reason
