"""Text to token ids and back, for one model. Knows its tokenizer files; no templates, no requests.

Built on `tokenizers` alone: importing transformers would cost the server seconds at start.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer as Backend

from octavo.checkpoint.cache import cached_folder

log = logging.getLogger(__name__)

# Encoding longer texts would hold the event loop for more than about a millisecond.
_LONG_TEXT = 4_000
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_SPM_SPACE = "\u2581"


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level vocabularies: character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


def _decoder_kind(decoder: dict[str, Any] | None) -> str:
    """How tokens become bytes: 'byte_level', 'spm' (with byte fallback) or 'other'."""
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    names = {step["type"] for step in steps}
    if names and names <= {"ByteLevel", "Fuse"} and "ByteLevel" in names:
        return "byte_level"
    if names and names <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        replaces = [s for s in steps if s["type"] == "Replace"]
        plain = all(
            s["pattern"] == {"String": _SPM_SPACE} and s["content"] == " " for s in replaces
        )
        if plain and (replaces or "Metaspace" in names):
            return "spm"
    return "other"


def _content(token: Any) -> str | None:
    """A special token of tokenizer_config.json: a string, or an object with ``content``."""
    return token.get("content") if isinstance(token, dict) else token


class Tokenizer:
    """One model's tokenizer. Immutable after construction; safe to share between threads."""

    def __init__(
        self,
        backend: Backend,
        *,
        config: dict[str, Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        """``config``: the content of tokenizer_config.json. ``folder``: where it was read."""
        self._backend = backend
        self.folder = folder
        self.config = config or {}
        decoder = backend.decoder  # its state is its part of tokenizer.json
        self._kind = _decoder_kind(decoder and json.loads(decoder.__getstate__()))
        self._byte_of = _byte_alphabet()
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        named = {name: _content(self.config.get(name)) for name in _NAMED_TOKENS}
        self.named_tokens = {name: token for name, token in named.items() if token is not None}
        self._bytes: dict[int, bytes] = {}
        # For decoders, which fill them: texts of tokens that are whole characters, whatever comes
        # before them; with special tokens, and without them (nothing is their text).
        self.whole_texts: tuple[dict[int, str], dict[int, str]] = ({}, {})

    @classmethod
    def from_dir(cls, folder: Path | str) -> Tokenizer:
        """Reads tokenizer.json and its companions. A folder without one is converted through
        transformers, once: the result is kept in the user's cache. Raises ValueError."""
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            folder = _converted(folder)
            file = folder / "tokenizer.json"
        config_file = folder / "tokenizer_config.json"
        try:
            config = json.loads(config_file.read_text("utf-8")) if config_file.is_file() else {}
            special = folder / "special_tokens_map.json"
            if special.is_file():
                config = {**json.loads(special.read_text("utf-8")), **config}
            backend = Backend.from_file(str(file))
        except Exception as error:
            raise ValueError(f"cannot read the tokenizer in {folder}: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, config=config, folder=folder)

    @cached_property
    def vocab_size(self) -> int:
        """The highest token id and one; the model's own vocabulary may be larger."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def _most_chars(self) -> int:
        """Characters of text that one token may stand for, at the very most. Normalisers may
        compose some: four times the longest entry is beyond them."""
        return 4 * max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    def least_tokens(self, text: str) -> int:
        """A number of tokens ``text`` surely has, without encoding it."""
        return len(text) // self._most_chars if self.is_bytewise else 0

    # ---- text -> ids -----------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written out in it count as such.
        ``add_special_tokens``: with what tokenizer.json's post-processor adds, such as BOS; as in
        transformers, tokenizer_config.json has no say in it. Raises UnicodeEncodeError (a
        ValueError) for a lone surrogate, which is no text."""
        if not text.isascii():
            text.encode("utf-8")
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """As `encode`; long texts in a thread, so that the event loop goes on meanwhile."""
        if len(text) < _LONG_TEXT:
            return self.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens=add_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """The id of one vocabulary entry, as spelled in the vocabulary."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    # ---- ids -> text -----------------------------------------------------------------------

    @property
    def is_bytewise(self) -> bool:
        """Whether text is the concatenation of the tokens' bytes (`token_bytes`)."""
        return self._kind != "other"

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The whole text of ``ids``. Ids outside the vocabulary give nothing."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str:
        """The vocabulary entry as spelled there; an unused id gives an empty string."""
        entry: str | None = self._backend.id_to_token(token_id)
        return "" if entry is None else entry

    def is_added(self, token_id: int) -> bool:
        """Whether the token stands outside the model's vocabulary proper (special or not)."""
        return token_id in self._added

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes the token stands for; may be a part of a character."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """The token alone as text; U+FFFD for parts of characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _find_bytes(self, token_id: int) -> bytes:
        token = self.token(token_id)
        if token_id in self._added:
            return token.encode("utf-8")
        if self._kind == "byte_level":
            if all(c in self._byte_of for c in token):
                return bytes(self._byte_of[c] for c in token)
            return token.encode("utf-8")
        if self._kind == "spm":
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace(_SPM_SPACE, " ").encode("utf-8")
        return self.decode([token_id], skip_special_tokens=False).encode("utf-8")


def _converted(folder: Path) -> Path:
    """A folder with the tokenizer of ``folder`` as tokenizer.json, made by transformers once."""
    files = sorted(p for p in folder.glob("*") if p.suffix in {".json", ".model", ".txt"})
    stamp = [f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files]
    made_of = f"{tokenizers.__version__} {folder.resolve()} {stamp}"
    key = hashlib.sha256(made_of.encode()).hexdigest()[:24]

    def convert(target: Path) -> None:
        # Lazy: transformers takes seconds to import and few models need it.
        from transformers import AutoTokenizer

        log.info("converting the tokenizer of %s, once", folder)
        try:
            AutoTokenizer.from_pretrained(str(folder)).save_pretrained(str(target))
        except Exception as error:
            raise ValueError(
                f"no tokenizer.json in {folder}, and transformers cannot convert what is there: "
                f"{error}"
            ) from error
        if not (target / "tokenizer.json").is_file():
            raise ValueError(f"the tokenizer in {folder} has no fast (tokenizer.json) form")

    return cached_folder(f"tokenizers/{key}", build=convert)
