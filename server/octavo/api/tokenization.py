"""``POST /tokenize`` and ``/detokenize``, in vLLM's shapes. Knows no engine."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.api.front import Front
from octavo.api.prompts import encode, render_chat
from octavo.api.request_body import answering, documented, read_json, read_model
from octavo.api.schemas import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest


def routes(front: Front) -> APIRouter:
    """The endpoints, for one front end."""
    router = APIRouter()

    @router.post(
        "/tokenize",
        summary="Token ids of a text or a conversation",
        openapi_extra=documented(TokenizeTextRequest, TokenizeChatRequest),
    )
    @answering
    async def tokenize(request: Request) -> Response:
        data = await read_json(request, limit=front.server.max_body_bytes)
        body: TokenizeTextRequest | TokenizeChatRequest
        if isinstance(data, dict) and "messages" in data:
            body = TokenizeChatRequest.model_validate(data)
            front.check_model(body.model)
            ids = await render_chat(front, body)
        else:
            body = TokenizeTextRequest.model_validate(data)
            front.check_model(body.model)
            with_special = body.add_special_tokens is not False
            ids = await encode(front, body.prompt, add_special_tokens=with_special)
        answer: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": front.engine.info.max_model_len,
            "tokens": ids,
            "token_strs": None,
        }
        if body.return_token_strs:
            answer["token_strs"] = [front.tokenizer.token(i) for i in ids]
        return Response(msgspec.json.encode(answer), media_type="application/json")

    @router.post(
        "/detokenize", summary="Text of token ids", openapi_extra=documented(DetokenizeRequest)
    )
    @answering
    async def detokenize(request: Request) -> Response:
        body = await read_model(request, DetokenizeRequest, limit=front.server.max_body_bytes)
        front.check_model(body.model)
        front.check_token_ids(body.tokens, param="tokens")
        text = front.tokenizer.decode(body.tokens, skip_special_tokens=False)
        return Response(msgspec.json.encode({"prompt": text}), media_type="application/json")

    return router
