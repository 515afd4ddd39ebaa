"""Prompt lookup: what followed the same last tokens the first time. Knows one request at a time.

As vLLM's ``ngram`` method: of the longest run of last tokens (``min_length`` to ``max_length`` of
them) that the request has had before, the continuation of its first occurrence.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from octavo.speculative.grams import factors, keys_between
from octavo.speculative.proposer import NO_PROPOSAL, Proposal, TokenIds

# Known tokens read in one call: a long prompt is taken in over several steps, none of them slow.
_MAX_READ = 4096
_FEW = 24  # new tokens that are cheaper one by one than as arrays
_MASK = (1 << 64) - 1


class _Lookup:
    """A request's tokens, and of each n-gram that another token follows where it first ended."""

    __slots__ = ("firsts", "num_indexed", "tokens")

    def __init__(self, tokens: list[int], *, num_lengths: int) -> None:
        self.tokens = tokens
        self.num_indexed = 0  # n-grams that end at or before it are in ``firsts``
        self.firsts: tuple[dict[int, int], ...] = tuple({} for _ in range(num_lengths))


class NgramProposer:
    """`Proposer` from a request's own tokens. A call costs the new tokens, not all of them."""

    def __init__(self, *, min_length: int = 2, max_length: int = 5) -> None:
        assert 1 <= min_length <= max_length
        self._min_length = min_length
        self._max_length = max_length
        self._factors = factors(max_length)
        self._lookups: dict[str, _Lookup] = {}

    def begin(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        num_prompt_tokens: int,
        salt: str | None,
    ) -> None:
        lengths = self._max_length - self._min_length + 1
        self._lookups[request_id] = _Lookup(list(token_ids), num_lengths=lengths)

    def extend(self, request_id: str, token_ids: Sequence[int]) -> None:
        """Nothing: its tokens come with the next `propose`."""

    def end(self, request_id: str) -> None:
        self._lookups.pop(request_id, None)

    def propose(self, request_id: str, token_ids: TokenIds, *, max_drafts: int) -> Proposal:
        lookup = self._lookups[request_id]
        tokens = lookup.tokens
        if len(token_ids) > len(tokens):
            tokens += token_ids[len(tokens) :].tolist()
        if len(tokens) - lookup.num_indexed > _FEW:
            self._read_many(lookup)
            if lookup.num_indexed < len(tokens) - 1:
                return NO_PROPOSAL
        found = -1
        for end in range(lookup.num_indexed + 1, len(tokens) + 1):
            found = self._read_one(lookup, end, is_last=end == len(tokens))
        if found < 0:
            return NO_PROPOSAL
        return Proposal(tokens[found : found + max_drafts])

    def _read_one(self, lookup: _Lookup, end: int, *, is_last: bool) -> int:
        """Adds the n-grams that end at ``end``. The last ones, which nothing follows yet, are
        looked up instead: where the longest known one ended, or -1."""
        tokens, found, key, firsts = lookup.tokens, -1, 0, lookup.firsts
        shortest = self._min_length
        at, length = end, 0
        for factor in islice(self._factors, min(end, self._max_length)):
            at -= 1
            length += 1
            key = (key + tokens[at] * factor) & _MASK
            if length < shortest:
                continue
            known = firsts[length - shortest]
            if not is_last:
                known.setdefault(key, end)
            elif (first := known.get(key)) is not None:
                if tokens[first - length : first] == tokens[at:end]:
                    found = first
            else:
                break  # nor is any longer one known
        if not is_last:
            lookup.num_indexed = end
        return found

    def _read_many(self, lookup: _Lookup) -> None:
        """Adds the n-grams that end before the last token, or a part of them."""
        tokens, start = lookup.tokens, lookup.num_indexed
        end = min(len(tokens) - 1, start + _MAX_READ)
        for i, known in enumerate(lookup.firsts):
            length = self._min_length + i
            begin = max(start, length - 1)
            if begin < end:
                keys = keys_between(tokens, begin, end, self._factors[:length])
                # Backwards, so that of equal keys the first stays.
                fresh = dict(zip(reversed(keys), range(end, begin, -1), strict=True))
                known.update({key: at for key, at in fresh.items() if key not in known})
        lookup.num_indexed = end
