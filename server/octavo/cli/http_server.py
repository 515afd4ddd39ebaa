"""The HTTP process's life: wait for the engine, serve, drain, end. Knows uvicorn and signals.

What requests mean is `octavo.api`'s; this module gives it an engine and takes it away.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
import uvloop

from octavo.api.app import create_app
from octavo.api.lifecycle import Lifecycle
from octavo.checkpoint.source import ModelFiles, resolve
from octavo.cli.http_protocol import HttpProtocol
from octavo.config import EngineConfig, ServerConfig
from octavo.engine.async_engine import AsyncEngine
from octavo.engine.launch import EngineProcess
from octavo.observability.logging import ThroughputLog, set_up_logging
from octavo.observability.metrics import Metrics
from octavo.text.tokenizer import Tokenizer
from octavo.types import EngineInfo

log = logging.getLogger(__name__)

OnReady = Callable[[EngineInfo], None]
_LAST_SECONDS = 2  # for the last bytes of answers, when the engine has no more to give


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would stop it listening before it has drained."""

    def __init__(self, config: uvicorn.Config, *, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(_LAST_SECONDS, self._drop_connections)
        await super().shutdown(sockets=sockets)

    def _drop_connections(self) -> None:
        """Clients that neither read nor send: as if they had left, which ends their requests more
        quietly than uvicorn's cancelling."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_started()


class _Signals:
    """SIGTERM and SIGINT as events: the first asks for an end, the second for one at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.first.is_set():
            log.info("%s again: ending at once", name)
            self.second.set()
        else:
            log.info("%s: ending", name)
            self.first.set()


def serve_http(
    config: EngineConfig,
    server: ServerConfig,
    *,
    listener: socket.socket,
    process: EngineProcess,
    on_ready: OnReady,
) -> int:
    """Serves until told to end. Returns the exit code: 0 after a signal, 1 if the engine died.

    ``listener`` is bound, not yet listening. Raises `EngineStartError`, ValueError.
    """
    set_up_logging(server.uvicorn_log_level)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, server, listener, process, on_ready))


async def _serve(
    config: EngineConfig,
    server: ServerConfig,
    listener: socket.socket,
    process: EngineProcess,
    on_ready: OnReady,
) -> int:
    signals = _Signals()
    engine = AsyncEngine(process)
    loading = asyncio.create_task(asyncio.to_thread(_load_text, config))
    starting = asyncio.create_task(engine.start())
    try:
        if not await _finished(starting, before=signals.first):
            return 0
        files, tokenizer = await loading
        info = starting.result()
        lifecycle = Lifecycle()
        app = _make_app(config, server, engine, files, tokenizer, lifecycle)

        def started() -> None:
            lifecycle.ready()
            on_ready(info)

        http = _Server(_uvicorn_config(app, server), on_started=started)
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        dying = asyncio.create_task(engine.wait_dead())
        stopping = asyncio.create_task(signals.first.wait())
        await asyncio.wait([serving, dying, stopping], return_when=asyncio.FIRST_COMPLETED)
        if dying.done():
            log.critical("the engine is dead: %s", dying.result())
        elif stopping.done():
            await _drain(engine, lifecycle, signals, dying, timeout=server.shutdown_timeout)
        http.force_exit = signals.second.is_set()
        http.should_exit = True
        await serving
        return 1 if dying.done() else 0
    finally:
        loading.cancel()
        await asyncio.gather(loading, starting, return_exceptions=True)
        await engine.close()


async def _finished(task: asyncio.Task[Any], *, before: asyncio.Event) -> bool:
    """Waits for `task`, unless `before` is set first: then the task is cancelled."""
    waiting = asyncio.create_task(before.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False


async def _drain(
    engine: AsyncEngine,
    lifecycle: Lifecycle,
    signals: _Signals,
    dying: asyncio.Task[str],
    *,
    timeout: float,
) -> None:
    """No new work; what runs may end within `timeout` seconds, then it is aborted."""
    lifecycle.drain()
    if lifecycle.num_active:
        log.info(
            "%d requests may end within %.0f s; a second signal aborts them",
            lifecycle.num_active,
            timeout,
        )
    idle = asyncio.create_task(lifecycle.wait_idle(timeout))
    hurry = asyncio.create_task(signals.second.wait())
    await asyncio.wait([idle, hurry, dying], return_when=asyncio.FIRST_COMPLETED)
    for task in (idle, hurry):
        task.cancel()
    if lifecycle.num_active:
        log.warning("aborting %d requests", lifecycle.num_active)
        engine.abort_all()
        await lifecycle.wait_idle(_LAST_SECONDS)


def _load_text(config: EngineConfig) -> tuple[ModelFiles, Tokenizer]:
    """The model's files and its tokenizer. Raises ValueError."""
    files = resolve(config.model)
    return files, Tokenizer.from_dir(config.model.tokenizer or files.tokenizer_dir)


def _make_app(
    config: EngineConfig,
    server: ServerConfig,
    engine: AsyncEngine,
    files: ModelFiles,
    tokenizer: Tokenizer,
    lifecycle: Lifecycle,
) -> Any:
    """The ASGI application, with metrics and the throughput line hearing the engine."""
    names = (*server.served_model_name, config.model.model, engine.info.model)
    name = next(name for name in names if name)
    metrics = Metrics(engine.info, model_name=name, cache_config=dataclasses.asdict(config.cache))
    engine.subscribe(metrics)
    if not server.disable_log_stats:
        engine.subscribe(ThroughputLog())
    return create_app(
        engine,
        tokenizer=tokenizer,
        server=server,
        model=config.model,
        scheduler=config.scheduler,
        metrics=metrics,
        lifecycle=lifecycle,
        generation_config=files.generation_config,
    )


def _uvicorn_config(app: Any, server: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=HttpProtocol,
        ws="none",
        lifespan="off",  # there is nothing to do, and a forced end would log its cancellation
        log_config=None,  # `set_up_logging` has done it
        log_level=server.uvicorn_log_level,
        access_log=not server.disable_uvicorn_access_log,
        timeout_keep_alive=server.timeout_keep_alive,
        timeout_graceful_shutdown=_LAST_SECONDS + 1,
        ssl_keyfile=server.ssl_keyfile,
        ssl_certfile=server.ssl_certfile,
        ssl_ca_certs=server.ssl_ca_certs,
        server_header=False,
    )
