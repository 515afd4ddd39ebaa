"""The loop: schedule, execute, update. Knows no policy, no tensors and no HTTP.

With ``max_inflight`` 2 step N+1 is scheduled and submitted before the results of step N are
collected, so the host's work hides behind the model's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from octavo.clock import Clock
from octavo.engine.protocols import Executor
from octavo.scheduler.scheduler import Scheduler
from octavo.types import (
    DeviceLostError,
    EngineOutput,
    EngineOutputs,
    EngineRequest,
    FinishReason,
    RequestTimes,
    WorkerStats,
)

logger = logging.getLogger(__name__)

# What clients are told when a step fails; the cause is in the log.
STEP_FAILED = "internal error: the step that computed this request failed"
MAX_FAILED_STEPS = 3  # in a row; then the device is taken for dead


class EngineCore:
    """Drives one scheduler and one executor; for one thread.

    An executor whose ``submit`` or ``collect`` raises has failed that step: its requests end in
    error and the engine goes on. The executor must have applied the step's diffs (rows, blocks,
    copies) all the same, as later steps build on them. The third failure in a row is raised, and
    a lost device's first.
    """

    def __init__(
        self, scheduler: Scheduler, executor: Executor, clock: Clock, *, max_inflight: int
    ) -> None:
        assert max_inflight >= 1
        self.scheduler = scheduler
        self._executor = executor
        self._clock = clock
        self._max_inflight = max_inflight
        self._num_inflight = 0
        self._num_failed_steps = 0
        self._pending: list[EngineOutput] = []  # what happened between steps
        self._host_seconds = 0.0
        self._worker_stats: WorkerStats | None = None

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return self._num_inflight > 0 or self.scheduler.has_unfinished or bool(self._pending)

    def add_request(self, request: EngineRequest) -> None:
        """Queues a request; one that cannot run is refused in the next step's outputs.

        A refusal names the request's id, even where the fault is that the id is taken: the front
        end makes ids unique.
        """
        now = self._clock.now()
        try:
            self.scheduler.add(request, now=now)
            return
        except ValueError as error:
            message, is_bad_request = str(error), True
        except Exception:  # what no front end should let pass must not end the engine for all
            logger.exception("request %s cannot be queued", request.request_id)
            message, is_bad_request = "internal error: the request cannot be queued", False
        self._pending.append(
            EngineOutput(
                request_id=request.request_id,
                finish_reason=FinishReason.ERROR,
                error=message,
                is_bad_request=is_bad_request,
                times=RequestTimes(arrival=request.arrival_time, queued=now, finished=now),
            )
        )

    def abort(self, request_ids: Iterable[str]) -> None:
        """Ends requests wherever they are; unknown ids are ignored. Their blocks are free now,
        their last outputs come with the next step."""
        self._pending += self.scheduler.abort(request_ids, now=self._clock.now())

    def reset_prefix_cache(self) -> None:
        self.scheduler.reset_prefix_cache()

    def step(self) -> EngineOutputs:
        """Submits steps as far as allowed, waits for the oldest, and tells what is new.

        Raises what the executor raised when steps fail again and again.
        """
        outputs, self._pending = self._pending, []
        outputs += self._submit()
        if self._num_inflight:
            outputs += self._collect()
        host_seconds, self._host_seconds = self._host_seconds, 0.0
        worker, self._worker_stats = self._worker_stats, None
        now = self._clock.now()
        stats = self.scheduler.stats(now, host_seconds=host_seconds, worker=worker)
        return EngineOutputs(outputs=tuple(outputs), stats=stats)

    def use_idle_time(self) -> bool:
        """Does a short piece of the executor's work that waits for idle times; False if none is
        left. To be called while there is nothing else to do."""
        return self._executor.use_idle_time()

    def close(self) -> None:
        """Frees the device; requests still alive get no further output."""
        self._executor.close()

    def _submit(self) -> list[EngineOutput]:
        while self._num_inflight < self._max_inflight:
            began = self._clock.now()
            output = self.scheduler.schedule(began)
            self._host_seconds += self._clock.now() - began
            if not output.num_scheduled_tokens:
                break
            try:
                self._executor.submit(output)
            except Exception as error:
                return self._fail_step(error, newest=True)
            self._num_inflight += 1
        return []

    def _collect(self) -> list[EngineOutput]:
        self._num_inflight -= 1
        try:
            output = self._executor.collect()
        except Exception as error:
            return self._fail_step(error, newest=False)
        self._num_failed_steps = 0
        self._worker_stats = output.worker
        began = self._clock.now()
        outputs = self.scheduler.update(output, began)
        self._host_seconds += self._clock.now() - began
        return outputs

    def _fail_step(self, error: Exception, *, newest: bool) -> list[EngineOutput]:
        self._num_failed_steps += 1
        if isinstance(error, DeviceLostError) or self._num_failed_steps >= MAX_FAILED_STEPS:
            raise error
        logger.error("a step failed; its requests end in error", exc_info=error)
        return self.scheduler.fail_step(STEP_FAILED, now=self._clock.now(), newest=newest)
