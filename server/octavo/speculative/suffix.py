"""Drafts from all earlier places whose last tokens were the same, weighed by how many. After
suffix decoding (Oliaro et al., 2411.04975); knows requests' tokens and whose they are, no step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from octavo.speculative.occurrences import SEPARATOR, Occurrences
from octavo.speculative.proposer import NO_PROPOSAL, Proposal, TokenIds

_MAX_MATCH = 16  # tokens compared
_MAX_PLACES = 8  # of each text
# A place that shares m last tokens weighs m**2, beside this for whatever was never seen.
_UNSEEN = 1.0
_MAX_OUTPUT = 8192  # of one output's tokens, its last, that are kept for others

# A place that shares the last tokens: its text's tokens, the place, how many are shared.
_Match = tuple[list[int], int, int]


class _Own:
    """A live request's tokens."""

    __slots__ = ("num_shared", "salt", "text")

    def __init__(self, tokens: Sequence[int], *, num_shared: int, salt: str | None) -> None:
        self.text = Occurrences(tokens)
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
        self._own[request_id] = _Own(token_ids, num_shared=len(token_ids), salt=salt)

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
        found = _matches(own.text, tokens)
        shared = self._shared.get(own.salt)
        if shared is not None:
            found += _matches(shared, tokens)
        if not found:
            return NO_PROPOSAL
        room = min(max_drafts, int(self._spec_factor * max(match[2] for match in found)))
        num_tokens = len(tokens)
        try:
            return self._follow(found, tokens, room)
        finally:
            del tokens[num_tokens:]

    def _follow(self, found: list[_Match], tokens: list[int], room: int) -> Proposal:
        """The likeliest continuation. It is appended to ``tokens``, so that places near their end
        continue with what is drafted: a loop goes on."""
        drafts: list[int] = []
        probs: list[float] = []
        survival = 1.0
        while len(drafts) < room:
            best, prob = _likeliest(found)
            survival *= prob
            if survival < self._min_token_prob or best == SEPARATOR:
                break
            if len(found) == 1:
                text, place, length = found[0]
                found = [(text, place + 1, length + 1)]
            else:
                found = [
                    (text, place + 1, length + 1)
                    for text, place, length in found
                    if place < len(text) and text[place] == best
                ]
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


def _likeliest(found: list[_Match]) -> tuple[int, float]:
    """The token that most of the places continue with, and its share; SEPARATOR if none does."""
    if len(found) == 1:
        text, place, length = found[0]
        weight = length * length
        return text[place] if place < len(text) else SEPARATOR, weight / (weight + _UNSEEN)
    weights: dict[int, float] = {}
    total = _UNSEEN
    for text, place, length in found:
        if place < len(text) and (token := text[place]) != SEPARATOR:
            weight = length * length
            weights[token] = weights.get(token, 0.0) + weight
            total += weight
    if not weights:
        return SEPARATOR, 0.0
    best = max(weights, key=weights.__getitem__)
    return best, weights[best] / total


def _matches(text: Occurrences, tokens: list[int]) -> list[_Match]:
    """Places in a text that share the last tokens."""
    known, end = text.tokens, len(tokens)
    found = []
    for place in text.places(tokens, limit=_MAX_PLACES):
        length, most = 1, min(place, end, _MAX_MATCH)
        while length < most and known[place - 1 - length] == tokens[end - 1 - length]:
            length += 1
        found.append((known, place, length))
        if length == _MAX_MATCH:
            break
    return found
