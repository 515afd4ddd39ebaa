"""The engine process with a made-up model, through its asyncio front."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.engine.async_engine import AsyncEngine, EngineStartError
from octavo.engine.fake import fake_output
from octavo.engine.launch import EngineProcess
from octavo.engine.protocols import EngineDeadError
from octavo.types import EngineOutput, EngineOutputs, EngineRequest, FinishReason, SamplingParams

CONFIG = EngineConfig(cache=CacheConfig(check_kv_invariants=True, num_gpu_blocks_override=400))
DEADLINE = 30.0


def request(name: str, *, prompt: int = 20, max_tokens: int = 10, seed: int = 0) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True)
    return EngineRequest(request_id=name, prompt_token_ids=tuple(range(prompt)), params=params)


def with_engine(
    test: Callable[[AsyncEngine, EngineProcess], Awaitable[None]],
    *,
    config: EngineConfig = CONFIG,
    stall_seconds: float = 60.0,
) -> None:
    async def run() -> None:
        process = EngineProcess(config, fake_executor=True, log_level="critical")
        engine = AsyncEngine(process, address=process.addresses[0], stall_seconds=stall_seconds)
        try:
            await engine.start()
            await asyncio.wait_for(test(engine, process), DEADLINE)
        finally:
            await engine.close()
        assert process.exit_code is not None

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def collect(engine: AsyncEngine, asked: EngineRequest) -> list[EngineOutput]:
    return [output async for output in engine.generate(asked)]


def test_many_at_once_each_get_their_own_tokens() -> None:
    async def test(engine: AsyncEngine, process: EngineProcess) -> None:
        asked = [
            request(f"r{i}", prompt=1 + i % 37, max_tokens=1 + i % 13, seed=i) for i in range(150)
        ]
        answers = await asyncio.gather(*(collect(engine, r) for r in asked))
        for r, outputs in zip(asked, answers, strict=True):
            tokens = [t for output in outputs for t in output.new_token_ids]
            assert tokens == fake_output(
                len(r.prompt_token_ids),
                r.params,
                max_model_len=engine.info.max_model_len,
                vocab_size=engine.info.vocab_size,
            )
            assert outputs[-1].finish_reason is FinishReason.LENGTH
            assert outputs[-1].times is not None
        assert engine.num_unfinished == 0
        engine.check_health()

    with_engine(test)


class Recorder:
    def __init__(self) -> None:
        self.requests: list[str] = []
        self.ended: dict[str, FinishReason] = {}
        self.num_owned = 0

    def on_request(self, request: EngineRequest) -> None:
        self.requests.append(request.request_id)

    def on_outputs(self, outputs: EngineOutputs, now: float) -> None:
        for output in outputs.outputs:
            if output.finish_reason is not None:
                self.ended[output.request_id] = output.finish_reason
        if outputs.stats is not None:
            self.num_owned = outputs.stats.num_owned_blocks


def test_leaving_early_aborts_and_frees() -> None:
    async def test(engine: AsyncEngine, process: EngineProcess) -> None:
        recorder = Recorder()
        engine.subscribe(recorder)
        closed = engine.generate(request("closed", max_tokens=2000))
        await anext(closed)
        await closed.aclose()
        await closed.aclose()

        dropped = engine.generate(request("dropped", max_tokens=2000))
        await anext(dropped)
        del dropped

        task = asyncio.create_task(collect(engine, request("cancelled", max_tokens=2000)))
        await until(lambda: engine.num_unfinished > 0 and "cancelled" in recorder.requests)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

        never_read = engine.generate(request("never read", max_tokens=2000))
        await never_read.aclose()

        await until(lambda: engine.num_unfinished == 0)
        assert recorder.requests == ["closed", "dropped", "cancelled", "never read"]
        assert recorder.ended == dict.fromkeys(recorder.requests, FinishReason.ABORT)
        assert recorder.num_owned == 0

    with_engine(test)


def test_abort_by_id_ends_the_stream() -> None:
    async def test(engine: AsyncEngine, process: EngineProcess) -> None:
        stream = engine.generate(request("a", max_tokens=2000))
        other = engine.generate(request("b", max_tokens=2000))
        await anext(stream)
        engine.abort(["a", "unknown"])
        reasons = [output.finish_reason async for output in stream]
        assert reasons[-1] is FinishReason.ABORT
        assert engine.num_unfinished == 1
        engine.abort_all()
        assert [o async for o in other][-1].finish_reason is FinishReason.ABORT

    with_engine(test)


def test_an_id_that_runs_cannot_be_used_again() -> None:
    async def test(engine: AsyncEngine, process: EngineProcess) -> None:
        stream = engine.generate(request("a", max_tokens=2000))
        with pytest.raises(ValueError, match="'a' is already running"):
            engine.generate(request("a"))
        await anext(stream)
        await stream.aclose()
        with pytest.raises(ValueError, match="already running"):
            engine.generate(request("a"))  # its end has not come back yet
        await until(lambda: engine.num_unfinished == 0)
        outputs = await collect(engine, request("a", max_tokens=3))
        assert outputs[-1].finish_reason is FinishReason.LENGTH

    with_engine(test)


def test_a_request_that_cannot_run_fails_alone() -> None:
    async def test(engine: AsyncEngine, process: EngineProcess) -> None:
        long, fine = await asyncio.gather(
            collect(engine, request("long", prompt=5000)), collect(engine, request("fine"))
        )
        assert long[-1].finish_reason is FinishReason.ERROR
        assert long[-1].is_bad_request
        assert "5000" in (long[-1].error or "")
        assert fine[-1].finish_reason is FinishReason.LENGTH

    with_engine(test)


def test_death_reaches_every_stream() -> None:
    async def test(engine: AsyncEngine, process: EngineProcess) -> None:
        streams = [engine.generate(request(f"r{i}", max_tokens=2000)) for i in range(5)]
        await anext(streams[0])
        os.kill(process.pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDeadError, match="killed by signal 9"):
                async for _ in stream:
                    pass
        assert "signal 9" in await engine.wait_dead()
        assert engine.num_unfinished == 0
        with pytest.raises(EngineDeadError):
            engine.check_health()
        with pytest.raises(EngineDeadError):
            engine.generate(request("later"))

    with_engine(test)


def test_signals_to_the_whole_group_are_for_the_parent() -> None:
    async def test(engine: AsyncEngine, process: EngineProcess) -> None:
        stream = engine.generate(request("a", max_tokens=200))
        await anext(stream)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(process.pid, number)
        assert [o async for o in stream][-1].finish_reason is FinishReason.LENGTH

    with_engine(test)


def test_no_progress_is_no_health() -> None:
    async def test(engine: AsyncEngine, process: EngineProcess) -> None:
        engine.check_health()  # idle is healthy however long
        os.kill(process.pid, signal.SIGSTOP)
        try:
            stream = engine.generate(request("a"))
            await asyncio.sleep(0)
            with pytest.raises(EngineDeadError, match="has not finished a step"):
                engine.check_health()
        finally:
            os.kill(process.pid, signal.SIGCONT)
        assert [o async for o in stream][-1].finish_reason is FinishReason.LENGTH
        engine.check_health()

    with_engine(test, stall_seconds=0.0)


def test_a_step_that_may_hold_more_tokens_may_take_longer() -> None:
    async def test(engine: AsyncEngine, process: EngineProcess) -> None:
        os.kill(process.pid, signal.SIGSTOP)
        try:
            stream = engine.generate(request("a"))
            began = engine._last_progress
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("octavo.engine.async_engine.time.monotonic", lambda: began + 190)
                engine.check_health()
                patch.setattr("octavo.engine.async_engine.time.monotonic", lambda: began + 210)
                with pytest.raises(EngineDeadError, match="for 210 seconds"):
                    engine.check_health()
        finally:
            os.kill(process.pid, signal.SIGCONT)
        async for _ in stream:
            pass

    config = replace(CONFIG, scheduler=SchedulerConfig(max_num_batched_tokens=5120))
    with_engine(test, config=config, stall_seconds=10.0)


def test_a_request_that_cannot_be_sent_holds_up_no_other() -> None:
    async def test(engine: AsyncEngine, process: EngineProcess) -> None:
        told: list[BaseException] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: told.append(context["exception"])
        )
        lost = engine.generate(replace(request("lost"), priority=2**70))
        await asyncio.sleep(0)
        assert len(told) == 1
        outputs = await collect(engine, request("a"))
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        await lost.aclose()

    with_engine(test)


def test_closing_ends_open_streams() -> None:
    async def test(engine: AsyncEngine, process: EngineProcess) -> None:
        stream = engine.generate(request("a", max_tokens=2000))
        await anext(stream)
        await engine.close()
        await engine.close()
        with pytest.raises(EngineDeadError, match="shut down"):
            async for _ in stream:
                pass

    with_engine(test)


@pytest.mark.parametrize("has_model", [False, True])
def test_a_start_that_fails_says_why(has_model: bool) -> None:
    async def run() -> None:
        config = EngineConfig(model=ModelConfig(model="/no/such/model"))
        process = EngineProcess(config, log_level="critical")
        engine = AsyncEngine(process, address=process.addresses[0])
        if has_model:  # killed before it can say anything
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineStartError) as caught:
            await asyncio.wait_for(engine.start(), DEADLINE)
        assert caught.value.is_user_error is not has_model
        assert ("signal 9" if has_model else "/no/such/model") in str(caught.value)
        await engine.close()

    asyncio.run(run())


def test_the_engine_ends_with_its_parent() -> None:
    program = (
        "import os, sys\n"
        "from octavo.config import EngineConfig\n"
        "from octavo.engine.launch import EngineProcess\n"
        "process = EngineProcess(EngineConfig(), fake_executor=True)\n"
        "print(process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    roots = os.pathsep.join(path for path in sys.path if path)
    parent = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": roots},
        stdout=subprocess.PIPE,
        timeout=DEADLINE,
        check=False,
    )
    # That it returned is the proof: it waits until nobody holds the pipe, and the engine did.
    assert parent.returncode == -signal.SIGKILL
    assert int(parent.stdout) > 0
