"""Data sets: exact lengths, the same from the same seed, and clear about bad files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from octavo.bench.datasets import Prompt, add_dataset_flags, load_dataset
from octavo.text.tokenizer import Tokenizer


def load(tokenizer: Tokenizer, *words: str) -> list[Prompt]:
    parser = argparse.ArgumentParser()
    add_dataset_flags(parser)
    return load_dataset(parser.parse_args(words), tokenizer)


@pytest.mark.parametrize("length", [1, 7, 128])
def test_random_prompts_have_the_asked_length(tokenizer: Tokenizer, length: int) -> None:
    words = ["--num-prompts", "20", "--random-input-len", str(length), "--random-output-len", "9"]
    prompts = load(tokenizer, *words)
    assert [len(tokenizer.encode(p.text)) for p in prompts] == [length] * 20
    assert [(p.num_tokens, p.output_len) for p in prompts] == [(length, 9)] * 20
    assert load(tokenizer, *words) == prompts
    assert load(tokenizer, *words, "--seed", "1") != prompts


def test_random_range_and_prefix(tokenizer: Tokenizer) -> None:
    prompts = load(
        tokenizer,
        *("--num-prompts", "60", "--random-input-len", "20", "--random-output-len", "10"),
        *("--random-range-ratio", "0.5", "--random-prefix-len", "8"),
    )
    lengths = {len(tokenizer.encode(p.text)) for p in prompts}
    assert lengths <= set(range(18, 39))
    assert len(lengths) > 5
    assert {p.output_len for p in prompts} <= set(range(5, 16))
    assert len({tuple(tokenizer.encode(p.text)[:8]) for p in prompts}) == 1


def test_prefix_repetition(tokenizer: Tokenizer) -> None:
    prompts = load(
        tokenizer,
        *("--dataset-name", "prefix_repetition", "--num-prompts", "12"),
        *("--prefix-repetition-prefix-len", "16", "--prefix-repetition-suffix-len", "4"),
        *("--prefix-repetition-num-prefixes", "3", "--prefix-repetition-output-len", "5"),
    )
    ids = [tokenizer.encode(p.text) for p in prompts]
    assert {len(i) for i in ids} == {20}
    heads = [tuple(i[:16]) for i in ids]
    assert sorted(heads.count(h) for h in set(heads)) == [4, 4, 4]
    assert len({tuple(i) for i in ids}) == 12


def test_sharegpt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    talk = [
        {"from": "human", "value": "base dark fond"},
        {"from": "gpt", "value": "kind mark list"},
    ]
    long = [{"value": " bark" * 5000}, {"value": "no"}]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([{"conversations": talk}, {"conversations": long}, {"id": "x"}]))
    words = ["--dataset-name", "sharegpt", "--dataset-path", str(path)]
    prompts = load(tokenizer, *words, "--num-prompts", "3")
    expected = len(tokenizer.encode("kind mark list"))
    assert [(p.text, p.output_len) for p in prompts] == [("base dark fond", expected)] * 3
    assert len(load(tokenizer, *words, "--num-prompts", "3", "--no-oversample")) == 1
    assert (
        load(tokenizer, *words, "--num-prompts", "1", "--sharegpt-output-len", "5")[0].output_len
        == 5
    )


def test_custom(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one", "output_tokens": 3}\n\n{"turns": ["two", "more"]}\n')
    words = ["--dataset-name", "custom", "--dataset-path", str(path), "--num-prompts", "2"]
    prompts = load(tokenizer, *words, "--disable-shuffle", "--custom-output-len", "8")
    assert [(p.text, p.output_len) for p in prompts] == [("one", 3), ("two", 8)]
    assert {p.output_len for p in load(tokenizer, *words, "--output-len", "4")} == {4}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("custom", "{", "line 1: not JSON"),
        ("custom", "[]", "line 1: expected an object, got list"),
        ("custom", '{"text": "x"}', "expected a text in 'prompt' or 'turns'"),
        ("custom", '{"prompt": "x", "output_tokens": -1}', "output_tokens must be a positive"),
        ("custom", "", "no usable prompt"),
        ("sharegpt", '{"a": 1}', "is no ShareGPT file"),
        ("sharegpt", "nope", "is no ShareGPT file"),
        ("custom", None, "no such file"),
    ],
)
def test_bad_files(
    tokenizer: Tokenizer, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    path = tmp_path / "data"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load(tokenizer, "--dataset-name", name, "--dataset-path", str(path))


@pytest.mark.parametrize(
    "words",
    [["--num-prompts", "0"], ["--random-range-ratio", "1"], ["--dataset-name", "custom"]],
)
def test_bad_flags(tokenizer: Tokenizer, words: list[str]) -> None:
    with pytest.raises(ValueError, match="--"):
        load(tokenizer, *words)


@pytest.mark.parametrize("name", ["--input-len", "--output-len", "--random-output-len"])
def test_no_tokens_are_none_asked_for(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        load(tokenizer, name, "0")
