"""Prompt lookup against a search through all of the tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.speculative.grams import factors, keys_between
from octavo.speculative.ngram import NgramProposer


def searched(tokens: list[int], *, shortest: int, longest: int, most: int) -> list[int]:
    """The continuation of the first earlier occurrence of the longest known last n-gram."""
    for length in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        wanted = tokens[-length:]
        for end in range(length, len(tokens)):
            if tokens[end - length : end] == wanted:
                return tokens[end : end + most]
    return []


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (2, 5), (3, 3), (1, 8)])
@pytest.mark.parametrize("vocab_size", [2, 5, 40])
def test_finds_what_a_search_finds(shortest: int, longest: int, vocab_size: int) -> None:
    rng = random.Random(vocab_size * 100 + longest)
    for _ in range(8):
        proposer = NgramProposer(min_length=shortest, max_length=longest)
        tokens = [rng.randrange(vocab_size) for _ in range(rng.choice((1, 3, 30, 200)))]
        proposer.begin("r", tokens, num_prompt_tokens=len(tokens), salt=None)
        for _ in range(30):
            most = rng.randint(1, 9)
            found = proposer.propose("r", np.asarray(tokens, np.int32), max_drafts=most)
            want = searched(tokens, shortest=shortest, longest=longest, most=most)
            assert list(found.token_ids) == want and found.probs is None
            tokens += [rng.randrange(vocab_size) for _ in range(rng.choice((1, 1, 2, 5, 60)))]


def test_a_long_prompt_is_read_in_parts() -> None:
    tokens = [i % 5000 for i in range(10000)]
    proposer = NgramProposer(min_length=2, max_length=3)
    proposer.begin("r", tokens, num_prompt_tokens=len(tokens), salt=None)
    known = np.asarray(tokens, np.int32)
    found = [proposer.propose("r", known, max_drafts=3) for _ in range(3)]
    assert [list(each.token_ids) for each in found[:2]] == [[], []]
    assert list(found[2].token_ids) == [0, 1, 2]  # behind 4998, 4999


def test_ended_requests_take_no_memory_and_may_come_again() -> None:
    proposer = NgramProposer()
    for number in range(3):
        proposer.begin("r", [1, 2, 3, number], num_prompt_tokens=4, salt=None)
        assert not proposer.propose("r", np.asarray([1, 2, 3, number]), max_drafts=4).token_ids
        known = np.asarray([1, 2, 3, number, 1, 2], np.int32)
        assert list(proposer.propose("r", known, max_drafts=2).token_ids) == [3, number]
        proposer.end("r")
    assert not proposer._lookups
    proposer.end("never begun")


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 2**21), min_size=1, max_size=60),
    length=st.integers(1, 6),
    start=st.integers(0, 59),
)
def test_keys_of_many_places_are_those_of_each(tokens: list[int], length: int, start: int) -> None:
    multipliers = factors(length)
    start = max(start, length - 1)
    if start < len(tokens):
        each = [
            sum(tokens[end - 1 - i] * multipliers[i] for i in range(length)) % 2**64
            for end in range(start + 1, len(tokens) + 1)
        ]
        assert keys_between(tokens, start, len(tokens), multipliers) == each
