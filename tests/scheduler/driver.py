"""Runs a scheduler on a fake executor, one verb at a time."""

from __future__ import annotations

from typing import Any

from octavo.clock import VirtualClock
from octavo.config import SchedulerConfig
from octavo.engine.core import EngineCore
from octavo.engine.fake import FakeExecutor, fake_output
from octavo.kvcache.manager import KVCacheManager
from octavo.scheduler.scheduler import Scheduler
from octavo.types import EngineOutput, EngineRequest, SamplingParams, SchedulerOutput, StepStats

VOCAB_SIZE = 97


class Driver:
    """Schedules and updates by hand, or through an `EngineCore` that shares the scheduler."""

    def __init__(
        self,
        *,
        num_blocks: int = 32,
        block_size: int = 4,
        max_model_len: int = 64,
        budget: int = 64,
        caching: bool = True,
        num_host_slots: int = 0,
        max_inflight: int = 1,
        executor: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        self.max_model_len = max_model_len
        self.kv = KVCacheManager(
            num_blocks,
            block_size=block_size,
            enable_prefix_caching=caching,
            num_host_slots=num_host_slots,
            check_invariants=True,
        )
        self.scheduler = Scheduler(
            SchedulerConfig(**config),
            kv=self.kv,
            max_model_len=max_model_len,
            max_num_batched_tokens=budget,
        )
        self.executor = FakeExecutor(
            block_size=block_size, vocab_size=VOCAB_SIZE, track_kv=True, **(executor or {})
        )
        self.clock = VirtualClock(start=100.0)
        self.core = EngineCore(self.scheduler, self.executor, self.clock, max_inflight=max_inflight)
        self.requests: dict[str, EngineRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.outputs: dict[str, list[EngineOutput]] = {}
        self.stats: list[StepStats] = []

    def add(
        self,
        request_id: str,
        prompt: int | list[int],
        *,
        priority: int = 0,
        arrival_time: float = 0.0,
        cache_salt: str | None = None,
        fork_of: str | None = None,
        **params: Any,
    ) -> None:
        """``prompt``: token ids, or how many of them (then unlike any other request's)."""
        if isinstance(prompt, int):
            prompt = [1000 * (len(self.requests) + 1) + i for i in range(prompt)]
        params.setdefault("seed", sum(request_id.encode()))
        request = EngineRequest(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(**params),
            priority=priority,
            arrival_time=arrival_time,
            cache_salt=cache_salt,
            fork_of=fork_of,
        )
        self.scheduler.add(request, now=self.clock.now())
        self.requests[request_id] = request
        self.tokens[request_id] = []
        self.outputs[request_id] = []

    def schedule(self) -> SchedulerOutput:
        """Plans and submits; an empty step is not submitted."""
        step = self.scheduler.schedule(self.clock.now())
        if step.num_scheduled_tokens:
            self.executor.submit(step)
        return step

    def update(self) -> list[EngineOutput]:
        return self.take(self.scheduler.update(self.executor.collect(), self.clock.now()))

    def step(self) -> SchedulerOutput:
        """One step without overlap."""
        step = self.schedule()
        assert step.num_scheduled_tokens, "nothing could be scheduled"
        self.update()
        return step

    def take(self, outputs: list[EngineOutput] | tuple[EngineOutput, ...]) -> list[EngineOutput]:
        for output in outputs:
            if output.request_id in self.requests:
                news = self.outputs[output.request_id]
                assert not news or news[-1].finish_reason is None, "news after the end"
                news.append(output)
                self.tokens[output.request_id] += output.new_token_ids
        return list(outputs)

    def run(self, *, max_steps: int = 2000) -> None:
        """Through the engine's loop until all have ended; then every block must be available."""
        for _ in range(max_steps):
            if not self.core.has_work:
                break
            news = self.core.step()
            assert news.stats is not None
            self.stats.append(news.stats)
            self.take(news.outputs)
        assert not self.core.has_work, f"unfinished after {max_steps} steps"
        assert self.kv.num_available == self.kv.num_blocks
        # Only what is built on a failed computation may read wrongly, and its results are void.
        executor = self.executor
        fails = executor.fail_requests or executor.fail_steps or executor.num_damaged
        assert fails or self.executor.num_bad_reads == 0

    def alone(self, request_id: str) -> list[int]:
        """The tokens this request gets when it has the engine to itself."""
        request = self.requests[request_id]
        return fake_output(
            len(request.prompt_token_ids),
            request.params,
            max_model_len=self.max_model_len,
            vocab_size=VOCAB_SIZE,
            script=self.executor.scripts.get(request_id, ()),
        )

    def last(self, request_id: str) -> EngineOutput:
        return self.outputs[request_id][-1]
