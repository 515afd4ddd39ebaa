"""Builds the worker of one engine and tells how long each phase took. Knows the order of start-up.

Everything that takes time to import is imported inside `build_worker`, so that it is a phase.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from octavo.config import EngineConfig
from octavo.types import EngineInfo

if TYPE_CHECKING:
    from octavo.worker.executor import InlineExecutor, ThreadExecutor

_log = logging.getLogger(__name__)


class _Phases:
    """Seconds between marks."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now


def build_worker(config: EngineConfig) -> tuple[InlineExecutor | ThreadExecutor, EngineInfo]:
    """Finds and loads the model, sizes its cache and warms every kernel that serving calls.

    The executor runs in a thread of its own when scheduling overlaps (``async_scheduling``).
    Raises ValueError when the model or an option cannot be used.
    """
    phases = _Phases()
    # Lazy: torch and numba take a second, which is a phase of its own.
    from octavo.checkpoint import resolve
    from octavo.worker import startup
    from octavo.worker.executor import InlineExecutor, ThreadExecutor

    phases.end("import")
    startup.check_device(config.model.device)
    num_threads = startup.set_threads(config.model.num_threads)
    files = resolve(config.model)  # first: a wrong model must be told at once
    phases.end("resolve")
    with startup.kernels_compiled(config):
        model = startup.load(config, files=files, spec=files.spec)
        phases.end("load")
        plan, runner = startup.make_runner(config, model=model)
        phases.end("cache")
    startup.warm(runner, plan=plan, block_size=config.cache.block_size)
    phases.end("warm")
    for note in plan.notes:
        _log.warning("%s", note)
    info = startup.engine_info(
        config, files=files, plan=plan, num_threads=num_threads, phases=phases.seconds
    )
    is_threaded = config.scheduler.async_scheduling
    return (ThreadExecutor if is_threaded else InlineExecutor)(runner), info
