"""Turns a GGUF vocabulary into tokenizer.json and tokenizer_config.json.

Knows llama.cpp's vocabulary metadata and the tokenizers file format; writes plain dicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
# How text is cut before merging, by tokenizer.ggml.pre; None = GPT-2's own rule.
_PATTERNS: Mapping[str, str | None] = {
    "gpt2": None,
    "llama3": _CONTRACTIONS + _WORD + r"|\p{N}{1,3}" + _TAIL,
    "qwen2": _CONTRACTIONS + _WORD + r"|\p{N}" + _TAIL,
    "tekken": _CASED_WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "digits": None,
}
_PRE: Mapping[str, str] = {
    "default": "gpt2",
    "gpt-2": "gpt2",
    "phi-2": "gpt2",
    "mpt": "gpt2",
    "olmo": "gpt2",
    "dbrx": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "llama-bpe": "llama3",
    "smaug-bpe": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "stablelm2": "qwen2",
    "tekken": "tekken",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "command-r": "digits",
    "codeshell": "digits",
}
_BYTE_LEVEL_DECODER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
_BOS_BY_DEFAULT = ("llama3", "tekken")  # patterns whose models begin every text with BOS
_WHOLE_WORDS_FIRST = ("llama3", "tekken")  # a word in the vocabulary is not merged again


def tokenizer_from_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json dict of a GGUF vocabulary: GPT-2 style BPE (``gpt2``) or SentencePiece BPE
    (``llama``). Raises `ValueError` naming what is missing or unknown."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError(
            "the GGUF file has no vocabulary (tokenizer.ggml.tokens); pass --tokenizer"
        )
    types = [int(t) for t in metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))]
    if len(types) != len(tokens):
        raise ValueError(f"the GGUF file has {len(tokens)} tokens but {len(types)} token types")
    if kind == "gpt2":
        return _byte_level(metadata, tokens=tokens, types=types)
    if kind == "llama":
        return _sentencepiece(metadata, tokens=tokens, types=types)
    raise ValueError(
        f"GGUF tokenizer.ggml.model must be gpt2 or llama, got {kind!r}; pass --tokenizer"
    )


def tokenizer_config_from_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json dict: special tokens by role and the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds_bos(metadata),
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    }
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for role, ours in roles.items():
        index = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if index is not None and 0 <= index < len(tokens):
            config[f"{ours}_token"] = tokens[index]
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def dummy_tokenizer(vocab_size: int) -> dict[str, Any]:
    """tokenizer.json dict for a model of random weights that came without one.

    Bytes are tokens 0 to 255; every other id is a word of its own, so whatever such a model
    generates is text.
    """
    if vocab_size < 256:
        raise ValueError(f"the folder has no tokenizer and vocab_size is {vocab_size}, below 256")
    words = {name: i for i, name in enumerate(_byte_names())}
    words.update((f"Ġt{i}", i) for i in range(256, vocab_size))
    return _assemble(
        model={"vocab": words, "merges": []},
        added=[],
        pre_tokenizer=_byte_level_step(use_regex=True),
        decoder=_BYTE_LEVEL_DECODER,
    )


def _pattern_name(metadata: Mapping[str, Any]) -> str:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE:
        raise ValueError(
            f"unknown GGUF tokenizer.ggml.pre {pre!r}; known are {', '.join(_PRE)}; "
            "pass --tokenizer"
        )
    return _PRE[pre]


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    spm = metadata.get("tokenizer.ggml.model") == "llama"
    default = spm or _pattern_name(metadata) in _BOS_BY_DEFAULT
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _byte_level(
    metadata: Mapping[str, Any], *, tokens: list[str], types: list[int]
) -> dict[str, Any]:
    name = _pattern_name(metadata)
    merges = metadata.get("tokenizer.ggml.merges")
    if not merges:
        raise ValueError("the GGUF file has no merges (tokenizer.ggml.merges); pass --tokenizer")
    steps: list[dict[str, Any]] = []
    pattern = _PATTERNS[name]
    if name == "digits":
        steps.append({"type": "Digits", "individual_digits": True})
    elif pattern is not None:
        steps.append(
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            }
        )
    steps.append(_byte_level_step(use_regex=pattern is None))
    return _assemble(
        model={
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in merges],
            "ignore_merges": name in _WHOLE_WORDS_FIRST,
        },
        added=_added_tokens(tokens, types),
        normalizer={"type": "NFC"} if name == "qwen2" else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder=_BYTE_LEVEL_DECODER,
        post_processor=_post_processor(metadata, tokens),
    )


def _sentencepiece(
    metadata: Mapping[str, Any], *, tokens: list[str], types: list[int]
) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ValueError("the GGUF file has no scores (tokenizer.ggml.scores); pass --tokenizer")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, replace] if prefix else [replace]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    return _assemble(
        model={
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _merges_by_score(tokens, types=types, scores=scores),
            "unk_token": tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
        },
        added=_added_tokens(tokens, types),
        normalizer={"type": "Sequence", "normalizers": steps},
        decoder={"type": "Sequence", "decoders": decoders},
        post_processor=_post_processor(metadata, tokens),
    )


def _merges_by_score(tokens: list[str], *, types: list[int], scores: Any) -> list[list[str]]:
    """SentencePiece merges whichever pair makes the best-scored piece: each way to cut a piece in
    two pieces is a merge, ranked by the score of the whole."""
    pieces = {token: i for i, token in enumerate(tokens) if types[i] in (_NORMAL, _USER_DEFINED)}
    ranked: list[tuple[float, int, int, list[str]]] = []
    for token, index in pieces.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in pieces and right in pieces:
                rank = (-float(scores[index]), pieces[left], pieces[right])
                ranked.append((*rank, [left, right]))
    ranked.sort(key=lambda item: item[:3])
    return [merge for *_, merge in ranked]


def _added_tokens(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        # A user-defined run of spaces is a piece like others: text never holds its "▁".
        if kind in (_UNKNOWN, _CONTROL) or (kind == _USER_DEFINED and "▁" not in token)
    ]


def _post_processor(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    names = []
    if _adds_bos(metadata):
        names.append("bos")
    if metadata.get("tokenizer.ggml.add_eos_token", False):
        names.append("eos")
    if not names:
        return None
    ids: dict[str, int] = {}
    for name in names:
        index = metadata.get(key := f"tokenizer.ggml.{name}_token_id")
        if index is None or not 0 <= index < len(tokens):
            raise ValueError(f"GGUF metadata must have {key} below {len(tokens)}, got {index}")
        ids[name] = index
    marks = {name: {"SpecialToken": {"id": tokens[ids[name]], "type_id": 0}} for name in names}

    def around(texts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        begin = [marks["bos"]] if "bos" in marks else []
        return begin + texts + ([marks["eos"]] if "eos" in marks else [])

    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": around([first]),
        "pair": around([first]) + around([second]),
        "special_tokens": {
            tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in ids.values()
        },
    }


def _byte_level_step(*, use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _byte_names() -> list[str]:
    """GPT-2's printable stand-in for each byte, 0 to 255."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def _assemble(
    *,
    model: dict[str, Any],
    added: list[dict[str, Any]],
    decoder: dict[str, Any],
    normalizer: dict[str, Any] | None = None,
    pre_tokenizer: dict[str, Any] | None = None,
    post_processor: dict[str, Any] | None = None,
) -> dict[str, Any]:
    defaults = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": {**defaults, **model},
    }
