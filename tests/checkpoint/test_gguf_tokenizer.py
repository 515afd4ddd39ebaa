"""Converted GGUF vocabularies encode and decode as the tokenizers they came from."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, trainers
from tokenizers import normalizers as norm
from tokenizers import pre_tokenizers as pre

from octavo.checkpoint.gguf_tokenizer import (
    tokenizer_config_from_metadata,
    tokenizer_from_metadata,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog, 1234567 times; it's DONE!",
    "Grüße aus Köln: ça va? 世界你好 — naïve café №42\n\n\tindented   text",
    "def main(args):\n    return [x**2 for x in args if x != None]  # it'll do",
] * 4
TEXTS = [
    *CORPUS[:3],
    "unseen: 😀 emoji, ZWJ 👩‍👩‍👧, tabs\t\tand\r\nlines  ",
    "",
    " leading and trailing ",
    "1 22 333 4444 55555",
    "McDonald's HTTPServer's",
]
# The published pre-tokenizers of the model families, as their tokenizer.json has them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def split(pattern: str) -> Any:
    return pre.Sequence(
        [
            pre.Split(Regex(pattern), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


FAMILIES = {
    "gpt-2": (pre.ByteLevel(add_prefix_space=False), None, False),
    "smollm": (
        pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]),
        None,
        False,
    ),
    "llama-bpe": (split(LLAMA3), None, True),
    "qwen2": (split(QWEN2), norm.NFC(), False),
}


def byte_level(name: str) -> tuple[Tokenizer, dict[str, Any]]:
    """A trained byte-level tokenizer of a family, and its vocabulary as GGUF metadata."""
    steps, normalizer, whole_words = FAMILIES[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = steps
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|bos|>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    content = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
    return tokenizer, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def converted(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_from_metadata(metadata)))


@pytest.mark.parametrize("name", FAMILIES)
def test_byte_level_families(name: str) -> None:
    original, metadata = byte_level(name)
    ours = converted(metadata)
    for text in TEXTS:
        text += "<|end|>x"
        assert ours.encode(text).ids == original.encode(text).ids, text
        ids = ours.encode(text).ids
        assert ours.decode(ids) == original.decode(ids)


def test_sentencepiece() -> None:
    """Scores count down the merges, so the pieces merge in the order they were learnt."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    content = json.loads(trained.to_str())["model"]
    pieces = sorted(content["vocab"], key=content["vocab"].__getitem__)
    learnt = {"".join(pair): -float(i) for i, pair in enumerate(content["merges"])}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    types = [2, 3, 3] + [6] * 256
    rest = [piece for piece in pieces if piece != "<unk>"]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + rest,
        "tokenizer.ggml.token_type": types + [1] * len(rest),
        "tokenizer.ggml.scores": [0.0] * len(tokens) + [learnt.get(p, -1e4) for p in rest],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    ours = converted(metadata)
    for text in CORPUS[:3]:
        words = [piece for piece in ours.encode(text).tokens if not piece.startswith("<")]
        assert ours.encode(text).ids[0] == 1, "BOS comes first by default"
        # The trained tokenizer cuts at spaces first; pieces never cross them here either.
        assert words == [p for p in trained.encode(text).tokens if p != "<unk>"]
        assert ours.decode(ours.encode(text).ids) == text
    unseen = "emoji 😀"
    assert "<0xF0>" in ours.encode(unseen).tokens
    assert ours.decode(ours.encode(unseen).ids) == unseen
    bare = converted({**metadata, "tokenizer.ggml.add_bos_token": False})
    assert bare.encode("a").ids == ours.encode("a").ids[1:]


def test_special_tokens_and_bos() -> None:
    _, metadata = byte_level("llama-bpe")
    del metadata["tokenizer.ggml.add_bos_token"]
    ours = converted(metadata)
    assert ours.encode("a").ids[0] == 1, "Llama 3 begins with BOS unless metadata says otherwise"
    assert ours.encode("a", add_special_tokens=False).ids[0] != 1
    assert ours.decode(ours.encode("hi<|end|>").ids) == "hi"
    settings = tokenizer_config_from_metadata(metadata)
    assert (settings["bos_token"], settings["eos_token"]) == ("<|bos|>", "<|end|>")
    types = [4, *metadata["tokenizer.ggml.token_type"][1:]]
    user_defined = {**metadata, "tokenizer.ggml.token_type": types}
    assert converted(user_defined).decode([0]) == "<|end|>", "not special: stays in the text"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "must be gpt2 or llama, got 'bert'"),
        ({"tokenizer.ggml.pre": "mars"}, "unknown GGUF tokenizer.ggml.pre 'mars'; known are"),
        ({"tokenizer.ggml.tokens": []}, "has no vocabulary"),
        ({"tokenizer.ggml.merges": []}, "has no merges"),
        ({"tokenizer.ggml.token_type": [1]}, "400 tokens but 1 token types"),
        (
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 999},
            "bos_token_id below 400, got 999",
        ),
    ],
)
def test_bad_metadata_is_named(change: dict[str, Any], message: str) -> None:
    _, metadata = byte_level("gpt-2")
    with pytest.raises(ValueError, match=message):
        tokenizer_from_metadata({**metadata, **change})
