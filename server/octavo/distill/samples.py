"""Texts to learn from: prompts of files or of the model's own making, and its answers to them.

Knows the engine as something that generates; knows no head. Answers are kept in a file of JSON
lines as they come, so a run that was cut off goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from octavo.distill.options import DataConfig

if TYPE_CHECKING:
    from octavo.llm import LLM

# How a user's message may begin. The model goes on from there, as the user; the empty ones leave
# even that to it.
_OPENINGS = (
    *[""] * 4, "Write", "Write a", "Explain", "How", "What", "Why", "Can you", "Imagine",
    "Imagine you are", "Describe", "Give me", "Create", "Compare", "Summarize", "Solve", "If",
    "Please", "I", "Suppose", "Design", "Implement a", "Write a Python function", "Compose",
    "Act as", "Pretend", "Extract", "Analyze", "Discuss", "Rewrite", "Help me", "List", "Tell me",
    "Edit the following", "Given", "Evaluate", "Which", "Is", "Calculate", "Develop", "The", "Let",
    "Could you", "You are", "Provide", "A", "In", "Identify", "Draft", "Write an email", "Embody",
    "Complete the following Python function:\n\n```python\ndef", "Write a Python function",
    "Complete this function:\n\nfrom typing import List\n\n\ndef", "Write a function in Python",
)  # fmt: skip
# What a user may ask of a text that follows; such texts are earlier answers.
_ABOUT_A_TEXT = (
    "Summarize the following article.", "Summarize:", "What are the main points of this text?",
    "Rewrite the following text in simpler words.", "Improve this text.", "TL;DR of the text below",
)  # fmt: skip
_ABOUT_A_TEXT_SHARE = 0.1
_TEXTS_KEPT = 256
_TEXT_CHARACTERS = 300, 2000
_ROUND = 96  # answers generated together and then written
_OWN_PROMPT_TOKENS, _OWN_TEXT_TOKENS = 160, 16
_OWN_PROMPT_SAMPLING = {"temperature": 1.0, "top_p": 0.95}
_SHORTEST = 8  # characters of a prompt, tokens of an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt and the target's answer."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    temperature: float

    @property
    def all_ids(self) -> tuple[int, ...]:
        return self.prompt_token_ids + self.token_ids


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: a line each, or JSON lines. Raises ValueError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts cannot be read: {error}") from error
    found = [
        line if path.suffix == ".txt" else _prompt(line, where=f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return found


def _prompt(line: str, *, where: str) -> str:
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, got {type(entry).__name__}")
    turns = entry.get("turns")
    first = turns[0] if isinstance(turns, list) and turns else None
    text = entry.get("prompt", entry.get("text", first))
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where}: expected a text in 'prompt', 'text' or 'turns'")
    return text


def read_samples(path: Path) -> list[Sample]:
    """Answers of a file that `write_samples` wrote. Raises ValueError naming file and line."""
    samples: list[Sample] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"generated texts cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            prompt, answer = (_ids(entry[name]) for name in ("prompt_token_ids", "token_ids"))
            samples.append(
                Sample(
                    prompt_token_ids=prompt,
                    token_ids=answer,
                    temperature=float(entry["temperature"]),
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no generated text: {error!r}") from None
    return samples


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise ValueError("token ids must be whole numbers")
    return tuple(value)


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Adds lines to a file."""
    with path.open("a", encoding="utf-8") as file:
        for sample in samples:
            entry = {
                "prompt_token_ids": sample.prompt_token_ids,
                "token_ids": sample.token_ids,
                "temperature": sample.temperature,
            }
            file.write(json.dumps(entry) + "\n")


class Author:
    """Has the engine write prompts and answers."""

    def __init__(self, llm: LLM, *, max_new_tokens: int) -> None:
        self._llm = llm
        self._max_new_tokens = max_new_tokens
        self._texts: deque[str] = deque(maxlen=_TEXTS_KEPT)
        try:
            chats = [llm.render_chat([{"role": "user", "content": text}]) for text in ("Q", "7")]
        except ValueError:
            chats = []
        self._is_chat = bool(chats)
        # What stands before every user's message.
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*chats, strict=False))
        self._chat_head = tuple(pair[0] for pair in same)

    def encode(self, prompt: str) -> tuple[int, ...]:
        """A message to the model where it has a chat template, else the text itself."""
        if self._is_chat:
            return self._llm.render_chat([{"role": "user", "content": prompt}])
        return tuple(self._llm.tokenizer.encode(prompt))

    def own_prompts(self, count: int, *, rng: random.Random) -> list[tuple[int, ...]]:
        """At most ``count`` prompts as the model itself makes them up at temperature 1: what it
        takes for a user's message, or texts from nothing where it has no chat template. A tenth
        asks something of one of its earlier answers, as soon as there are some."""
        prompts: list[tuple[int, ...]] = []
        if self._is_chat and self._texts:
            prompts = [self._about_a_text(rng) for _ in range(int(count * _ABOUT_A_TEXT_SHARE))]
        openings = [rng.choice(_OPENINGS) for _ in range(count - len(prompts))]
        num_tokens = _OWN_PROMPT_TOKENS if self._is_chat else _OWN_TEXT_TOKENS
        room = max(self._llm.info.max_model_len - num_tokens, 1)
        begun = [self._begin(opening)[:room] for opening in openings]
        sampling = {**_OWN_PROMPT_SAMPLING, "max_tokens": num_tokens}
        params = [{**sampling, "seed": rng.getrandbits(31)} for _ in begun]
        written = self._llm.generate(begun, params)
        for opening, start, generation in zip(openings, begun, written, strict=True):
            text = (opening + generation.text).strip()
            if not self._is_chat:
                prompts.append((*start, *generation.token_ids))
            elif len(text) >= _SHORTEST:
                prompts.append(self.encode(text))
        return prompts

    def _about_a_text(self, rng: random.Random) -> tuple[int, ...]:
        return self.encode(f"{rng.choice(_ABOUT_A_TEXT)}\n\n{rng.choice(self._texts)}")

    def _begin(self, opening: str) -> tuple[int, ...]:
        if self._is_chat:
            written = self._llm.tokenizer.encode(opening, add_special_tokens=False)
            return (*self._chat_head, *written)
        return tuple(self._llm.tokenizer.encode(opening or "The"))

    def greedy(self, texts: Sequence[str]) -> list[Sample]:
        """Answers to prompts at temperature 0."""
        return self.answer([(self.encode(text), 0.0) for text in texts], rng=random.Random(0))

    def answer(
        self, prompts: Sequence[tuple[tuple[int, ...], float]], *, rng: random.Random
    ) -> list[Sample]:
        """The target's answers to prompts, each at its temperature; those too short are left out,
        and prompts that leave no room for one."""
        room = self._llm.info.max_model_len - self._max_new_tokens
        fitting = [(ids, temperature) for ids, temperature in prompts if 1 < len(ids) <= room]
        params = [
            {"temperature": t, "max_tokens": self._max_new_tokens, "seed": rng.getrandbits(31)}
            for _, t in fitting
        ]
        answers = self._llm.generate([ids for ids, _ in fitting], params)
        shortest, longest = _TEXT_CHARACTERS
        self._texts.extend(a.text[:longest] for a in answers if len(a.text) >= shortest)
        return [
            Sample(prompt_token_ids=ids, token_ids=answer.token_ids, temperature=temperature)
            for (ids, temperature), answer in zip(fitting, answers, strict=True)
            if len(answer.token_ids) >= _SHORTEST
        ]


def generate_samples(
    open_author: Callable[[], Author],
    *,
    config: DataConfig,
    path: Path,
    seed: int,
    show_bar: bool,
) -> list[Sample]:
    """``num_samples`` answers, those in the file first; new ones are added to it.

    Prompts of files get an answer at each temperature, the rest are of the model's own making.
    """
    samples = read_samples(path) if path.is_file() else []
    if len(samples) >= config.num_samples:
        return samples[: config.num_samples]
    texts = [text for name in config.prompts for text in read_prompts(Path(name))]
    author = open_author()
    rng = random.Random(f"{seed}-{len(samples)}")
    rounds = _rounds(author, texts, temperatures=config.temperatures, done=len(samples), rng=rng)
    with tqdm(
        total=config.num_samples, initial=len(samples), desc="answers", disable=not show_bar
    ) as bar:
        while len(samples) < config.num_samples:
            new = author.answer(next(rounds), rng=rng)[: config.num_samples - len(samples)]
            write_samples(path, new)
            samples += new
            bar.update(len(new))
    return samples


def _rounds(
    author: Author,
    texts: Sequence[str],
    *,
    temperatures: Sequence[float],
    done: int,
    rng: random.Random,
) -> Iterator[list[tuple[tuple[int, ...], float]]]:
    """Prompts and their temperatures, a round at a time, without the first ``done``."""
    kinds = list(dict.fromkeys(temperatures))
    given = [(text, temperature) for temperature in kinds for text in texts][done:]
    for start in range(0, len(given), _ROUND):
        yield [(author.encode(text), t) for text, t in given[start : start + _ROUND]]
    while True:
        prompts = author.own_prompts(_ROUND, rng=rng)
        yield [(ids, rng.choice(list(temperatures))) for ids in prompts]


def draft_vocabulary(samples: Sequence[Sample], *, size: int, vocab_size: int) -> list[int]:
    """The most frequent tokens of the answers, rising; equally frequent ones by their id."""
    counts = np.zeros(vocab_size, np.int64)
    for sample in samples:
        np.add.at(counts, np.asarray(sample.token_ids, np.int64), 1)
    best = np.argsort(-counts, kind="stable")[: min(size, vocab_size)]
    return sorted(best.tolist())
