"""Whether speculation leaves every token of real prompts as it is: a table of methods and settings.

    python -m benchmarks.spec_identity [--prompts 40] [--tokens 64] [--config NAME=JSON ...]

The prompts are those of tests/data, put to the default model as conversations, greedily and seeded
at T = 0.8, alone and in batches; tokens and log-probabilities are compared with those without
speculation. Ends with 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.engine.outputs import DraftStats
from octavo.llm import LLM

Config = Mapping[str, Any]  # of --speculative-config
METHODS: Mapping[str, Config] = {
    "auto": {"method": "auto"},
    "ngram": {"method": "ngram", "num_speculative_tokens": 5},
    "suffix": {"method": "suffix", "num_speculative_tokens": 5},
    "eagle3": {"method": "eagle3", "num_speculative_tokens": 5},
}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0},
    "T=0.8": {"temperature": 0.8, "seed": 11},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """So many of the prompts, in batches of so many."""

    batch: int
    num_prompts: int

    @property
    def title(self) -> str:
        return "alone" if self.batch == 1 else f"batch of {self.batch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one method did with one kind of request at one level."""

    method: str
    kind: str
    level: Level
    num_equal: int
    num_tokens: int
    drafts: DraftStats

    @property
    def is_right(self) -> bool:
        return self.num_equal == self.level.num_prompts

    def __str__(self) -> str:
        drafts = self.drafts
        return (
            f"{self.method:10} {self.kind:7} {self.level.title:12} "
            f"{self.num_equal:3} of {self.level.num_prompts} equal, {self.num_tokens:5} tokens, "
            f"{drafts.num_accepted_tokens:5} of {drafts.num_draft_tokens:5} drafts accepted"
        )


def engine(config: Config, **options: Any) -> LLM:
    """The default model on the CPU, with speculation as given."""
    return LLM(
        device="cpu",
        max_model_len=1536,
        num_gpu_blocks_override=1700,
        speculative_config=dict(config),
        **options,
    )


def answers(
    llm: LLM, talks: Sequence[str], *, kind: str, batch: int, max_tokens: int
) -> tuple[list[Any], DraftStats]:
    """(tokens and log-probabilities of each answer, what speculation did)."""
    prompts = [llm.render_chat([{"role": "user", "content": talk}]) for talk in talks]
    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    options = {"max_tokens": max_tokens, "logprobs": 1, **KINDS[kind]}
    found = [answer for group in groups for answer in llm.generate(group, **options)]
    drafts = sum((answer.outputs[0].draft_stats for answer in found), start=DraftStats())
    return [(answer.token_ids, answer.logprobs) for answer in found], drafts


def compare(
    talks: Sequence[str],
    methods: Mapping[str, Config],
    *,
    levels: Sequence[Level],
    max_tokens: int,
    make: Callable[[Config], LLM] = engine,
) -> Iterator[Cell]:
    """Every method in every setting, beside none in the same setting."""
    wants = {}
    plain = make({"method": "off"})
    for level in levels:
        for kind in KINDS:
            wants[level, kind], _ = answers(
                plain,
                talks[: level.num_prompts],
                kind=kind,
                batch=level.batch,
                max_tokens=max_tokens,
            )
    del plain
    for method, config in methods.items():
        llm = make(config)
        for (level, kind), want in wants.items():
            found, drafts = answers(
                llm,
                talks[: level.num_prompts],
                kind=kind,
                batch=level.batch,
                max_tokens=max_tokens,
            )
            yield Cell(
                method=method,
                kind=kind,
                level=level,
                num_equal=sum(a == b for a, b in zip(found, want, strict=True)),
                num_tokens=sum(len(tokens) for tokens, _ in found),
                drafts=drafts,
            )


def _named(text: str) -> tuple[str, Config]:
    name, is_given, config = text.partition("=")
    if not is_given:
        raise argparse.ArgumentTypeError(f"must be NAME=JSON, got {text!r}")
    return name, json.loads(config)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path(__file__).resolve().parents[1] / "tests" / "data" / "prompts.jsonl"
    parser.add_argument("--data", type=Path, default=data, help='JSONL with "text" in each line')
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--config", type=_named, action="append", default=[], metavar="NAME=JSON")
    args = parser.parse_args(argv)
    talks = [json.loads(line)["text"] for line in args.data.read_text().splitlines()]
    talks = talks[: args.prompts]
    methods = {name: METHODS[name] for name in args.methods} | dict(args.config)
    levels = [Level(batch=batch, num_prompts=len(talks)) for batch in args.batches]
    is_right = True
    for cell in compare(talks, methods, levels=levels, max_tokens=args.tokens):
        print(cell, flush=True)
        is_right &= cell.is_right
    return 0 if is_right else 1


if __name__ == "__main__":
    raise SystemExit(main())
