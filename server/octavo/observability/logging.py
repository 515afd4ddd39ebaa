"""How the program's log lines look, and the throughput line while busy. Knows no engine or HTTP.

Lines go to standard error, so that what a command prints stays clean.
"""

from __future__ import annotations

import logging
import sys

from octavo.types import EngineOutputs, EngineRequest, StepStats

log = logging.getLogger("octavo")

_FORMAT = "%(levelname)s %(asctime)s [%(name)s] %(message)s"


def set_up_logging(level: str = "info") -> None:
    """Sends what octavo, its kernels and uvicorn log at `level` or above to standard error.

    `level`: one of `octavo.config.ServerConfig.uvicorn_log_level`.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%m-%d %H:%M:%S"))
    for logger in (log, *map(logging.getLogger, ("octavo_kernels", "uvicorn"))):
        logger.handlers[:] = [handler]
        logger.setLevel("DEBUG" if level == "trace" else level.upper())
        logger.propagate = False


class ThroughputLog:
    """An engine observer that says, every `period` seconds while busy, how fast it goes."""

    def __init__(self, *, period: float = 10.0) -> None:
        self._period = period
        self._since: float | None = None
        self._clear()

    def _clear(self) -> None:
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._queries = 0
        self._hits = 0

    def on_request(self, request: EngineRequest) -> None:
        """Nothing to say until it runs."""

    def on_outputs(self, outputs: EngineOutputs, now: float) -> None:
        stats = outputs.stats
        if stats is None:
            return
        if self._since is None:
            self._since = now
        self._prompt_tokens += stats.prompt_tokens
        self._generation_tokens += stats.generation_tokens
        self._queries += stats.prefix_cache_queries
        self._hits += stats.prefix_cache_hits
        is_idle = stats.num_running == 0 and stats.num_waiting == 0
        seconds = now - self._since
        if seconds >= self._period:
            log.info(self._line(stats, seconds))
            self._clear()
            self._since = now
        if is_idle:
            # The next burst is a period of its own; idle time must not thin its figures.
            self._since = None
            self._clear()

    def _line(self, stats: StepStats, seconds: float) -> str:
        hit_rate = self._hits / self._queries if self._queries else 0.0
        return (
            f"Avg prompt throughput: {self._prompt_tokens / seconds:.1f} tokens/s, "
            f"Avg generation throughput: {self._generation_tokens / seconds:.1f} tokens/s, "
            f"Running: {stats.num_running} reqs, Waiting: {stats.num_waiting} reqs, "
            f"KV cache usage: {100 * stats.kv_cache_usage:.1f}%, "
            f"Prefix cache hit rate: {100 * hit_rate:.1f}%"
        )
