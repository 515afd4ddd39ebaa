"""From a request's fields to what the engine samples by. Knows the fields' names; what they mean
and may be is `octavo.engine.options`'."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from octavo.api.errors import ApiError, shown
from octavo.api.schemas import Generation
from octavo.engine.options import GenerationOptions, OptionError, sampling_params
from octavo.types import SamplingParams

if TYPE_CHECKING:
    from octavo.api.front import Front

# Those that mean the same in every body, by the same names.
_SAME = {field.name for field in dataclasses.fields(GenerationOptions)} - {
    "logit_bias",
    "logprobs",
    "max_tokens",
    "n",
    "prompt_logprobs",
}


def generation_options(
    front: Front, body: Generation, *, logprobs: int | None, prompt_logprobs: int | None
) -> GenerationOptions:
    """The options a body gives, but for how much and how many. Raises `ApiError`."""
    is_chat = hasattr(body, "top_logprobs")
    _check_logprobs(front, logprobs, param="top_logprobs" if is_chat else "logprobs")
    _check_logprobs(front, prompt_logprobs, param="prompt_logprobs")
    given = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    try:
        return GenerationOptions(
            logit_bias=_logit_bias(body.logit_bias),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **given,
        )
    except OptionError as error:
        raise ApiError(str(error), param=error.name) from error


def params_of(
    front: Front, options: GenerationOptions, *, max_tokens: int, seed: int
) -> SamplingParams:
    """For the first choice of a prompt. Raises `ApiError`."""
    try:
        return sampling_params(
            options,
            max_tokens=max_tokens,
            seed=seed,
            defaults=front.defaults,
            info=front.engine.info,
            tokenizer=front.tokenizer,
            max_logprobs=front.model.max_logprobs,
        )
    except OptionError as error:
        raise ApiError(str(error), param=error.name) from error


def check_priority(front: Front, body: Generation) -> None:
    """Raises `ApiError` for a priority that the server would not look at."""
    if body.priority and front.scheduler.scheduling_policy != "priority":
        raise ApiError(
            f"priority must be 0 under the server's scheduling policy "
            f"{front.scheduler.scheduling_policy!r}, got {body.priority}",
            param="priority",
        )


def _check_logprobs(front: Front, count: int | None, *, param: str) -> None:
    limit = front.model.max_logprobs
    if count is not None and count > limit:
        raise ApiError(
            f"at most {limit} {param} per token are possible on this server, got {count}",
            param=param,
        )


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float]:
    for token in bias or ():
        digits = token.removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
            raise ApiError(
                f"logit_bias: keys must be token ids, got {shown(token)}", param="logit_bias"
            )
    return {int(token): value for token, value in (bias or {}).items()}
