"""Places of the last tokens against a search, and what suffix decoding makes of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from octavo.speculative.occurrences import SEPARATOR, Occurrences
from octavo.speculative.proposer import Proposal
from octavo.speculative.suffix import SuffixProposer


def shared_tokens(text: Sequence[int], place: int, tokens: Sequence[int]) -> int:
    number = 0
    while number < min(place, len(tokens)) and text[place - 1 - number] == tokens[-1 - number]:
        number += 1
    return number


@pytest.mark.parametrize("vocab_size", [2, 6, 60])
def test_places_are_those_that_share_most(vocab_size: int) -> None:
    rng = random.Random(vocab_size)
    text = Occurrences()
    forgotten = 0
    everything: list[int] = []
    for _ in range(60):
        new = [rng.randrange(vocab_size) for _ in range(rng.choice((1, 2, 9, 70)))]
        everything += new
        text.tokens += new
        while text.is_behind:
            text.merge()
        if len(text.tokens) > 400:
            forgotten += 250
            text.forget(250)
        assert text.tokens == everything[forgotten:]
        tokens = [rng.randrange(vocab_size) for _ in range(rng.randint(3, 6))]
        found = text.places(tokens, limit=10_000)
        assert len(set(found)) == len(found)
        shared = {p: shared_tokens(text.tokens, p, tokens) for p in range(1, len(text.tokens))}
        assert all(shared[place] > 0 for place in found)
        # All of the newest, and of the others those that share most, told up to three tokens.
        newest = [p for p in shared if p > text._num_merged]
        older = [p for p in shared if p <= text._num_merged]
        most = min(3, max((shared[p] for p in older), default=0))
        assert {p for p in found if p > text._num_merged} == {p for p in newest if shared[p]}
        # Tokens that were forgotten still count in keys: what shares more by them may be missed.
        want = {p for p in older if most and shared[p] >= most}
        if forgotten == 0:
            assert {p for p in found if p <= text._num_merged} == want
        few = text.places(tokens, limit=3)
        assert len(few) == min(3, len(found)) and set(few) <= set(found)


def propose(
    proposer: SuffixProposer, request_id: str, tokens: Sequence[int], most: int = 8
) -> Proposal:
    return proposer.propose(request_id, np.asarray(tokens, np.int32), max_drafts=most)


def begin(
    proposer: SuffixProposer, request_id: str, tokens: Sequence[int], salt: str | None = None
) -> None:
    proposer.begin(request_id, tokens, num_prompt_tokens=len(tokens), salt=salt)


def test_a_longer_match_is_followed_further_and_is_surer() -> None:
    proposer = SuffixProposer()
    text = list(range(100, 140))
    lengths, chances = [], []
    for number in (1, 2, 5, 9):
        begin(proposer, "r", [*text, 7, *text[10 : 10 + number]])
        found = propose(proposer, "r", [*text, 7, *text[10 : 10 + number]], most=20)
        assert found.probs is not None and len(found.probs) == len(found.token_ids)
        assert list(found.token_ids) == text[10 + number :][: len(found.token_ids)]
        assert all(0.0 < prob < 1.0 for prob in found.probs)
        lengths.append(len(found.token_ids))
        chances.append(found.probs[0])
        proposer.end("r")
    assert lengths == [1, 2, 5, 9]
    assert chances == sorted(set(chances))


def test_the_more_frequent_continuation_wins_with_its_share() -> None:
    proposer = SuffixProposer(spec_factor=4.0)
    tokens = [1, 2, 8, 1, 2, 9, 1, 2, 8, 1, 2, 8, 1, 2]
    begin(proposer, "r", tokens)
    found = propose(proposer, "r", tokens, most=1)
    assert list(found.token_ids) == [8]
    assert found.probs is not None and 0.5 < found.probs[0] < 0.95


def test_agreeing_places_make_surer_and_others_less_sure() -> None:
    """One place; two that agree; three of which one does not."""
    chances = []
    for tokens in ([1, 8, 5, 1], [1, 8, 5, 1, 8, 6, 1], [1, 8, 5, 1, 8, 6, 1, 9, 7, 1]):
        proposer = SuffixProposer()
        begin(proposer, "r", tokens)
        found = propose(proposer, "r", tokens, most=1)
        assert list(found.token_ids) == [8] and found.probs is not None
        chances.append(found.probs[0])
    one, two, disputed = chances
    assert one < two and disputed < two


def test_what_a_request_said_itself_outweighs_its_prompt() -> None:
    proposer = SuffixProposer()
    proposer.begin("r", [1, 2, 8, 5, 1, 2, 9, 6, 1, 2], num_prompt_tokens=4, salt=None)
    said = propose(proposer, "r", [1, 2, 8, 5, 1, 2, 9, 6, 1, 2], most=1)
    proposer.begin("r", [1, 2, 9, 5, 1, 2, 8, 6, 1, 2], num_prompt_tokens=4, salt=None)
    swapped = propose(proposer, "r", [1, 2, 9, 5, 1, 2, 8, 6, 1, 2], most=1)
    assert list(said.token_ids) == [9] and list(swapped.token_ids) == [8]


def test_others_outputs_are_less_sure_than_ones_own_tokens() -> None:
    proposer = SuffixProposer(min_token_prob=0.0)
    begin(proposer, "a", [3])
    proposer.extend("a", [1, 2, 8, 5])
    proposer.end("a")
    begin(proposer, "b", [1, 2])
    elsewhere = propose(proposer, "b", [1, 2], most=1)
    proposer.end("b")
    begin(proposer, "c", [1, 2, 8, 5, 1, 2], salt="c")
    own = propose(proposer, "c", [1, 2, 8, 5, 1, 2], most=1)
    assert elsewhere.token_ids == own.token_ids == [8]
    assert elsewhere.probs is not None and own.probs is not None
    assert elsewhere.probs[0] < own.probs[0]


def test_a_loop_goes_on_beyond_its_end() -> None:
    proposer = SuffixProposer()
    tokens = [1, 2, 3] * 5
    begin(proposer, "r", tokens)
    assert list(propose(proposer, "r", tokens, most=10).token_ids) == [1, 2, 3] * 3 + [1]
    assert proposer._own["r"].text.tokens == tokens  # drafts are no tokens


def test_drafts_are_cut_where_they_are_unlikely() -> None:
    rng = random.Random(0)
    tokens = [token for _ in range(30) for token in (1, rng.randrange(2, 1000))] + [1]
    for least, has_drafts in ((0.5, False), (0.0, True)):
        proposer = SuffixProposer(min_token_prob=least)
        begin(proposer, "r", tokens)
        assert bool(propose(proposer, "r", tokens).token_ids) == has_drafts


def test_outputs_are_shared_with_those_of_the_same_salt_alone() -> None:
    """Tokens of each tenant come from a range of their own, their prompts from a common one."""
    rng = random.Random(1)
    proposer = SuffixProposer(spec_factor=8.0, min_token_prob=0.0)
    salts = [None, "", "a", "b"]
    num_shared = 0
    for number in range(200):
        which = number % 4
        prompt = [rng.randrange(6) for _ in range(5)]
        name = f"r{number}"
        begin(proposer, name, prompt, salts[which])
        tokens = prompt
        for _ in range(12):
            found = propose(proposer, name, tokens).token_ids
            allowed = range(100 * which + 100, 100 * which + 108)
            assert all(token < 6 or token in allowed for token in found)
            num_shared += any(token in allowed and token not in tokens for token in found)
            new = rng.choice((rng.randrange(6), rng.choice(allowed)))
            tokens = [*tokens, new]
            proposer.extend(name, [new])
        proposer.end(name)
    assert num_shared > 50
    assert set(proposer._shared) == set(salts)


def test_prompts_are_not_shared() -> None:
    proposer = SuffixProposer()
    secret = list(range(500, 540))
    begin(proposer, "a", [*secret, *range(20)])
    proposer.extend("a", [1, 2, 3])
    proposer.end("a")
    begin(proposer, "b", secret[:10])
    assert not propose(proposer, "b", secret[:10]).token_ids


def test_recent_outputs_are_bounded_and_the_oldest_go_first() -> None:
    proposer = SuffixProposer(max_tokens=1000)
    for number in range(100):
        begin(proposer, "r", [5], salt=f"tenant {number % 3}")
        output = list(range(1000 * number, 1000 * number + 59))
        proposer.extend("r", output)
        proposer.end("r")
        kept = sum(len(text.tokens) for text in proposer._shared.values())
        assert kept == proposer.num_shared_tokens <= 1000
        assert kept >= min(1000 - 61, 61 * (number + 1))
    for number, is_known in ((99, True), (90, True), (70, False)):
        begin(proposer, "r", [5], salt=f"tenant {number % 3}")
        start = [1000 * number, 1000 * number + 1]
        assert bool(propose(proposer, "r", [5, *start]).token_ids) == is_known
        proposer.end("r")
    for text in proposer._shared.values():
        assert len(text._keys) == len(text._places) <= len(text.tokens)


def test_tenants_whose_outputs_are_all_old_leave_nothing() -> None:
    proposer = SuffixProposer(max_tokens=300)
    for number in range(50):
        begin(proposer, "r", [5], salt=f"tenant {number}")
        proposer.extend("r", list(range(90)))
        proposer.end("r")
    assert set(proposer._shared) == {f"tenant {number}" for number in (47, 48, 49)}
    begin(proposer, "r", [5], salt="large")
    proposer.extend("r", list(range(400)))  # one larger than all that is kept
    proposer.end("r")
    assert "large" not in proposer._shared and not proposer._own


def test_a_preempted_request_comes_again_with_what_it_had() -> None:
    proposer, fresh = SuffixProposer(), SuffixProposer()
    rng = random.Random(3)
    tokens = [rng.randrange(9) for _ in range(50)]
    begin(proposer, "r", tokens[:30])
    proposer.extend("r", tokens[30:])
    want = propose(proposer, "r", tokens)
    proposer.end("r")
    proposer._shared.clear()
    proposer.begin("r", tokens, num_prompt_tokens=30, salt=None)
    assert propose(proposer, "r", tokens) == want
    begin(fresh, "r", tokens)
    assert propose(fresh, "r", tokens) == want
    proposer.extend("r", [1, 2])
    proposer.end("r")
    shared = proposer._shared[None].tokens  # what was generated since, and its context
    assert shared == [*tokens[-16:], 1, 2, SEPARATOR]


def test_forks_of_one_prompt_are_requests_of_their_own() -> None:
    proposer = SuffixProposer()
    prompt = [1, 2, 3, 4, 1, 2]
    for name in ("a", "b"):
        begin(proposer, name, prompt)
    proposer.extend("a", [9, 1, 2])
    a, b = (propose(proposer, "a", [*prompt, 9, 1, 2]), propose(proposer, "b", prompt))
    assert b.token_ids[0] == 3 and proposer._own["b"].text.tokens == prompt
    assert a.token_ids[0] in (3, 9)
    proposer.end("a")
    assert propose(proposer, "b", prompt).token_ids


def test_a_long_prompt_is_read_in_parts() -> None:
    proposer = SuffixProposer()
    tokens = [*range(5000), *range(5000)]
    begin(proposer, "r", tokens)
    found = [propose(proposer, "r", tokens) for _ in range(3)]
    assert [list(each.token_ids) for each in found[:2]] == [[], []]
    assert list(found[2].token_ids) == list(range(8))
