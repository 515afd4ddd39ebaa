"""From a request's prompt to token ids that fit the context. Knows text and lengths only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from octavo.api.errors import ApiError, ContextLengthError
from octavo.api.front import Front
from octavo.api.schemas import ChatPrompt, CompletionRequest, Generation
from octavo.text.chat_template import ChatTemplateError


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the model reads, and how much it may write."""

    token_ids: tuple[int, ...]
    text: str | None  # as the client wrote it; None for token ids or if truncated
    max_tokens: int


async def render_chat(front: Front, body: ChatPrompt) -> list[int]:
    """Token ids of the messages in the model's chat template. Raises `ApiError`."""
    if front.template is None:
        raise ApiError(
            "This model has no chat template: use /v1/completions, or start the server with "
            "--chat-template",
            param="messages",
            code="no_chat_template",
        )
    go_on = bool(body.continue_final_message)
    try:
        text = front.template.render(
            [message.for_template() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt is not False and not go_on,
            continue_final_message=go_on,
            kwargs=body.chat_template_kwargs,
        )
    except ChatTemplateError as error:
        raise ApiError(str(error), param="messages", code="chat_template_error") from error
    _refuse_early(front, body, text, param="messages")
    return await encode(front, text, add_special_tokens=bool(body.add_special_tokens))


async def encode(front: Front, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of ``text``. Raises `ApiError` for text that has none that UTF-8 can carry."""
    try:
        return await front.tokenizer.encode_async(text, add_special_tokens=add_special_tokens)
    except UnicodeEncodeError as error:  # a lone surrogate
        raise ApiError(f"The text is not valid Unicode: {error.reason}") from error


def is_batch(given: str | Sequence[Any]) -> bool:
    """Whether a completions request's ``prompt`` is a list of prompts."""
    return not isinstance(given, str) and not isinstance(given[0], int)


async def completion_prompts(front: Front, body: CompletionRequest) -> list[Prompt]:
    """Every prompt of a completions request. Raises `ApiError`."""
    given = body.prompt
    texts: list[str] = []
    lists: list[list[int]] = []
    if isinstance(given, str):
        texts = [given]
    elif isinstance(given[0], int):
        lists = [given]
    elif isinstance(given[0], str):
        texts = given
    else:
        lists = given
    for ids in lists:
        front.check_token_ids(ids, param="prompt")
    prompts = [fit(front, body, ids, text=None, max_tokens=body.max_tokens) for ids in lists]
    for text in texts:
        _refuse_early(front, body, text, param="prompt")
        ids = await encode(front, text, add_special_tokens=body.add_special_tokens is not False)
        prompts.append(fit(front, body, ids, text=text, max_tokens=body.max_tokens))
    return prompts


def _refuse_early(
    front: Front, body: ChatPrompt | CompletionRequest, text: str, *, param: str
) -> None:
    """Megabytes that cannot fit are refused before a core is busy with them for seconds."""
    least, limit = front.tokenizer.least_tokens(text), front.engine.info.max_model_len
    is_cut = getattr(body, "truncate_prompt_tokens", None) is not None
    if least > limit and isinstance(body, Generation) and not is_cut:
        raise ContextLengthError(
            f"The model's context length is {limit} tokens; the prompt has {len(text)} "
            f"characters, which are at least {least} tokens",
            param=param,
        )


def fit(
    front: Front,
    body: ChatPrompt | CompletionRequest,
    token_ids: Sequence[int],
    *,
    text: str | None,
    max_tokens: int | None,
) -> Prompt:
    """The prompt with the tokens it may generate. ``max_tokens`` None: 16 for completions, what
    is left of the context for chat. Raises `ContextLengthError` and `ApiError`."""
    param = "messages" if isinstance(body, ChatPrompt) else "prompt"
    limit = front.engine.info.max_model_len
    least = 1 if max_tokens is None else max_tokens
    keep = getattr(body, "truncate_prompt_tokens", None)
    if keep is not None:
        keep = limit - least if keep == -1 else keep
        if keep > limit:
            raise ApiError(
                f"truncate_prompt_tokens must be at most the context length {limit}, got {keep}",
                param="truncate_prompt_tokens",
            )
        if 0 < keep < len(token_ids):
            token_ids, text = token_ids[len(token_ids) - keep :], None
    length = len(token_ids)
    if not length:
        raise ApiError(f"{param} is empty: it has no tokens", param=param)
    if length + min(least, 1) > limit:
        raise ContextLengthError(
            f"The model's context length is {limit} tokens; the prompt has {length} tokens, "
            "which leaves no room to generate",
            param=param,
        )
    if length + least > limit:
        raise ContextLengthError(
            f"The model's context length is {limit} tokens; the prompt has {length} tokens and "
            f"{least} were asked for (max_tokens), {length + least} in all",
            param="max_tokens",
        )
    if max_tokens is None:
        usual = front.defaults.max_new_tokens
        if usual is None:
            usual = limit if isinstance(body, ChatPrompt) else 16
        max_tokens = min(usual, limit - length)
    return Prompt(token_ids=tuple(token_ids), text=text, max_tokens=max_tokens)
