"""Prompt files, the file of answers, and the vocabulary made of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from octavo.distill.samples import (
    Author,
    Sample,
    draft_vocabulary,
    read_prompts,
    read_samples,
    write_samples,
)


def test_prompt_files(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"turns": ["one", "two"]}\n\n{"prompt": "three"}\n{"text": "four"}\n')
    assert read_prompts(lines) == ["one", "three", "four"]
    plain = tmp_path / "b.txt"
    plain.write_text("one\n{two}\n\n")
    assert read_prompts(plain) == ["one", "{two}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: expected an object, got list"),
        ('{"turns": []}', "line 1: expected a text in 'prompt', 'text' or 'turns'"),
        ("\n", "holds no prompt"),
    ],
)
def test_wrong_prompt_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")


def test_answers_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    one = Sample(prompt_token_ids=(1, 2), token_ids=(3,), temperature=0.8)
    two = Sample(prompt_token_ids=(4,), token_ids=(5, 6), temperature=0.0)
    write_samples(path, [one])
    write_samples(path, [two])
    assert read_samples(path) == [one, two]
    assert one.all_ids == (1, 2, 3)
    with path.open("a") as file:
        file.write('{"prompt_token_ids": [1], "token_ids": ["x"], "temperature": 0}\n')
    with pytest.raises(ValueError, match="line 3: no generated text"):
        read_samples(path)


def test_vocabulary_is_of_the_most_frequent() -> None:
    answers = [(7, 7, 7, 2, 2), (9, 9, 2, 4, 3)]
    samples = [Sample(prompt_token_ids=(1,), token_ids=a, temperature=0.0) for a in answers]
    assert draft_vocabulary(samples, size=3, vocab_size=20) == [2, 7, 9]
    assert draft_vocabulary(samples, size=4, vocab_size=20) == [2, 3, 7, 9]
    assert draft_vocabulary(samples, size=99, vocab_size=12) == list(range(12))


class _Engine:
    """As much of the offline engine as an author asks. Tokens are bytes, messages stand between 1
    and 2, and every text that it writes is long."""

    info = SimpleNamespace(max_model_len=8192)
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: list(text.encode()))
    written = "Nothing is as long as this. " * 40

    def render_chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        return 1, *messages[0]["content"].encode(), 2

    def generate(self, prompts: Sequence[Any], params: Sequence[Any]) -> list[Any]:
        assert len(prompts) == len(params)
        return [SimpleNamespace(text=self.written, token_ids=(7,) * 20) for _ in prompts]


def test_some_prompts_ask_something_of_an_earlier_answer() -> None:
    engine, rng = _Engine(), random.Random(3)
    author = Author(cast(Any, engine), max_new_tokens=16)

    def asked() -> int:
        prompts = author.own_prompts(60, rng=rng)
        assert len(prompts) == 60
        assert all((ids[0], ids[-1]) == (1, 2) for ids in prompts)
        texts = [bytes(ids[1:-1]).decode() for ids in prompts]
        return sum(text.endswith(f"\n\n{engine.written}") for text in texts)

    assert asked() == 0
    author.greedy(["Write."])
    assert asked() == 6
