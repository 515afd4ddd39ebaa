"""The whole control plane in one process: HTTP, scheduler, K/V cache; only the model is made up."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from octavo.api.app import create_app
from octavo.clock import MonotonicClock
from octavo.config import SchedulerConfig
from octavo.engine.core import EngineCore
from octavo.engine.fake import FakeExecutor
from octavo.kvcache.manager import KVCacheManager
from octavo.scheduler.scheduler import Scheduler
from octavo.text.tokenizer import Tokenizer
from octavo.types import EngineInfo, EngineOutput, EngineRequest
from tests.api.serving import EOS, Pumped, Server, wait_until

TEXT = "/v1/completions"
NUM_BLOCKS, MAX_LEN = 40, 128


class InProcessEngine(Pumped):
    """`EngineCore` stepped by the event loop itself."""

    def __init__(self, *, vocab_size: int) -> None:
        self.cache = KVCacheManager(NUM_BLOCKS, block_size=16, check_invariants=True)
        config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=48)
        scheduler = Scheduler(
            config, kv=self.cache, max_model_len=MAX_LEN, max_num_batched_tokens=48
        )
        executor = FakeExecutor(block_size=16, vocab_size=vocab_size, track_kv=True)
        self.executor = executor
        self.core = EngineCore(scheduler, executor, MonotonicClock(), max_inflight=2)
        self._pumps = {}
        self.queues: dict[str, asyncio.Queue[EngineOutput]] = {}
        self.stepping: asyncio.Task[None] | None = None
        self.info = EngineInfo(
            model="tiny",
            architecture="Fake",
            device="cpu",
            dtype="float32",
            kv_cache_dtype="float32",
            vocab_size=vocab_size,
            max_model_len=MAX_LEN,
            block_size=16,
            num_blocks=NUM_BLOCKS,
            max_num_seqs=8,
            max_num_batched_tokens=48,
            eos_token_ids=(EOS,),
        )

    @property
    def num_unfinished(self) -> int:
        return len(self.queues)

    def check_health(self) -> None:
        pass

    async def close(self) -> None:
        self.core.close()

    def abort(self, request_ids: Sequence[str]) -> None:
        self.core.abort(request_ids)
        self._go()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        queue = self.queues[request.request_id] = asyncio.Queue()
        self.core.add_request(request)
        self._go()
        finished = False
        try:
            while not finished:
                output = await queue.get()
                finished = output.finish_reason is not None
                yield output
        finally:
            del self.queues[request.request_id]
            if not finished:
                self.abort([request.request_id])

    def _go(self) -> None:
        if self.stepping is None or self.stepping.done():
            self.stepping = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while self.core.has_work:
            for output in self.core.step().outputs:
                if (queue := self.queues.get(output.request_id)) is not None:
                    queue.put_nowait(output)
            await asyncio.sleep(0)


@pytest.fixture(scope="module")
def real(tokenizer: Tokenizer) -> Iterator[Server]:
    engine = InProcessEngine(vocab_size=tokenizer.vocab_size)
    server = Server(create_app(engine, tokenizer=tokenizer), engine)  # type: ignore[arg-type]
    server.start()
    try:
        yield server
    finally:
        server.stop()


def body_of(number: int) -> dict[str, Any]:
    choose = random.Random(number)
    shared = [7 + i % 90 for i in range(choose.choice([0, 20, 40]))]
    return {
        "prompt": [*shared, *(choose.randrange(3, 300) for _ in range(choose.randint(1, 30)))],
        "max_tokens": choose.randint(1, 40),
        "seed": number,
        "n": choose.choice([1, 1, 3]),
        "return_token_ids": True,
        **choose.choice([{}, {"logprobs": 1}, {"prompt_logprobs": 1}, {"stop": ["e", "\n"]}]),
    }


def essence(answer: dict[str, Any]) -> Any:
    return [(c["text"], c["token_ids"], c["finish_reason"]) for c in answer["choices"]]


def test_a_crowd_gets_what_each_would_alone(real: Server) -> None:
    engine: Any = real.engine
    with httpx.Client(base_url=real.url, timeout=60) as http:
        alone = {n: http.post(TEXT, json=body_of(n)).json() for n in range(24)}

        def visit(number: int) -> None:
            choose = random.Random(-number)
            body = body_of(number % 24)
            if number % 3 == 0:
                answer = http.post(TEXT, json=body).json()
                assert essence(answer) == essence(alone[number % 24])
                return
            leave_after = choose.randint(1, 6) if number % 3 == 1 else None
            texts: dict[int, str] = {}
            with http.stream("POST", TEXT, json=body | {"stream": True}) as response:
                for count, line in enumerate(response.iter_lines()):
                    if count == leave_after:
                        return
                    if line.startswith("data: {"):
                        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                        index = choice["index"]
                        texts[index] = texts.get(index, "") + choice["text"]
            expected = {c["index"]: c["text"] for c in alone[number % 24]["choices"]}
            assert texts == expected

        with ThreadPoolExecutor(12) as pool:
            for _ in pool.map(visit, range(96)):
                pass
    wait_until(lambda: engine.num_unfinished == 0 and not engine.core.has_work)
    assert engine.cache.num_available == NUM_BLOCKS  # every block is free or merely cached
    assert engine.executor.num_bad_reads == 0


def test_what_can_never_fit_is_refused(real: Server) -> None:
    with httpx.Client(base_url=real.url) as http:
        body = {"prompt": [5] * MAX_LEN, "max_tokens": 1}
        assert http.post(TEXT, json=body).json()["error"]["code"] == "context_length_exceeded"
        cached = [http.post(TEXT, json={"prompt": list(range(5, 69)), "seed": 1}) for _ in "12"]
        details = [r.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for r in cached]
        assert details[1] == 48


def test_the_info_is_frozen(real: Server) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        real.engine.info.model = "x"  # type: ignore[misc]
