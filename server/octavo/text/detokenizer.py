"""Token ids to text as they arrive, and stop strings. Knows one choice; nothing of HTTP or engine.

Text comes out only when it can no longer change: never half a character, and no part of what may
still become a stop string. Joined, the pieces are the whole text, however the tokens were grouped.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from octavo.text.tokenizer import Tokenizer

# Tokens of the prompt that give a decoder its context (does a space belong before the next word?).
_CONTEXT_TOKENS = 5
# A character is at most four bytes, hence at most four tokens that are no text by themselves.
_MAX_HELD_TOKENS = 8


class Decoder(Protocol):
    """Turns one token at a time into text."""

    def push(self, token_id: int) -> str:
        """Text that is certain now; may be empty."""

    def flush(self) -> str:
        """What was held back for the rest of a character that never came."""


class ByteDecoder:
    """For vocabularies whose text is the concatenation of their tokens' bytes: O(1) a token."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_inside = False  # a character, of which some bytes have come
        self._whole = tokenizer.whole_texts[skip_special_tokens]

    def push(self, token_id: int) -> str:
        if not self._is_inside and (known := self._whole.get(token_id)) is not None:
            return known
        if token_id in self._skip:
            self._whole[token_id] = ""
            return ""
        was_inside = self._is_inside
        text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._is_inside = bool(self._utf8.getstate()[0])
        if not (was_inside or self._is_inside):
            self._whole[token_id] = text
        return text

    def flush(self) -> str:
        return self._utf8.decode(b"", True)


class ContextDecoder:
    """For any other vocabulary: decodes a short window of tokens and tells what is new in it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context: Sequence[int] = (),
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._spaces = spaces_between_special_tokens or skip_special_tokens
        # [0, _read) of the window has been told; the window starts where a decode is right.
        self._window = list(context[-_CONTEXT_TOKENS:])
        self._read = len(self._window)
        self._was_added = False

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)

    def push(self, token_id: int) -> str:
        if self._skip_special and token_id in self._tokenizer.special_ids:
            return ""
        is_added = self._tokenizer.is_added(token_id)
        if not self._spaces and is_added and self._was_added:
            text = self.flush() + self._tokenizer.token(token_id)
            self._window, self._read = [token_id], 1
            return text
        self._was_added = is_added
        self._window.append(token_id)
        return self._new_text(is_last=len(self._window) - self._read > _MAX_HELD_TOKENS)

    def _new_text(self, *, is_last: bool) -> str:
        told = self._decode(self._window[: self._read])
        whole = self._decode(self._window)
        if len(whole) <= len(told) or (whole.endswith("\ufffd") and not is_last):
            return ""
        # The tokens just told are the context of the next ones.
        self._window, self._read = self._window[self._read :], len(self._window) - self._read
        return whole[len(told) :]

    def flush(self) -> str:
        return self._new_text(is_last=True) if len(self._window) > self._read else ""


def make_decoder(
    tokenizer: Tokenizer,
    *,
    context: Sequence[int] = (),
    skip_special_tokens: bool = True,
    spaces_between_special_tokens: bool = True,
) -> Decoder:
    """The decoder for a vocabulary. ``context``: the tokens before the first one pushed."""
    if tokenizer.is_bytewise:  # such vocabularies put no spaces between tokens
        return ByteDecoder(tokenizer, skip_special_tokens=skip_special_tokens)
    return ContextDecoder(
        tokenizer,
        context=context,
        skip_special_tokens=skip_special_tokens,
        spaces_between_special_tokens=spaces_between_special_tokens,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextParams:
    """How one choice's tokens become text, and which texts end it."""

    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0  # no stop string ends within the text of this many first tokens
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True


class StopFinder:
    """Finds the first stop string in text that arrives in pieces; holds back what may become one.

    Which one is found depends on the pieces only through their borders: the first piece that
    completes any; in it the match that starts first; of those the one listed first.
    """

    def __init__(self, stop: Sequence[str], *, include: bool) -> None:
        self._stop = tuple(stop)
        self._include = include
        self._longest = max((len(s) for s in self._stop), default=0)
        self._inner = frozenset(c for s in self._stop for c in s[:-1])
        self._tail = ""  # the last characters seen, at most `_longest - 1`
        self._num_held = 0  # of the tail, not yet let out

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """The text that may go out now, and the stop string that ended it, if one did."""
        if not self._stop or not text:
            return text, None
        seen = self._tail + text
        out_from = len(self._tail) - self._num_held
        if may_stop and (found := self._find(seen, len(self._tail))) is not None:
            start, stop = found
            end = start + len(stop) if self._include else start
            self._num_held = 0
            return seen[out_from : max(end, out_from)], stop
        held = 0 if self._include else self._overlap(seen)
        held = min(held, len(seen) - out_from)
        self._tail = seen[len(seen) - min(len(seen), self._longest - 1) :]
        self._num_held = held
        return seen[out_from : len(seen) - held], None

    def _find(self, seen: str, num_old: int) -> tuple[int, str] | None:
        best: tuple[int, str] | None = None
        for stop in self._stop:
            at = seen.find(stop, max(0, num_old - len(stop) + 1))
            if at >= 0 and (best is None or at < best[0]):
                best = at, stop
        return best

    def _overlap(self, seen: str) -> int:
        """Length of the longest end of ``seen`` that begins a stop string."""
        if seen[-1] not in self._inner:  # nearly always
            return 0
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(seen)), longest, -1):
                if seen.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def flush(self) -> str:
        """What was held back; nothing more will come."""
        held = self._tail[len(self._tail) - self._num_held :]
        self._num_held = 0
        return held


class Detokenizer:
    """The text of one choice: `push` its tokens one by one, then `flush`."""

    def __init__(
        self, tokenizer: Tokenizer, *, params: TextParams, context: Sequence[int] = ()
    ) -> None:
        self._decoder = make_decoder(
            tokenizer,
            context=context,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        self._finder = StopFinder(params.stop, include=params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self.num_tokens = 0
        self.num_chars = 0  # decoded so far, held back or not
        self.stopped_by: str | None = None

    def push(self, token_id: int) -> str:
        """Text that may go out. After it, `stopped_by` tells whether a stop string was found."""
        assert self.stopped_by is None, "the text has ended"
        self.num_tokens += 1
        text = self._decoder.push(token_id)
        self.num_chars += len(text)
        out, self.stopped_by = self._finder.push(text, may_stop=self.num_tokens > self._min_tokens)
        return out

    def push_free(self, token_id: int) -> str:
        """As `push`, where there are no stop strings."""
        self.num_tokens += 1
        text = self._decoder.push(token_id)
        self.num_chars += len(text)
        return text

    def flush(self) -> str:
        """All that was held back. A stop string completed only now still ends the text."""
        if self.stopped_by is not None:
            return ""
        text = self._decoder.flush()
        self.num_chars += len(text)
        out, self.stopped_by = self._finder.push(text, may_stop=self.num_tokens > self._min_tokens)
        return out if self.stopped_by is not None else out + self._finder.flush()
