"""Text from tokens one by one must be the text of all of them, however they arrive."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from octavo.text.detokenizer import (
    ByteDecoder,
    ContextDecoder,
    Detokenizer,
    StopFinder,
    TextParams,
    make_decoder,
)
from octavo.text.tokenizer import Tokenizer

CORPUS = [
    "The capital of France is Paris. Hello world, hello there! Stop here and there.",
    "naïve café übergroß 日本語 emoji 😀 and so on, one two three four five six",
] * 4
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>"]


def byte_level() -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return Tokenizer(backend)


def sentencepiece_like() -> Tokenizer:
    """As Llama 2's: spaces as U+2581, characters outside the vocabulary as bytes."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS[0]], trainer)
    saved = json.loads(backend.to_str())  # bytes are plain members of the vocabulary
    saved["added_tokens"] = [t for t in saved["added_tokens"] if t["content"] in SPECIAL]
    return Tokenizer(Backend.from_str(json.dumps(saved)))


def word_piece() -> Tokenizer:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return Tokenizer(backend)


BYTES, SPM, WORDS = byte_level(), sentencepiece_like(), word_piece()


def stream(tokenizer: Tokenizer, ids: Sequence[int], **options: Any) -> list[str]:
    decoder = make_decoder(tokenizer, **options)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40)


def test_the_right_decoder() -> None:
    assert isinstance(make_decoder(BYTES), ByteDecoder)
    assert isinstance(make_decoder(SPM), ByteDecoder)
    assert isinstance(make_decoder(WORDS), ContextDecoder)


@settings(max_examples=300, deadline=None)
@given(ids=ids_of(BYTES), skip=st.booleans())
def test_any_bytes(ids: list[int], skip: bool) -> None:
    pieces = stream(BYTES, ids, skip_special_tokens=skip)
    assert "".join(pieces) == BYTES.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text(text: str) -> None:
    pieces = stream(BYTES, BYTES.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def test_byte_fallback(text: str) -> None:
    ids = SPM.encode(text)
    pieces = stream(SPM, ids)
    whole = SPM.decode(ids)
    assert "".join(pieces) == (" " + whole if text else whole)  # a prompt stands before it
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(ids=ids_of(WORDS), skip=st.booleans())
def test_words(ids: list[int], skip: bool) -> None:
    ids = [i for i in ids if WORDS.token(i) not in ".,!?"]  # its decoder joins these backwards
    pieces = stream(WORDS, ids, skip_special_tokens=skip)
    assert "".join(pieces) == WORDS.decode(ids, skip_special_tokens=skip)


def test_context_gives_the_space() -> None:
    prompt, answer = WORDS.encode("The capital"), WORDS.encode("of France")
    decoder = make_decoder(WORDS, context=prompt)
    assert "".join(decoder.push(i) for i in answer) + decoder.flush() == " of France"


def test_spaces_between_special_tokens() -> None:
    ids = [0, 1, *WORDS.encode("hello"), 3, 3]
    spaced = stream(WORDS, ids, skip_special_tokens=False)
    assert "".join(spaced) == WORDS.decode(ids, skip_special_tokens=False)
    close = stream(WORDS, ids, skip_special_tokens=False, spaces_between_special_tokens=False)
    assert "".join(close) == "<s></s> hello <|im_start|><|im_start|>"


def test_endless_invalid_bytes_cost_and_hold_little() -> None:
    lead = BYTES.token_to_id("ð")  # the byte 0xF0, which begins a character of four
    assert lead is not None
    pieces = stream(BYTES, [lead] * 1000)
    assert "".join(pieces) == "\ufffd" * 1000 and max(map(len, pieces)) == 1


# ---- stop strings --------------------------------------------------------------------------


def expected_stop(pieces: list[str], stops: list[str], *, include: bool) -> tuple[str, str | None]:
    """By the plain rule: the first piece that completes a stop string, the earliest such."""
    text = ""
    for piece in pieces:
        new = text + piece
        ends = [(new.find(s), i, s) for i, s in enumerate(stops) if s in new]
        if ends:
            at, _, stop = min(ends)
            return new[: at + len(stop) if include else at], stop
        text = new
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    include=st.booleans(),
)
def test_stops(pieces: list[str], stops: list[str], include: bool) -> None:
    finder = StopFinder(stops, include=include)
    out, stop, shown = "", None, ""
    for piece in pieces:
        new, stop = finder.push(piece)
        out += new
        shown += piece
        if stop is not None:
            break
        # Nothing is held back but what may become a stop string.
        held = shown[len(out) :]
        assert shown.startswith(out)
        assert not held or (any(s.startswith(held) for s in stops) and not include)
    else:
        out += finder.flush()
    assert (out, stop) == expected_stop(pieces, stops, include=include)


def test_min_tokens_and_stops() -> None:
    ids = BYTES.encode("one two one two")
    first = len(BYTES.encode("one"))
    for min_tokens, expected in ((0, ""), (first, "one two "), (len(ids), "one two one two")):
        reader = Detokenizer(BYTES, params=TextParams(stop=("one",), min_tokens=min_tokens))
        out = ""
        for i in ids:
            out += reader.push(i)
            if reader.stopped_by:
                break
        out += reader.flush()
        assert out == expected, min_tokens


def test_a_stop_string_found_only_at_the_end() -> None:
    """Half a character at the end is told as U+FFFD, which a stop string may name."""
    lead = BYTES.token_to_id("ð")
    assert lead is not None
    reader = Detokenizer(BYTES, params=TextParams(stop=("\ufffd",)))
    assert reader.push(lead) == ""
    assert (reader.flush(), reader.stopped_by) == ("", "\ufffd")


@pytest.mark.parametrize("stop", ["there", "re!", "e"])
def test_near_misses_come_out(stop: str) -> None:
    ids = BYTES.encode("Hello ther")
    reader = Detokenizer(BYTES, params=TextParams(stop=("there",)))
    assert "".join(reader.push(i) for i in ids) + reader.flush() == "Hello ther"
    assert reader.num_chars == 10 and reader.num_tokens == len(ids)
