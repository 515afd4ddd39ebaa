"""``GET /v1/models``. Knows the served names."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.api.front import Front
from octavo.api.request_body import answering


def routes(front: Front) -> APIRouter:
    """The endpoints, for one front end."""
    router = APIRouter()

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": front.created,
            "owned_by": "octavo",
            "root": front.model.model or front.engine.info.model,
            "parent": None,
            "max_model_len": front.engine.info.max_model_len,
            "quantization": front.engine.info.quantization,
            "permission": [],
        }

    @router.get("/v1/models", summary="Models served")
    @answering
    async def list_models(request: Request) -> Response:
        cards = [card(name) for name in front.model_names]
        body = msgspec.json.encode({"object": "list", "data": cards})
        return Response(body, media_type="application/json")

    # A path, as names such as org/model have slashes.
    @router.get("/v1/models/{model_id:path}", summary="One model")
    @answering
    async def get_model(request: Request) -> Response:
        name = front.check_model(request.path_params["model_id"])
        return Response(msgspec.json.encode(card(name)), media_type="application/json")

    return router
