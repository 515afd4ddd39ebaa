"""A generation's options by the names the HTTP API has, checked, to what the engine samples by.

Every front end goes through here: the HTTP API, after it has checked JSON's types and the limits
that protect a server, and `octavo.LLM`. Knows nothing of either.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.text.detokenizer import TextParams
from octavo.text.tokenizer import Tokenizer
from octavo.types import EngineInfo, SamplingParams

_MASK64 = 2**64 - 1
_TOP_P_OF_ONE_TOKEN = 1e-9  # what top_p=0 means: the most likely token alone
MAX_CHOICES = 128  # per prompt


class OptionError(ValueError):
    """An option that cannot be used; ``name`` is which."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


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
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
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
        _check_number("n", self.n, int, low=1, high=MAX_CHOICES)
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
        if self.allowed_token_ids is not None and not len(self.allowed_token_ids):
            reason = "allowed_token_ids must hold at least 1 token id, got none"
            raise OptionError("allowed_token_ids", reason)
        for token_id, bias in self.logit_bias.items():
            _check_number("logit_bias: a token id", token_id, int, low=0)
            _check_number("logit_bias: a bias", bias, float, low=-100, high=100)
        for name in ("stop", "bad_words"):
            words = (self.stop,) if name == "stop" and isinstance(self.stop, str) else None
            for word in words or getattr(self, name):
                if not isinstance(word, str) or not word:
                    raise OptionError(name, f"{name} must hold non-empty texts, got {word!r}")

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
        option = name.partition(":")[0]
        raise OptionError(option, f"{name} must be {what} {limits}, got {value!r}")


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
        names = [field.name for field in dataclasses.fields(cls)]
        found = {name: config[name] for name in names if config.get(name) is not None}
        options = {("max_tokens" if n == "max_new_tokens" else n): v for n, v in found.items()}
        try:
            GenerationOptions(**options)
        except ValueError as error:
            raise ValueError(f"generation_config.json: {error}") from None
        return cls(**found)


class SeedSource:
    """Seeds for requests that give none: unpredictable, or a sequence fixed by ``seed`` if it is
    not 0, so that a restarted engine answers the same requests the same way. ``number``: of the
    sequence, where there are several."""

    def __init__(self, seed: int = 0, *, number: int = 0) -> None:
        self._random = random.Random(seed + (number << 64)) if seed else None

    def draw(self) -> int:
        """64 random bits."""
        if self._random is not None:
            return self._random.getrandbits(64)
        return int.from_bytes(os.urandom(8), "little")


def sampling_params(
    options: GenerationOptions,
    *,
    max_tokens: int,
    seed: int,
    defaults: Defaults,
    info: EngineInfo,
    tokenizer: Tokenizer,
    max_logprobs: int,
) -> SamplingParams:
    """What the engine samples by. Raises `OptionError`.

    ``max_tokens`` and ``seed`` are what the front end has made of those in ``options``, which may
    depend on the prompt and the choice.
    """
    for name in ("logprobs", "prompt_logprobs"):
        _check_number(name, getattr(options, name), int, low=0, high=max_logprobs)
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        check_token_ids(getattr(options, name) or (), name=name, info=info)
    if options.min_tokens > max_tokens:
        raise OptionError(
            "min_tokens",
            f"min_tokens must be at most max_tokens={max_tokens}, got {options.min_tokens}",
        )

    def chosen(name: str) -> Any:
        value = getattr(options, name)
        return getattr(defaults, name) if value is None else value

    top_k, allowed = chosen("top_k"), options.allowed_token_ids
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=options.min_tokens,
        temperature=chosen("temperature"),
        top_k=0 if top_k < 0 or top_k >= info.vocab_size else top_k,
        top_p=chosen("top_p") or _TOP_P_OF_ONE_TOKEN,
        min_p=chosen("min_p"),
        presence_penalty=chosen("presence_penalty"),
        frequency_penalty=chosen("frequency_penalty"),
        repetition_penalty=chosen("repetition_penalty"),
        logit_bias=tuple(sorted(options.logit_bias.items())),
        allowed_token_ids=None if allowed is None else tuple(dict.fromkeys(allowed)),
        bad_words_token_ids=_bad_words(options.bad_words, tokenizer),
        seed=seed & _MASK64,
        ignore_eos=options.ignore_eos,
        eos_token_ids=info.eos_token_ids,
        stop_token_ids=tuple(dict.fromkeys(options.stop_token_ids)),
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
    )
    _check_something_is_allowed(params)
    return params


def _check_something_is_allowed(params: SamplingParams) -> None:
    """Raises `OptionError` if no token could ever be the first; what depends on the tokens before
    (longer bad words) only the sampler can tell."""
    forbidden = {word[0] for word in params.bad_words_token_ids if len(word) == 1}
    if params.min_tokens:
        forbidden.update(params.eos_token_ids, params.stop_token_ids)
    if params.allowed_token_ids is not None and forbidden.issuperset(params.allowed_token_ids):
        raise OptionError(
            "allowed_token_ids",
            "allowed_token_ids leaves no token to choose: bad_words and min_tokens forbid all "
            f"{len(params.allowed_token_ids)} of them",
        )


def check_token_ids(ids: Iterable[int], *, name: str, info: EngineInfo) -> None:
    """Raises `OptionError` for the first that is no token id of the model."""
    size = info.vocab_size
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < size:
            raise OptionError(
                name, f"{name}: token ids must be from 0 to {size - 1}, got {token_id!r}"
            )


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
    the others, as near seeds must not give near streams."""
    if index == 0:
        return seed & _MASK64
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
