"""What clients may send: one class per request body. Knows names, types and ranges of fields.

A field is either here, and acts; or in `NO_MEANING`, accepted because it carries no meaning here;
or in `REFUSED`, known and refused by name unless it asks for nothing; or unknown, and refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from octavo.engine.options import MAX_CHOICES

# Accepted and without effect: they concern OpenAI's accounts, storage and billing.
NO_MEANING: frozenset[str] = frozenset(
    {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
)

# Known fields we refuse -> the values that ask for nothing (null always does).
REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "early_stopping": (False,),
    "frequency_penalty_decay": (),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0, 1),
    "logprob_token_ids": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "prompt_embeds": (),
    "reasoning_effort": (),
    "repetition_detection": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncation_side": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    "web_search_options": (),
}

MAX_STOP_STRINGS = 32
MAX_STOP_CHARS = 1024
MAX_PROMPTS = 1024
MAX_TOTAL_CHOICES = 4096  # of a request: its prompts times the choices of each
MAX_BAD_WORDS = 128
_INT32 = 2**31 - 1
_INT64 = 2**63


def _integral(value: Any) -> Any:
    # JSON has one kind of number: 1.0 is an integer. "1" and true are not.
    return int(value) if type(value) is float and value.is_integer() else value


def _tokens_only(value: Any) -> Any:
    # One pass in C-speed Python: pydantic would report one error per token and member of a union.
    if isinstance(value, list) and not all(type(v) is int for v in value):
        bad = next(i for i, v in enumerate(value) if type(v) is not int)
        raise ValueError(f"must be token ids (integers), got {value[bad]!r} at position {bad}")
    return value


def _int64(value: int) -> int:
    if not -_INT64 <= value < _INT64:
        raise ValueError(f"must be a 64-bit integer, got {value!r:.40}")
    return value


def _seed(value: int) -> int:
    if not -_INT64 <= value < 2 * _INT64:
        raise ValueError(f"must be a 64-bit integer, signed or not, got {value!r:.40}")
    return value


Int = Annotated[int, BeforeValidator(_integral)]
Int64 = Annotated[int, BeforeValidator(_integral), AfterValidator(_int64)]
Seed = Annotated[int, BeforeValidator(_integral), AfterValidator(_seed)]
Number = Annotated[float, Field(allow_inf_nan=False)]
TokenIds = Annotated[list[int], BeforeValidator(_tokens_only)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


def _stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise ValueError(f"must be a string or a list of strings, got {value!r}"[:200])
    if len(stops) > MAX_STOP_STRINGS:
        raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings, got {len(stops)}")
    if any(not s or len(s) > MAX_STOP_CHARS for s in stops):
        raise ValueError(f"each stop string must have 1 to {MAX_STOP_CHARS} characters")
    return stops


class Body(BaseModel):
    """A JSON object whose unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _sort_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept: dict[str, Any] = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in REFUSED:
                if value is not None and value not in REFUSED[name]:
                    raise _refused(name, value)
            elif name not in NO_MEANING:
                kept[name] = value  # unknown: pydantic says so
        return kept


def _wrong(param: str, reason: str) -> PydanticCustomError:
    """A finding about `param` made by a check of the whole body."""
    return PydanticCustomError("wrong", "{reason}", {"param": param, "reason": reason})


def _refused(name: str, value: Any) -> PydanticCustomError:
    allowed = " or ".join([repr(v) for v in REFUSED[name]] + ["null"])
    return _wrong(name, f"{name} is not supported by this server: got {value!r:.80}, "
                  f"allowed is {allowed}")  # fmt: skip


class StreamOptions(BaseModel):
    """What a stream carries besides the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    include_obfuscation: Literal[False] | None = False

    @property
    def is_continuous(self) -> bool:
        """Whether every chunk carries the usage so far."""
        return bool(self.include_usage and self.continuous_usage_stats)


class Generation(Body):
    """What completions and chat have in common."""

    model: str | None = None
    n: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_stop)] = None
    seed: Seed | None = None

    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=-1, le=_INT32)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=1e-3, le=1e3)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    bad_words: Annotated[list[Name], Field(max_length=MAX_BAD_WORDS)] | None = None

    min_tokens: Annotated[Int, Field(ge=0, le=_INT32)] | None = 0
    ignore_eos: bool | None = False
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = False
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True

    prompt_logprobs: Annotated[Int, Field(ge=0)] | None = None
    truncate_prompt_tokens: Annotated[Int, Field(ge=-1, le=_INT32)] | None = None
    priority: Int64 | None = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    request_id: Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")] | None = None
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False
    return_spec_stats: bool | None = False

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options", "stream_options is only allowed with stream=true")
        if self.truncate_prompt_tokens == 0:
            raise _wrong(
                "truncate_prompt_tokens", "truncate_prompt_tokens must be -1 or at least 1, got 0"
            )
        return self


def _prompt(value: Any) -> Any:
    """Text, token ids, or a list of either (not mixed)."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if len(value) > MAX_PROMPTS and type(value[0]) is not int:
            raise ValueError(f"at most {MAX_PROMPTS} prompts per request, got {len(value)}")
        if all(isinstance(v, str) for v in value) or all(type(v) is int for v in value):
            return value
        if all(isinstance(v, list) and v and all(type(t) is int for t in v) for v in value):
            return value
    got = "an empty list" if value == [] else repr(value)[:80]
    raise ValueError(
        "must be a non-empty string, a list of strings, a list of token ids, or a list of "
        f"non-empty lists of token ids, got {got}"
    )


_TEXT, _IDS = {"type": "string"}, {"type": "array", "items": {"type": "integer"}}
# Checked by `_prompt` alone: pydantic would try each member of the union on every token.
PromptField = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_prompt),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": {"anyOf": [_TEXT, _IDS]}}, _IDS]}),
]


class CompletionRequest(Generation):
    """``POST /v1/completions``"""

    prompt: PromptField
    max_tokens: Annotated[Int, Field(ge=0, le=_INT32)] | None = None
    logprobs: Annotated[Int, Field(ge=0)] | None = None
    echo: bool | None = False
    best_of: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] | None = None
    add_special_tokens: bool | None = True

    @model_validator(mode="after")
    def _best_of_is_possible(self) -> CompletionRequest:
        if self.best_of is not None:
            if self.best_of < (self.n or 1):
                raise _wrong(
                    "best_of", f"best_of must be at least n={self.n or 1}, got {self.best_of}"
                )
            if self.stream and self.best_of > (self.n or 1):
                raise _wrong("best_of", "best_of greater than n cannot be streamed")
        return self


def _content(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"must be a string or a non-empty list of parts, got {value!r}"[:200])
    parts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal"):
            raise ValueError(f"parts of type {kind!r} are not supported; allowed is 'text'")
        if not isinstance(part.get(kind), str):
            raise ValueError(f"a part of type {kind!r} must have a string {kind!r}")
        parts.append({"type": "text", "text": part[kind]})
    return parts


Content = Annotated[str | list[dict[str, str]] | None, BeforeValidator(_content)]


class ChatMessage(BaseModel):
    """One message. Null or empty fields that clients copy from our answers are accepted."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = None
    name: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and self.refusal is None:
            raise ValueError(f"a message of role {self.role!r} must have content, got null")
        return self

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees."""
        content = self.refusal if self.content is None else self.content
        message: dict[str, Any] = {"role": self.role, "content": content}
        for key in ("name", "reasoning", "reasoning_content"):
            if (value := getattr(self, key)) is not None:
                message[key] = value
        return message


class ChatPrompt(Body):
    """Messages and how the template makes a prompt of them."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    add_generation_prompt: bool | None = None  # true unless the last message goes on
    continue_final_message: bool | None = False
    add_special_tokens: bool | None = False  # templates write them out themselves
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _go_on_or_answer(self) -> ChatPrompt:
        if self.continue_final_message and self.add_generation_prompt:
            raise _wrong(
                "continue_final_message",
                "continue_final_message and add_generation_prompt cannot both be true",
            )
        return self


class ChatCompletionRequest(ChatPrompt, Generation):
    """``POST /v1/chat/completions``"""

    max_tokens: Annotated[Int, Field(ge=1, le=_INT32)] | None = None
    max_completion_tokens: Annotated[Int, Field(ge=1, le=_INT32)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[Int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatCompletionRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise _wrong(
                "max_tokens",
                f"max_tokens={self.max_tokens} and max_completion_tokens="
                f"{self.max_completion_tokens} mean the same: give one",
            )
        if self.top_logprobs and not self.logprobs:
            raise _wrong("top_logprobs", "top_logprobs is only allowed with logprobs=true")
        return self


class TokenizeTextRequest(Body):
    """``POST /tokenize`` of a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(ChatPrompt):
    """``POST /tokenize`` of messages."""

    model: str | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(Body):
    """``POST /detokenize``"""

    model: str | None = None
    tokens: TokenIds
