"""The default model's tokenizer and template, against transformers on the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from octavo.api.app import load_template
from octavo.text.detokenizer import make_decoder
from octavo.text.tokenizer import Tokenizer

PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"


@pytest.fixture(scope="module")
def reference(smollm2: Tokenizer) -> Any:
    return AutoTokenizer.from_pretrained(str(smollm2.folder))


def test_real_texts(smollm2: Tokenizer, reference: Any) -> None:
    for line in PROMPTS.read_text("utf-8").splitlines():
        ids = smollm2.encode(line)
        assert ids == reference.encode(line)
        decoder = make_decoder(smollm2)
        assert "".join(decoder.push(i) for i in ids) + decoder.flush() == line


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_tokens_streamed(smollm2: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, smollm2.vocab_size - 1), max_size=30))
    for skip in (True, False):
        decoder = make_decoder(smollm2, skip_special_tokens=skip)
        streamed = "".join(decoder.push(i) for i in ids) + decoder.flush()
        assert streamed == smollm2.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=50))
def test_any_text_streamed(smollm2: Tokenizer, text: str) -> None:
    ids = smollm2.encode(text)
    decoder = make_decoder(smollm2, skip_special_tokens=False)
    pieces = [*(decoder.push(i) for i in ids), decoder.flush()]
    whole = smollm2.decode(ids, skip_special_tokens=False)
    assert "".join(pieces) == whole
    if "\ufffd" not in whole:  # some bytes are not in the vocabulary
        assert not any("\ufffd" in piece for piece in pieces)


def test_template(smollm2: Tokenizer, reference: Any) -> None:
    template = load_template(smollm2, given=None)
    assert template is not None
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi <b>there</b>\n"},
        {"role": "assistant", "content": "Hello"},
    ]
    for chat in (messages, messages[1:], messages[1:2]):
        for prompt in (True, False):
            ours = template.render(chat, add_generation_prompt=prompt)
            theirs = reference.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=prompt
            )
            assert ours == theirs
    ours = template.render(messages, continue_final_message=True)
    assert ours == reference.apply_chat_template(
        messages, tokenize=False, continue_final_message=True
    )
