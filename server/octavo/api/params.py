"""From a request's fields to what the engine samples by. Knows defaults, limits and seeds."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from octavo.api.errors import ApiError, from_validation, shown
from octavo.api.schemas import Generation
from octavo.text.detokenizer import TextParams
from octavo.types import SamplingParams

if TYPE_CHECKING:
    from octavo.api.front import Front

_N = TypeVar("_N", int, float)
_MASK64 = 2**64 - 1
_TOP_P_OF_ONE_TOKEN = 1e-9  # what top_p=0 means: the most likely token alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Sampling values of requests that give none; the model's author may have chosen them."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> Defaults:
        """From the content of generation_config.json; what is not there or null is neutral.
        Raises ValueError for what no request may ask for either."""
        found = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        for name, value in found.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"generation_config.json: {name} must be a number, got {value!r}")
        values = {name: value for name, value in found.items() if name in Generation.model_fields}
        try:
            Generation.model_validate(values)
        except ValidationError as error:
            raise ValueError(f"generation_config.json: {from_validation(error)}") from error
        return cls(**found)


class SeedSource:
    """Seeds for requests that give none: unpredictable, or a sequence fixed by ``seed`` if it is
    not 0, so that a restarted server answers the same requests the same way."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed) if seed else None

    def draw(self) -> int:
        """64 random bits."""
        if self._random is not None:
            return self._random.getrandbits(64)
        return int.from_bytes(os.urandom(8), "little")


def choice_seed(seed: int, index: int) -> int:
    """The seed of one of ``n`` choices. Choice 0 has the request's own, so that it is what n=1
    gives; the others are mixed (splitmix64), as near seeds must not give near streams."""
    if index == 0:
        return seed & _MASK64
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def text_params(body: Generation) -> TextParams:
    """How the tokens of each choice become text."""
    return TextParams(
        stop=tuple(body.stop or ()),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        min_tokens=body.min_tokens or 0,
        skip_special_tokens=body.skip_special_tokens is not False,
        spaces_between_special_tokens=body.spaces_between_special_tokens is not False,
    )


def sampling_params(
    front: Front, body: Generation, *, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """All but ``max_tokens`` and ``seed``, which depend on the prompt and choice. Raises
    `ApiError`."""
    defaults = front.defaults
    stop_token_ids = tuple(dict.fromkeys(body.stop_token_ids or ()))
    front.check_token_ids(stop_token_ids, param="stop_token_ids")
    front.check_token_ids(body.allowed_token_ids, param="allowed_token_ids")
    _check_logprobs(front, logprobs, param="logprobs")
    _check_logprobs(front, prompt_logprobs, param="prompt_logprobs")
    if body.priority and front.scheduler.scheduling_policy != "priority":
        raise ApiError(
            f"priority must be 0 under the server's scheduling policy "
            f"{front.scheduler.scheduling_policy!r}, got {body.priority}",
            param="priority",
        )
    allowed = body.allowed_token_ids
    top_k = _given(body.top_k, defaults.top_k)
    return SamplingParams(
        min_tokens=body.min_tokens or 0,
        temperature=_given(body.temperature, defaults.temperature),
        top_k=0 if top_k == -1 or top_k >= front.engine.info.vocab_size else top_k,
        top_p=_given(body.top_p, defaults.top_p) or _TOP_P_OF_ONE_TOKEN,
        min_p=_given(body.min_p, defaults.min_p),
        presence_penalty=_given(body.presence_penalty, defaults.presence_penalty),
        frequency_penalty=_given(body.frequency_penalty, defaults.frequency_penalty),
        repetition_penalty=_given(body.repetition_penalty, defaults.repetition_penalty),
        logit_bias=_logit_bias(front, body.logit_bias),
        allowed_token_ids=None if allowed is None else tuple(dict.fromkeys(allowed)),
        bad_words_token_ids=_bad_words(front, body.bad_words),
        ignore_eos=bool(body.ignore_eos),
        eos_token_ids=front.engine.info.eos_token_ids,
        stop_token_ids=stop_token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _given(value: _N | None, default: _N) -> _N:
    return default if value is None else value


def _check_logprobs(front: Front, count: int | None, *, param: str) -> None:
    limit = front.model.max_logprobs
    if count is not None and count > limit:
        raise ApiError(
            f"at most {limit} {param} per token are possible on this server, got {count}",
            param=param,
        )


def _logit_bias(front: Front, bias: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    if not bias:
        return ()
    for token in bias:
        digits = token.removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
            raise ApiError(
                f"logit_bias: keys must be token ids, got {shown(token)}", param="logit_bias"
            )
    pairs = {int(token): value for token, value in bias.items()}
    front.check_token_ids(tuple(pairs), param="logit_bias")
    return tuple(sorted(pairs.items()))


def _bad_words(front: Front, words: list[str] | None) -> tuple[tuple[int, ...], ...]:
    """Each word as it is spelled at the start of a text and after a space."""
    banned: dict[tuple[int, ...], None] = {}
    for word in words or ():
        for spelled in (word, f" {word.lstrip()}"):
            ids = tuple(front.tokenizer.encode(spelled, add_special_tokens=False))
            if ids:
                banned[ids] = None
    return tuple(banned)
