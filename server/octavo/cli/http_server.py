"""An HTTP process's life: wait for the engine, serve, drain, end. Knows uvicorn and its siblings.

What requests mean is `octavo.api`'s; this module gives it an engine and takes it away.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn
import uvloop

from octavo.api.app import create_app
from octavo.api.lifecycle import Lifecycle
from octavo.checkpoint.source import ModelFiles, resolve
from octavo.cli.api_child import ApiChild
from octavo.cli.http_protocol import HttpProtocol
from octavo.cli.siblings import Channel, ChildPlace, Counts, FirstPlace, Orders, Place, Start
from octavo.config import EngineConfig, ServerConfig
from octavo.engine.async_engine import AsyncEngine, EngineStartError
from octavo.engine.launch import EngineProcess
from octavo.observability.logging import ThroughputLog, set_up_logging
from octavo.observability.metrics import Metrics
from octavo.text.tokenizer import Tokenizer
from octavo.types import EngineInfo, EngineOutputs, EngineRequest

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


class _Share:
    """An engine observer that tells the other processes how much this one has in hand."""

    def __init__(self, engine: AsyncEngine, counts: Counts) -> None:
        self._engine = engine
        self._counts = counts

    def _tell(self) -> None:
        self._counts.set_choices(self._engine.num_unfinished)

    def on_request(self, request: EngineRequest) -> None:
        self._tell()

    def on_outputs(self, outputs: EngineOutputs, now: float) -> None:
        asyncio.get_running_loop().call_soon(self._tell)  # when those that ended are gone


def serve_http(
    config: EngineConfig,
    server: ServerConfig,
    *,
    listener: socket.socket,
    process: EngineProcess,
    children: Sequence[ApiChild] = (),
    on_ready: OnReady,
) -> int:
    """Serves until told to end. Returns the exit code: 0 after a signal, 1 if the engine or one of
    the other HTTP processes, ``children``, died.

    ``listener`` is bound, not yet listening. Raises `EngineStartError`, ValueError.
    """
    set_up_logging(server.uvicorn_log_level)

    async def run() -> int:
        num, path = 1 + len(children), f"{process.folder}/counts"
        starts = [
            Start(
                number=child.number,
                num_processes=num,
                address=process.addresses[child.number],
                counts=path,
                config=config,
                server=server,
            )
            for child in children
        ]
        place = FirstPlace(
            children, counts=Counts(path, number=0, num_processes=num), starts=starts
        )
        await place.open()
        engine = AsyncEngine(process, address=process.addresses[0])
        place.on_lost = engine.drop_front_end
        return await _serve(config, server, listener, engine, place, on_ready)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def serve_child(channel: socket.socket, listener: socket.socket) -> int:
    """As `serve_http`, in one of the other processes: what to serve comes through ``channel``."""

    async def run() -> int:
        end = Channel(*await asyncio.open_connection(sock=channel))
        if (start := await end.start()) is None:
            return 1
        set_up_logging(start.server.uvicorn_log_level)
        counts = Counts(start.counts, number=start.number, num_processes=start.num_processes)
        place = ChildPlace(end, start.number, counts=counts)
        engine = AsyncEngine(place.engine, address=start.address)
        try:
            return await _serve(
                start.config, start.server, listener, engine, place, lambda info: None
            )
        except (EngineStartError, ValueError):
            return 1  # the first process finds the same and tells it

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


async def _serve(
    config: EngineConfig,
    server: ServerConfig,
    listener: socket.socket,
    engine: AsyncEngine,
    place: Place,
    on_ready: OnReady,
) -> int:
    orders = place.orders
    loading = asyncio.create_task(asyncio.to_thread(_load_text, config))
    starting = asyncio.create_task(engine.start())
    try:
        if not await _finished(starting, before=orders.first):
            return 0
        files, tokenizer = await loading
        info = starting.result()
        lifecycle = Lifecycle(on_active=place.counts.set_requests)
        metrics = _make_metrics(config, server, engine, is_first=place.number == 0)
        engine.subscribe(_Share(engine, place.counts))
        app = create_app(
            engine,
            tokenizer=tokenizer,
            server=server,
            model=config.model,
            scheduler=config.scheduler,
            metrics=metrics,
            lifecycle=lifecycle,
            siblings=place,
            number=place.number,
            generation_config=files.generation_config,
        )
        await place.serving(metrics)

        def started() -> None:
            lifecycle.ready()
            on_ready(info)

        http = _Server(_uvicorn_config(app, server), on_started=started)
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        dying = asyncio.create_task(engine.wait_dead())
        stopping = asyncio.create_task(orders.first.wait())
        await asyncio.wait([serving, dying, stopping], return_when=asyncio.FIRST_COMPLETED)
        if dying.done():
            log.critical("the engine is dead: %s", dying.result())
            place.engine_died(dying.result())
        elif stopping.done():
            await _drain(engine, lifecycle, orders, dying, timeout=server.shutdown_timeout)
        http.force_exit = orders.second.is_set()
        http.should_exit = True
        await serving
        all_well = await place.ended(server.shutdown_timeout + 2 * _LAST_SECONDS)
        return 0 if all_well and not dying.done() else 1
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
    orders: Orders,
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
    hurry = asyncio.create_task(orders.second.wait())
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


def _make_metrics(
    config: EngineConfig, server: ServerConfig, engine: AsyncEngine, *, is_first: bool
) -> Metrics:
    """Metrics that hear the engine; in the first process the throughput line does as well."""
    names = (*server.served_model_name, config.model.model, engine.info.model)
    metrics = Metrics(
        engine.info,
        model_name=next(name for name in names if name),
        is_first=is_first,
        cache_config=dataclasses.asdict(config.cache),
    )
    engine.subscribe(metrics)
    if is_first and not server.disable_log_stats:
        engine.subscribe(ThroughputLog())
    return metrics


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
