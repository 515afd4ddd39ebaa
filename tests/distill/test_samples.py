"""Prompt files, the file of answers, and the vocabulary made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.distill.samples import (
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
