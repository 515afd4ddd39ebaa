"""Templates rendered as transformers renders them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from octavo.text.chat_template import ChatTemplate, ChatTemplateError, find_template

# Each uses what families of real templates use.
CHATML = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are kind<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
ALTERNATING = """{{ bos_token }}{% set ns = namespace(system='') %}
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% set ns.system = message['content'] %}
        {% continue %}
    {% endif %}
    {% if message['role'] not in ['user', 'assistant'] %}
        {{ raise_exception('only user and assistant may speak, not ' + message['role']) }}
    {% endif %}
    {% if message['role'] == 'user' %}
[INST] {{ ns.system }} {{ message['content'] | trim }} [/INST]
    {% else %}
{% generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}"""
PARTS = """{% for message in messages %}<{{ message.role }}>
{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}
</{{ message.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
EITHER = """{% macro text(content) %}{% if content is string %}{{ content }}{% else %}
{%- for part in content %}{{ part.text }}{% endfor %}{% endif %}{% endmacro %}
{% for message in messages %}{{ message.role }}: {{ text(message.content) }}
{% endfor %}"""
JSON = """{% for message in messages %}{{ message | tojson }}
{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{% endfor %}{{ style | default('plain') }}"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be <brief> & 'kind'"}, {"role": "user", "content": " Hi \n"}],
    [
        {"role": "user", "content": 'naïve 日本 "quoted"'},
        {"role": "assistant", "content": "Yes. "},
        {"role": "user", "content": "Why?"},
    ],
]


def reference(source: str, chat: list[dict[str, Any]], **options: Any) -> str:
    variables: Any = {**TOKENS, **options}
    rendered: Any = render_jinja_template([chat], chat_template=source, **variables)
    text: str = rendered[0][0]
    return text


@pytest.mark.parametrize("source", [CHATML, ALTERNATING, EITHER, JSON])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_as_transformers(source: str, chat: Any, prompt: bool) -> None:
    ours = ChatTemplate(source, special_tokens=TOKENS).render(chat, add_generation_prompt=prompt)
    assert ours == reference(source, chat, add_generation_prompt=prompt)


@pytest.mark.parametrize("source", [CHATML, ALTERNATING, EITHER])
@pytest.mark.parametrize("end", ["Yes", "Yes ", " Yes\n"])
def test_going_on(source: str, end: str) -> None:
    chat = [*CHATS[2][:1], {"role": "assistant", "content": end}]
    ours = ChatTemplate(source, special_tokens=TOKENS).render(chat, continue_final_message=True)
    assert ours == reference(source, chat, continue_final_message=True)


def test_kwargs() -> None:
    ours = ChatTemplate(JSON).render(CHATS[0], kwargs={"style": "fancy"})
    assert ours == reference(JSON, CHATS[0], style="fancy") and ours.endswith("fancy")
    # What the request says elsewhere is not to be overridden.
    assert "Hi" in ChatTemplate(JSON).render(CHATS[0], kwargs={"messages": []})


def test_contents_are_given_as_the_template_wants_them() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("one", "two")]}]
    whole = [{"role": "user", "content": "one\ntwo"}]
    assert ChatTemplate(CHATML).render(parts) == ChatTemplate(CHATML).render(whole)
    assert ChatTemplate(EITHER).render(parts) == reference(EITHER, parts)
    assert ChatTemplate(PARTS).render(parts) == reference(PARTS, parts, add_generation_prompt=True)
    text = [{"role": "user", "content": "one"}]
    wrapped = [{"role": "user", "content": [{"type": "text", "text": "one"}]}]
    assert ChatTemplate(PARTS).render(text) == ChatTemplate(PARTS).render(wrapped)
    assert "one" in ChatTemplate(PARTS).render(text)
    going_on = ChatTemplate(PARTS).render(wrapped, continue_final_message=True)
    assert going_on == reference(PARTS, wrapped, continue_final_message=True)


def test_developers_are_heard() -> None:
    chat = [{"role": "developer", "content": "Be brief"}, *CHATS[0]]
    system = [{"role": "system", "content": "Be brief"}, *CHATS[0]]
    assert ChatTemplate(ALTERNATING).render(chat) == ChatTemplate(ALTERNATING).render(system)
    knows = "{# developer #}" + CHATML
    assert "<|im_start|>developer\nBe brief" in ChatTemplate(knows).render(chat)


def test_time(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{{ strftime_now('%Y') }}{{ messages[0].content }}"
    assert ChatTemplate(source).render(CHATS[0]) == reference(source, CHATS[0])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (ALTERNATING, "only user and assistant may speak, not tool"),
        ("{{ messages[0].content + 5 }}", "cannot render"),
        ("{{ messages[9].content.x }}", "has no element 9"),
        ("{{ messages[0].__class__.__mro__ }}{{ 1 / 0 }}", "says|cannot"),
        ("{% for i in range(100000000) %}x{% endfor %}", "too big|Range"),
    ],
)
def test_errors_are_the_clients(source: str, says: str) -> None:
    template = ChatTemplate(source)
    with pytest.raises(ChatTemplateError, match=says):
        template.render([{"role": "tool", "content": "x"}])


def test_the_sandbox_holds() -> None:
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
    ):
        with pytest.raises(ChatTemplateError):
            ChatTemplate(source).render(list(CHATS[0]))


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert find_template("{{ x }}", folder=None, config={}) == "{{ x }}"
    file = tmp_path / "mine.jinja"
    file.write_text("from a file")
    assert find_template(str(file), folder=None, config={}) == "from a file"
    with pytest.raises(ValueError, match="chat_template must be a readable file"):
        find_template("nowhere.jinja", folder=None, config={})
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert find_template(None, folder=tmp_path, config={"chat_template": named}) == "a"
    assert find_template(None, folder=tmp_path, config={}) is None
    (tmp_path / "chat_template.json").write_text('{"chat_template": "c"}')
    assert find_template(None, folder=tmp_path, config={"chat_template": "d"}) == "c"
    (tmp_path / "chat_template.jinja").write_text("e")
    assert find_template(None, folder=tmp_path, config={"chat_template": "d"}) == "e"
    with pytest.raises(ValueError, match="does not compile"):
        ChatTemplate("{% if %}")
