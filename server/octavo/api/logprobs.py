"""Log-probabilities in the formats clients expect. Knows tokens and JSON; nothing of requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo.text.detokenizer import TextParams, make_decoder
from octavo.text.tokenizer import Tokenizer
from octavo.types import TokenLogprobs

_LOWEST = -9999.0  # stands for minus infinity, which JSON has not


class LogprobFormat:
    """Formats for one response. ``as_token_ids``: tokens as ``token_id:123``, which is unambiguous
    where texts are not."""

    def __init__(self, tokenizer: Tokenizer, *, as_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_token_ids

    def _token(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._token(token_id),
            "logprob": max(logprob, _LOWEST),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }

    def chat(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """``{"content": [{token, logprob, bytes, top_logprobs}], "refusal": null}``"""
        content = [
            {
                **self._entry(entry.token_id, entry.logprob),
                "top_logprobs": [self._entry(*top) for top in entry.top],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def completion(
        self, entries: Sequence[TokenLogprobs | int], offsets: Sequence[int]
    ) -> dict[str, Any]:
        """``{text_offset, token_logprobs, tokens, top_logprobs}``, parallel lists. An entry that is
        only a token id (a prompt's first) has no probability."""
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for entry in entries:
            if isinstance(entry, int):
                tokens.append(self._token(entry))
                values.append(None)
                tops.append(None)
                continue
            token, value = self._token(entry.token_id), max(entry.logprob, _LOWEST)
            tokens.append(token)
            values.append(value)
            top = {self._token(i): max(other, _LOWEST) for i, other in reversed(entry.top)}
            top = dict(reversed(top.items()))  # of tokens with one text, the likeliest stays
            top.setdefault(token, value)  # the chosen token is always among them
            tops.append(top)
        return {
            "text_offset": list(offsets),
            "token_logprobs": values,
            "tokens": tokens,
            "top_logprobs": tops,
        }

    def prompt(self, entries: Sequence[TokenLogprobs]) -> list[dict[str, Any] | None]:
        """Per prompt token: null for the first, then ``{token id: {logprob, rank,
        decoded_token}}`` of the token itself and the likeliest."""
        listed: list[dict[str, Any] | None] = [None]
        for entry in entries:
            ranked = [(entry.token_id, entry.logprob, entry.rank)]  # first, as clients count on
            ranked += [
                (i, value, rank)
                for rank, (i, value) in enumerate(entry.top, 1)
                if i != entry.token_id
            ]
            listed.append(
                {
                    str(i): {
                        "logprob": max(value, _LOWEST),
                        "rank": rank,
                        "decoded_token": self._tokenizer.token_text(i),
                    }
                    for i, value, rank in ranked
                }
            )
        return listed


def prompt_text(
    tokenizer: Tokenizer, token_ids: Sequence[int], *, given: str | None, params: TextParams
) -> tuple[str, list[int]]:
    """The text to echo (``given`` verbatim, if it is text) and where in it each token begins."""
    skip = given is None and params.skip_special_tokens
    decoder = make_decoder(tokenizer, skip_special_tokens=skip)
    offsets: list[int] = []
    pieces: list[str] = []
    length = 0
    for position, token_id in enumerate(token_ids):
        offsets.append(length)
        is_put_before = (
            position == 0
            and given is not None
            and token_id in tokenizer.special_ids
            and not given.startswith(tokenizer.token(token_id))
        )
        if not is_put_before:  # a BOS that the tokenizer added is not in the text
            pieces.append(decoder.push(token_id))
            length += len(pieces[-1])
    pieces.append(decoder.flush())
    return ("".join(pieces) if given is None else given), offsets
