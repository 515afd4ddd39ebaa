"""Drafts from all earlier places whose last tokens were the same, weighed by how many. After
suffix decoding (Oliaro et al., 2411.04975); knows requests' tokens and whose they are, no step.

Of the places' next tokens that with most weight is drafted: a place that shares m tokens weighs m
squared, and twice that in the request's own output, which repeats itself more than its prompt. How
likely it is follows from how many tokens are shared and how many places agree, by odds that were
fitted to answers: weights say less of that.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from octavo.speculative.occurrences import SEPARATOR, Occurrences
from octavo.speculative.proposer import NO_PROPOSAL, Proposal, TokenIds

_MAX_MATCH = 16  # tokens compared
_MAX_PLACES = 8  # of each text
_MAX_OUTPUT = 8192  # of one output's tokens, its last, that are kept for others
_IN_OUTPUT = 2.0  # weight of a place in the request's own output

# A place that shares the last tokens: its text's tokens, the place, its weight.
_Match = tuple[list[int], int, float]

# The odds of a draft: of the first, with one place, one token shared; and the powers of how many
# tokens were shared, of the draft's number, of the places that agree on it, and of all places.
# Fitted to half of the answers, greedy and at T = 0.8,
# to prompts for summaries, code and chat; judged on the other half, and on arithmetic.
_ODDS = 0.64
_BY_LENGTH, _BY_NUMBER, _BY_AGREEING, _BY_PLACES = 1.07, 0.37, 1.54, -0.81
_ELSEWHERE = 0.24  # times that, for places in others' outputs


class _Own:
    """A live request's tokens."""

    __slots__ = ("num_prompt", "num_shared", "salt", "text")

    def __init__(
        self, tokens: Sequence[int], *, num_prompt: int, num_shared: int, salt: str | None
    ) -> None:
        self.text = Occurrences(tokens)
        self.num_prompt = num_prompt
        self.num_shared = num_shared  # of its tokens: the prompt, and what was shared already
        self.salt = salt


class SuffixProposer:
    """`Proposer` from a request's own tokens and from recent outputs under the same salt.

    ``max_tokens``: of recent outputs kept in all; the oldest are dropped, each as a whole.
    ``spec_factor``: at most so many drafts for each token that matched. ``min_token_prob``: of a
    draft with all those before it, by the proposer's own estimate.
    """

    def __init__(
        self, *, max_tokens: int = 65536, spec_factor: float = 1.0, min_token_prob: float = 0.1
    ) -> None:
        self._max_tokens = max_tokens
        self._spec_factor = spec_factor
        self._min_token_prob = min_token_prob
        self._own: dict[str, _Own] = {}
        self._shared: dict[str | None, Occurrences] = {}
        self._outputs: deque[tuple[str | None, int]] = deque()  # (salt, tokens), oldest first
        self.num_shared_tokens = 0

    def begin(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        num_prompt_tokens: int,
        salt: str | None,
    ) -> None:
        # What it had generated before a preemption was shared as that came.
        self._own[request_id] = _Own(
            token_ids, num_prompt=num_prompt_tokens, num_shared=len(token_ids), salt=salt
        )

    def extend(self, request_id: str, token_ids: Sequence[int]) -> None:
        own = self._own.get(request_id)
        if own is not None:
            own.text.tokens += token_ids

    def end(self, request_id: str) -> None:
        own = self._own.pop(request_id, None)
        if own is not None:
            self._share(own)

    def propose(self, request_id: str, token_ids: TokenIds, *, max_drafts: int) -> Proposal:
        own = self._own[request_id]
        tokens = own.text.tokens
        if len(token_ids) > len(tokens):
            tokens += token_ids[len(tokens) :].tolist()
        if own.text.is_behind:
            own.text.merge()
            if own.text.is_behind:
                return NO_PROPOSAL
        found, length = _matches(own.text, tokens, first_output=own.num_prompt)
        shared = self._shared.get(own.salt)
        if shared is not None:
            others, longest = _matches(shared, tokens, first_output=len(shared.tokens))
            found, length = found + others, max(length, longest)
        if not found:
            return NO_PROPOSAL
        num_tokens = len(tokens)
        room = min(max_drafts, int(self._spec_factor * length))
        try:
            return self._follow(found, tokens, odds=_ODDS * math.pow(length, _BY_LENGTH), room=room)
        finally:
            del tokens[num_tokens:]

    def _follow(
        self, found: list[_Match], tokens: list[int], *, odds: float, room: int
    ) -> Proposal:
        """The likeliest continuation. It is appended to ``tokens``, so that places near their end
        continue with what is drafted: a loop goes on. ``odds``: of the first, from one place."""
        drafts: list[int] = []
        probs: list[float] = []
        survival = 1.0
        for number in range(room):
            num_places = len(found)
            best, found = _heaviest(found, number)
            if best == SEPARATOR:
                break
            agreed = odds * math.pow(number + 1, _BY_NUMBER) * _agreement(found, num_places, tokens)
            prob = agreed / (1.0 + agreed)
            survival *= prob
            if survival < self._min_token_prob:
                break
            drafts.append(best)
            probs.append(prob)
            tokens.append(best)
        return Proposal(drafts, probs) if drafts else NO_PROPOSAL

    def _share(self, own: _Own) -> None:
        """Keeps what a request generated, with the tokens before it as context."""
        tokens, first = own.text.tokens, own.num_shared
        output = tokens[max(first - _MAX_MATCH, 0, len(tokens) - _MAX_OUTPUT) :]
        if len(tokens) - first < 2 or len(output) >= self._max_tokens:
            return
        text = self._shared.setdefault(own.salt, Occurrences())
        text.tokens += output
        text.tokens.append(SEPARATOR)
        while text.is_behind:
            text.merge()
        size = len(output) + 1
        self._outputs.append((own.salt, size))
        self.num_shared_tokens += size
        while self.num_shared_tokens > self._max_tokens:
            salt, size = self._outputs.popleft()
            self.num_shared_tokens -= size
            oldest = self._shared[salt]
            oldest.forget(size)
            if not oldest.tokens:
                del self._shared[salt]


def _heaviest(found: list[_Match], ahead: int) -> tuple[int, list[_Match]]:
    """The token so many behind the places that most of them have, by weight, and those places;
    SEPARATOR if none has any."""
    if len(found) == 1:
        text, place, _ = found[0]
        return text[place + ahead] if place + ahead < len(text) else SEPARATOR, found
    weights: dict[int, float] = {}
    tokens = []
    for text, place, weight in found:
        token = text[place + ahead] if place + ahead < len(text) else SEPARATOR
        tokens.append(token)
        if token != SEPARATOR:
            weights[token] = weights.get(token, 0.0) + weight
    if not weights:
        return SEPARATOR, []
    best = max(weights, key=weights.__getitem__)
    return best, [match for match, token in zip(found, tokens, strict=True) if token == best]


def _agreement(found: list[_Match], num_places: int, own: list[int]) -> float:
    """What odds are multiplied by where these, of so many places, agree."""
    number = len(found)
    if number == num_places == 1:
        return 1.0 if found[0][0] is own else _ELSEWHERE
    elsewhere = sum(text is not own for text, _, _ in found) / number
    agreed = math.pow(number, _BY_AGREEING) * math.pow(num_places, _BY_PLACES)
    return agreed * math.pow(_ELSEWHERE, elsewhere)


def _matches(
    text: Occurrences, tokens: list[int], *, first_output: int
) -> tuple[list[_Match], int]:
    """Places in a text that share the last tokens, and the most that one shares."""
    known, end = text.tokens, len(tokens)
    found, longest = [], 0
    for place in text.places(tokens, limit=_MAX_PLACES):
        length, most = 1, min(place, end, _MAX_MATCH)
        while length < most and known[place - 1 - length] == tokens[end - 1 - length]:
            length += 1
        weight = length * length * (_IN_OUTPUT if place >= first_output else 1.0)
        found.append((known, place, weight))
        longest = max(longest, length)
        if length == _MAX_MATCH:
            break
    return found, longest
