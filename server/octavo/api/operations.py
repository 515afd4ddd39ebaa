"""Endpoints for those who run the server: health, readiness, metrics, version, load."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo import __version__
from octavo.api.errors import UnavailableError
from octavo.api.front import Front
from octavo.api.lifecycle import State
from octavo.api.request_body import answering


def routes(front: Front) -> APIRouter:
    """The endpoints, for one front end. None needs an API key."""
    router = APIRouter()

    @router.head("/health", include_in_schema=False)
    @router.get("/health", summary="200 while the engine can make progress, else 503")
    @answering
    async def health(request: Request) -> Response:
        front.engine.check_health()
        return Response()

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", summary="200 while new requests are taken, else 503")
    @answering
    async def ready(request: Request) -> Response:
        state = front.lifecycle.state
        if state is not State.READY:
            raise UnavailableError(f"The server is {state}", code=state)
        front.engine.check_health()
        return Response(b'{"status":"ready"}', media_type="application/json")

    @router.get("/ping", summary="As /health")
    @router.post("/ping", summary="As /health")
    @answering
    async def ping(request: Request) -> Response:
        front.engine.check_health()
        return Response()

    @router.get("/version", summary="The server's version")
    @answering
    async def version(request: Request) -> Response:
        body = msgspec.json.encode({"version": __version__})
        return Response(body, media_type="application/json")

    @router.get("/load", summary="Requests being answered")
    @answering
    async def load(request: Request) -> Response:
        body = msgspec.json.encode({"server_load": front.siblings.num_requests})
        return Response(body, media_type="application/json")

    if (series := front.metrics) is not None:

        @router.get("/metrics", summary="Prometheus metrics")
        @answering
        async def metrics(request: Request) -> Response:
            try:
                data = await front.siblings.metrics()
            except TimeoutError:  # a sum without it would go backwards
                raise UnavailableError(
                    "One of the server's HTTP processes does not tell its share", code="incomplete"
                ) from None
            return Response(data, headers={"Content-Type": series.content_type})

    return router
