"""Prompts for benchmarks: made up from a seed, or read from a file. Knows a tokenizer, no server.

Every data set is a function of its seed and options: the same prompts in every run and process.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.flags import flag_name, parse_int

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer

_WORD = re.compile(r" [A-Za-z]+")
# As vLLM filters ShareGPT: shorter or longer conversations say little about serving.
_SHORTEST, _LONGEST_PROMPT, _LONGEST = 4, 1024, 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of a data set and how much is to be generated for it."""

    text: str
    num_tokens: int
    output_len: int


def add_dataset_flags(parser: argparse.ArgumentParser, *, num_prompts: int = 1000) -> None:
    """vLLM's flags for the data sets we have."""
    group = parser.add_argument_group("data set")
    add = group.add_argument
    add("--dataset-name", choices=tuple(DATASETS), default="random", help="where prompts are from")
    add("--dataset-path", help="file of sharegpt (JSON) and custom (JSON lines) data sets")
    add("--num-prompts", type=parse_int, default=num_prompts, help=f"default {num_prompts}")
    add("--seed", type=int, default=0, help="of the data set and of arrivals; default 0")
    add("--no-oversample", action="store_true", help="do not repeat a data set that is too small")
    add("--disable-shuffle", action="store_true", help="keep the file's order")
    add("--input-len", type=parse_int, help="prompt tokens, for every data set that makes them up")
    add("--output-len", type=parse_int, help="tokens to generate, whatever the data set says")
    add("--random-input-len", type=parse_int, default=1024, help="prompt tokens; default 1024")
    add("--random-output-len", type=parse_int, default=128, help="default 128")
    add(
        "--random-range-ratio",
        type=float,
        default=0.0,
        help="lengths are drawn from length * [1 - r, 1 + r]; default 0",
    )
    add("--random-prefix-len", type=parse_int, default=0, help="tokens all prompts share")
    add("--sharegpt-output-len", type=parse_int, help="default the answer's own length")
    add("--custom-output-len", type=parse_int, default=256, help="default 256")
    add("--prefix-repetition-prefix-len", type=parse_int, default=256, help="default 256")
    add("--prefix-repetition-suffix-len", type=parse_int, default=256, help="default 256")
    add("--prefix-repetition-num-prefixes", type=parse_int, default=10, help="default 10")
    add("--prefix-repetition-output-len", type=parse_int, default=128, help="default 128")


def load_dataset(args: argparse.Namespace, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts that flags ask for. Raises ValueError."""
    if args.num_prompts < 1:
        raise ValueError(f"--num-prompts must be at least 1, got {args.num_prompts}")
    for name in ("input_len", "output_len", "random_input_len", "random_output_len"):
        if (length := getattr(args, name)) is not None and length < 1:
            raise ValueError(f"{flag_name(name)} must be at least 1, got {length}")
    if not 0 <= args.random_range_ratio < 1:
        raise ValueError(
            f"--random-range-ratio must be from 0 to below 1, got {args.random_range_ratio}"
        )
    prompts = DATASETS[args.dataset_name](args, tokenizer)
    if not prompts:
        raise ValueError(f"the {args.dataset_name} data set has no usable prompt")
    rng = random.Random(args.seed)
    if len(prompts) < args.num_prompts and not args.no_oversample:
        prompts = prompts + rng.choices(prompts, k=args.num_prompts - len(prompts))
    return prompts[: args.num_prompts]


class WordSource:
    """Random text of an exact number of tokens.

    It strings together vocabulary entries that are one whole word with its leading space: they
    are encoded back to themselves whatever stands beside them, which random ids are not.
    """

    def __init__(self, tokenizer: Tokenizer, *, seed: int) -> None:
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._num_special = len(tokenizer.encode(""))
        self._is_word: dict[int, bool] = {}

    def ids(self, count: int) -> list[int]:
        """`count` random whole-word tokens."""
        found: list[int] = []
        for _ in range(1000 * count + 1000):
            if len(found) == count:
                return found
            token_id = self._rng.randrange(self._tokenizer.vocab_size)
            if self._check(token_id):
                found.append(token_id)
        raise ValueError("the tokenizer has too few whole-word tokens to make random prompts")

    def _check(self, token_id: int) -> bool:
        known = self._is_word.get(token_id)
        if known is None:
            text = self._tokenizer.token_text(token_id)
            known = (
                _WORD.fullmatch(text) is not None
                and self._tokenizer.encode(f"a{text}{text} a", add_special_tokens=False).count(
                    token_id
                )
                == 2
            )
            self._is_word[token_id] = known
        return known

    def text(self, ids: Sequence[int], *, total: int) -> tuple[str, int]:
        """Text of `ids`, shortened or extended until it encodes to `total` tokens, those that the
        tokenizer adds included; the text and the number it has in the end."""
        wanted = list(ids)[: max(1, total - self._num_special)]
        text, length = "", 0
        for _ in range(8):
            text = "".join(self._tokenizer.token_text(i) for i in wanted)
            length = len(self._tokenizer.encode(text))
            if length == total or len(wanted) <= 1 and length > total:
                break
            wanted = (
                wanted[: total - length] if length > total else wanted + self.ids(total - length)
            )
        return text, length

    def length(self, mean: int, *, ratio: float) -> int:
        """A length around `mean`; every length within the ratio is as likely."""
        return self._rng.randint(max(1, int(mean * (1 - ratio))), max(1, int(mean * (1 + ratio))))


def _random(args: argparse.Namespace, tokenizer: Tokenizer) -> list[Prompt]:
    source = WordSource(tokenizer, seed=args.seed)
    input_len = args.input_len or args.random_input_len
    output_len = args.output_len or args.random_output_len
    prefix = source.ids(args.random_prefix_len)
    prompts = []
    for _ in range(args.num_prompts):
        length = source.length(input_len, ratio=args.random_range_ratio)
        ids = [*prefix, *source.ids(length)]
        prompts.append(
            _made(
                source,
                ids,
                total=len(prefix) + length,
                output_len=source.length(output_len, ratio=args.random_range_ratio),
            )
        )
    return prompts


def _made(source: WordSource, ids: Sequence[int], *, total: int, output_len: int) -> Prompt:
    text, length = source.text(ids, total=total)
    return Prompt(text=text, num_tokens=length, output_len=output_len)


def _prefix_repetition(args: argparse.Namespace, tokenizer: Tokenizer) -> list[Prompt]:
    source = WordSource(tokenizer, seed=args.seed)
    prefix_len, suffix_len = args.prefix_repetition_prefix_len, args.prefix_repetition_suffix_len
    output_len = args.output_len or args.prefix_repetition_output_len
    num_prefixes = args.prefix_repetition_num_prefixes
    if not 1 <= num_prefixes <= args.num_prompts:
        raise ValueError(
            f"--prefix-repetition-num-prefixes must be from 1 to --num-prompts "
            f"({args.num_prompts}), got {num_prefixes}"
        )
    prefixes = [source.ids(prefix_len) for _ in range(num_prefixes)]
    prompts = [
        _made(
            source,
            [*prefixes[i % num_prefixes], *source.ids(suffix_len)],
            total=prefix_len + suffix_len,
            output_len=output_len,
        )
        for i in range(args.num_prompts)
    ]
    if not args.disable_shuffle:
        random.Random(args.seed).shuffle(prompts)
    return prompts


def _path(args: argparse.Namespace) -> Path:
    if args.dataset_path is None:
        raise ValueError(f"--dataset-name {args.dataset_name} needs --dataset-path")
    path = Path(args.dataset_path)
    if not path.is_file():
        raise ValueError(f"--dataset-path {path}: no such file")
    return path


def _sharegpt(args: argparse.Namespace, tokenizer: Tokenizer) -> list[Prompt]:
    try:
        entries = json.loads(_path(args).read_text("utf-8"))
        talks = [e["conversations"] for e in entries if len(e.get("conversations", ())) >= 2]
        pairs = [(talk[0]["value"], talk[1]["value"]) for talk in talks]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{args.dataset_path} is no ShareGPT file (a JSON list of objects with "
            f"conversations: [{{value}}, {{value}}]): {error!r}"
        ) from None
    if not args.disable_shuffle:
        random.Random(args.seed).shuffle(pairs)
    fixed = args.output_len or args.sharegpt_output_len
    prompts: list[Prompt] = []
    for question, answer in pairs:
        if len(prompts) == args.num_prompts:
            break
        num_tokens = len(tokenizer.encode(question))
        output_len = fixed or len(tokenizer.encode(answer, add_special_tokens=False))
        is_short = num_tokens < _SHORTEST or (fixed is None and output_len < _SHORTEST)
        if is_short or num_tokens > _LONGEST_PROMPT or num_tokens + output_len > _LONGEST:
            continue
        prompts.append(Prompt(text=question, num_tokens=num_tokens, output_len=output_len))
    return prompts


def _custom(args: argparse.Namespace, tokenizer: Tokenizer) -> list[Prompt]:
    entries: list[tuple[str, int]] = []
    with _path(args).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                entries.append(_custom_entry(line, number=number, args=args))
    if not args.disable_shuffle:
        random.Random(args.seed).shuffle(entries)
    return [
        Prompt(text=text, num_tokens=len(tokenizer.encode(text)), output_len=output_len)
        for text, output_len in entries[: args.num_prompts]
    ]


def _custom_entry(line: str, *, number: int, args: argparse.Namespace) -> tuple[str, int]:
    """(prompt, tokens to generate) of one line: ``prompt``, or the first of ``turns``."""
    where = f"{args.dataset_path}, line {number}"
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, got {type(entry).__name__}")
    turns = entry.get("turns")
    text = entry.get("prompt", turns[0] if isinstance(turns, list) and turns else None)
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where}: expected a text in 'prompt' or 'turns'")
    output_len = args.output_len or entry.get("output_tokens") or args.custom_output_len
    if not isinstance(output_len, int) or output_len < 1:
        raise ValueError(f"{where}: output_tokens must be a positive number, got {output_len!r}")
    return text, output_len


DATASETS: Mapping[str, Callable[[argparse.Namespace, Tokenizer], list[Prompt]]] = {
    "random": _random,
    "sharegpt": _sharegpt,
    "prefix_repetition": _prefix_repetition,
    "custom": _custom,
}
