"""A generation's options by the names the HTTP API has, checked, to what the engine samples by.

For callers inside the process (`octavo.LLM`); the HTTP front end has its own, with JSON's types.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.text.detokenizer import TextParams
from octavo.text.tokenizer import Tokenizer
from octavo.types import EngineInfo, SamplingParams

_MASK64 = 2**64 - 1
_MAX_N = 128
# Sampling values that a model's generation_config.json may choose.
_MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """Everything that can be asked of one prompt. None: the model's default, or no limit."""

    n: int = 1
    max_tokens: int | None = None  # None: 16, or for a chat what is left of the context
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    seed: int | None = None
    ignore_eos: bool = False
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> GenerationOptions:
        """Raises ValueError for a name that is none of the fields, or a value out of bounds."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"unknown option {name!r}{hint}")
        return cls(**given)

    def __post_init__(self) -> None:
        _check_number("n", self.n, int, low=1, high=_MAX_N)
        _check_number("max_tokens", self.max_tokens, int, low=0)
        _check_number("min_tokens", self.min_tokens, int, low=0)
        _check_number("temperature", self.temperature, float, low=0, high=2)
        _check_number("top_k", self.top_k, int, low=-1)
        _check_number("top_p", self.top_p, float, low=0, high=1)
        _check_number("min_p", self.min_p, float, low=0, high=1)
        _check_number("presence_penalty", self.presence_penalty, float, low=-2, high=2)
        _check_number("frequency_penalty", self.frequency_penalty, float, low=-2, high=2)
        _check_number("repetition_penalty", self.repetition_penalty, float, low=1e-3, high=1e3)
        _check_number("seed", self.seed, int, low=-(2**63), high=_MASK64)
        _check_number("logprobs", self.logprobs, int, low=0)
        _check_number("prompt_logprobs", self.prompt_logprobs, int, low=0)
        for token_id, bias in self.logit_bias.items():
            _check_number("logit_bias: a token id", token_id, int, low=0)
            _check_number("logit_bias: a bias", bias, float, low=-100, high=100)
        for name in ("stop", "bad_words"):
            words = (self.stop,) if name == "stop" and isinstance(self.stop, str) else None
            for word in words or getattr(self, name):
                if not isinstance(word, str) or not word:
                    raise ValueError(f"{name} must hold non-empty texts, got {word!r}")

    def text_params(self) -> TextParams:
        """How tokens become text."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return TextParams(
            stop=stop,
            include_stop_str_in_output=self.include_stop_str_in_output,
            min_tokens=self.min_tokens,
            skip_special_tokens=self.skip_special_tokens,
            spaces_between_special_tokens=self.spaces_between_special_tokens,
        )


def _check_number(
    name: str,
    value: Any,
    kind: type,
    *,
    low: float = -math.inf,
    high: float = math.inf,
) -> None:
    if value is None:
        return
    allowed = (int, float) if kind is float else (int,)
    is_number = isinstance(value, allowed) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        what = "a number" if kind is float else "a whole number"
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} must be {what} {limits}, got {value!r}")


def sampling_params(
    options: GenerationOptions,
    *,
    num_prompt_tokens: int,
    default_max_tokens: int,
    model_defaults: Mapping[str, Any],
    info: EngineInfo,
    tokenizer: Tokenizer,
    max_logprobs: int,
    draw_seed: Callable[[], int] = lambda: int.from_bytes(os.urandom(8), "little"),
) -> SamplingParams:
    """For choice 0 of a prompt of ``num_prompt_tokens``. Raises ValueError.

    ``model_defaults``: the content of generation_config.json, or nothing.
    """
    chosen = {
        name: value if (value := getattr(options, name)) is not None else model_defaults.get(name)
        for name in _MODEL_DEFAULTS
    }
    room = info.max_model_len - num_prompt_tokens
    max_tokens = options.max_tokens if options.max_tokens is not None else default_max_tokens
    if options.max_tokens is not None and max_tokens > room:
        raise ValueError(
            f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, more than "
            f"the context of {info.max_model_len} in all"
        )
    for name in ("logprobs", "prompt_logprobs"):
        _check_number(name, getattr(options, name), int, low=0, high=max_logprobs)
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        check_token_ids(getattr(options, name) or (), name=name, info=info)
    top_k = chosen["top_k"] or 0
    return SamplingParams(
        max_tokens=min(max_tokens, max(room, 0)),
        min_tokens=options.min_tokens,
        temperature=1.0 if chosen["temperature"] is None else chosen["temperature"],
        top_k=0 if top_k < 0 or top_k >= info.vocab_size else top_k,
        top_p=1.0 if chosen["top_p"] is None else chosen["top_p"] or 1e-9,
        min_p=chosen["min_p"] or 0.0,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        repetition_penalty=chosen["repetition_penalty"] or 1.0,
        logit_bias=tuple(sorted(options.logit_bias.items())),
        allowed_token_ids=(
            None
            if options.allowed_token_ids is None
            else tuple(dict.fromkeys(options.allowed_token_ids))
        ),
        bad_words_token_ids=_bad_words(options.bad_words, tokenizer),
        seed=(draw_seed() if options.seed is None else options.seed) & _MASK64,
        ignore_eos=options.ignore_eos,
        eos_token_ids=info.eos_token_ids,
        stop_token_ids=tuple(dict.fromkeys(options.stop_token_ids)),
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
    )


def check_token_ids(ids: Any, *, name: str, info: EngineInfo) -> None:
    """Raises ValueError for the first that is no token id of the model."""
    for token_id in ids:
        _check_number(name, token_id, int, low=0, high=info.vocab_size - 1)


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it is spelled at the start of a text and after a space."""
    banned: dict[tuple[int, ...], None] = {}
    for word in words:
        for spelled in (word, f" {word.lstrip()}"):
            if ids := tuple(tokenizer.encode(spelled, add_special_tokens=False)):
                banned[ids] = None
    return tuple(banned)


def choice_seed(seed: int, index: int) -> int:
    """The seed of one of ``n`` choices: the request's own for the first, mixed (splitmix64) for
    the others, as near seeds must not give near streams. The HTTP API draws the same."""
    if index == 0:
        return seed & _MASK64
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
