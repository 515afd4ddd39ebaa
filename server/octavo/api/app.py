"""The ASGI application: parts in, routes and middleware out. Knows how they fit together."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from octavo import __version__
from octavo.api import chat, completions, models, operations, tokenization
from octavo.api.errors import for_route, to_api_error
from octavo.api.front import Alone, Front, Metrics, Siblings
from octavo.api.lifecycle import Lifecycle, State
from octavo.api.middleware import ApiKeys, RequestCounts, RequestIds, RootPath
from octavo.config import ModelConfig, SchedulerConfig, ServerConfig
from octavo.engine.options import Defaults, SeedSource
from octavo.engine.protocols import Engine
from octavo.text.chat_template import ChatTemplate, find_template
from octavo.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def create_app(
    engine: Engine,
    *,
    tokenizer: Tokenizer,
    server: ServerConfig | None = None,
    model: ModelConfig | None = None,
    scheduler: SchedulerConfig | None = None,
    metrics: Metrics | None = None,
    lifecycle: Lifecycle | None = None,
    siblings: Siblings | None = None,
    number: int = 0,
    generation_config: Mapping[str, Any] | None = None,
) -> FastAPI:
    """The application over a started ``engine``.

    ``siblings``: the server's HTTP processes, if there are several; ``number``: which this one is.
    ``generation_config``: the model's generation_config.json, for sampling defaults. Without
    ``lifecycle`` the server is ready at once. ``app.state.front`` has the parts. Raises
    ValueError for a chat template or generation config that cannot be used.
    """
    server, model = server or ServerConfig(), model or ModelConfig()
    lifecycle = lifecycle or Lifecycle(State.READY)
    front = Front(
        engine=engine,
        tokenizer=tokenizer,
        template=load_template(tokenizer, given=server.chat_template),
        server=server,
        model=model,
        scheduler=scheduler or SchedulerConfig(),
        metrics=metrics,
        lifecycle=lifecycle,
        siblings=siblings or Alone(engine=engine, lifecycle=lifecycle, own=metrics),
        defaults=load_defaults(model, generation_config=generation_config or {}),
        seeds=SeedSource(model.seed, number=number),
        created=int(time.time()),
    )
    app = FastAPI(
        title="Octavo",
        version=__version__,
        docs_url=None if server.disable_fastapi_docs else "/docs",
        redoc_url=None,
        openapi_url=None if server.disable_fastapi_docs else "/openapi.json",
        redirect_slashes=False,
    )
    app.state.front = front
    for room in (chat, completions, models, tokenization, operations):
        app.include_router(room.routes(front))
    app.add_exception_handler(HTTPException, _answer_unrouted)
    app.add_exception_handler(Exception, _answer_error)
    _add_middleware(app, front)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    return to_api_error(error).response()


async def _answer_unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return for_route(error, method=request.method, path=request.url.path).response()


def _add_middleware(app: FastAPI, front: Front) -> None:
    """The last added is the outermost."""
    server = front.server
    if server.api_key:
        app.add_middleware(ApiKeys, keys=server.api_key)
    app.add_middleware(RequestIds, answer=server.enable_request_id_headers)
    if front.metrics is not None:
        app.add_middleware(RequestCounts, metrics=front.metrics)
    if server.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server.allowed_origins,
            allow_methods=server.allowed_methods,
            allow_headers=server.allowed_headers,
            allow_credentials=server.allow_credentials,
        )
    if server.root_path:
        app.add_middleware(RootPath, path=server.root_path)


def load_template(tokenizer: Tokenizer, *, given: str | None) -> ChatTemplate | None:
    """The chat template, or None if the model has none. ``given``: the server's option. Raises
    ValueError."""
    source = find_template(given, folder=tokenizer.folder, config=tokenizer.config)
    if source is None:
        return None
    return ChatTemplate(source, special_tokens=tokenizer.named_tokens)


def load_defaults(model: ModelConfig, *, generation_config: Mapping[str, Any]) -> Defaults:
    """Sampling defaults by the model's author, unless the server was told to use none. Raises
    ValueError."""
    if model.generation_config != "auto":
        return Defaults()
    defaults = Defaults.from_generation_config(generation_config)
    if defaults != Defaults():
        log.info("sampling defaults from generation_config.json: %s", defaults)
    return defaults
