"""Messages to the text a model was trained on. Knows Jinja templates; no tokens, no requests.

A template is a program from a stranger: it runs in Jinja's immutable sandbox, and its length of
output is bounded by the request's own size limit, not here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]

_PROBE = "octavoprobe"
# Ends with a space: whether it survives tells if the template trims messages.
_CUT = "octavo_cut_here "


class ChatTemplateError(ValueError):
    """These messages cannot be rendered; the text is for the client."""


class _Generation(Extension):
    """``{% generation %}`` marks assistant text for training; here it is transparent."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Macro) -> str:
        return str(caller())


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    return env


def find_template(
    given: str | None, *, folder: Path | None, config: Mapping[str, Any]
) -> str | None:
    """The template's source: ``given`` (a file, or the template itself), else the model folder's
    chat_template.jinja or chat_template.json, else tokenizer_config.json's. Raises ValueError."""
    if given is not None:
        if any(mark in given for mark in ("{{", "{%", "{#", "\n")):
            return given
        try:
            return Path(given).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"chat_template must be a readable file or a Jinja template, got {given!r}: {error}"
            ) from error
    if folder is not None:
        if (file := folder / "chat_template.jinja").is_file():
            return file.read_text("utf-8")
        if (file := folder / "chat_template.json").is_file():
            named = json.loads(file.read_text("utf-8")).get("chat_template")
            return named if isinstance(named, str) else None
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        found = {t.get("name"): t.get("template") for t in found}.get("default")
    return found if isinstance(found, str) else None


class ChatTemplate:
    """A compiled template with the special tokens it may name."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str] | None = None) -> None:
        """``special_tokens``: ``bos_token`` and the like, by name. Raises ValueError."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.exceptions.TemplateError as error:
            raise ValueError(f"the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens or {})
        self._takes_developer = "developer" in source
        self._takes_strings = self._shows_probe(_PROBE)
        self._takes_parts = self._shows_probe([{"type": "text", "text": _PROBE}])

    def _shows_probe(self, content: Any) -> bool:
        """Whether the template prints the text of such a content, and not its Python form."""
        try:
            text = self._run([{"role": "user", "content": content}], add_generation_prompt=False)
        except ChatTemplateError:
            return False
        return _PROBE in text and f"'{_PROBE}'" not in text and f'"{_PROBE}"' not in text

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. Contents are strings or lists of ``{"type": "text", "text": ...}``.

        ``continue_final_message``: the text stops where the last message's content does. Raises
        `ChatTemplateError`.
        """
        shaped = [self._shaped(m) for m in messages]
        if not continue_final_message:
            return self._run(shaped, add_generation_prompt=add_generation_prompt, kwargs=kwargs)
        return self._cut_after_last(shaped, kwargs=kwargs)

    def _shaped(self, message: Message) -> dict[str, Any]:
        shaped = dict(message)
        if shaped.get("role") == "developer" and not self._takes_developer:
            shaped["role"] = "system"  # what the role was called when such templates were written
        content = shaped.get("content")
        if isinstance(content, str) and self._takes_parts and not self._takes_strings:
            shaped["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, list) and not self._takes_parts:
            shaped["content"] = "\n".join(part["text"] for part in content)
        return shaped

    def _cut_after_last(
        self, messages: list[dict[str, Any]], *, kwargs: Mapping[str, Any] | None
    ) -> str:
        last = messages[-1]
        content = last.get("content")
        if isinstance(content, str):
            last["content"] = content + _CUT
        elif isinstance(content, list) and content:
            end = content[-1]
            last["content"] = [*content[:-1], {**end, "text": end["text"] + _CUT}]
        else:
            raise ChatTemplateError("continue_final_message: the last message has no text")
        text = self._run(messages, add_generation_prompt=False, kwargs=kwargs)
        at = text.rfind(_CUT.rstrip())
        if at < 0:
            raise ChatTemplateError(
                "continue_final_message: the model's chat template does not show the last message"
            )
        # A template that trims messages would have trimmed this one's end as well.
        return text[:at] if text.startswith(_CUT, at) else text[:at].rstrip()

    def _run(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        variables = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **(kwargs or {}),
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(variables)
        except jinja2.exceptions.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template says: {error}") from error
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise ChatTemplateError(
                f"the model's chat template cannot render these messages: {error}"
            ) from error
