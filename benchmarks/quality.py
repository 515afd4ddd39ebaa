"""What quantised weights cost: perplexity of real texts in every mode, beside the exact one.

    python -m benchmarks.quality --prompts ../shared/data/prompts_sum.jsonl [--write]

A text is scored by the engine itself, as prompt log-probabilities. A mode is a value of
``--quantization``, or that and one of ``--kv-cache-dtype`` with a slash between; the first is what
the others are held against, text by text. Any JSONL file will do whose lines have ``text``, or
``turns`` of which the first is taken.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import keep_row, passport
from octavo.llm import LLM

MODES = "none,auto,int8,int4"
_AT_ONCE = 16  # texts


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Of all texts, in their order."""

    texts: tuple[tuple[float, ...], ...]  # log-probability of each token but the first
    tops: tuple[tuple[int, ...], ...]  # the most likely token in its place
    seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.texts))

    @property
    def perplexity(self) -> float:
        return math.exp(-sum(map(sum, self.texts)) / self.num_tokens)


def read_texts(path: Path, *, most: int | None = None) -> list[str]:
    """Raises ValueError for a line that has no text."""
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = json.loads(line)
        text = fields.get("text") or (fields.get("turns") or [None])[0]
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {number}: neither text nor turns")
        texts.append(text)
    return texts[:most]


def score(llm: LLM, texts: Sequence[str], *, most_tokens: int) -> Scores:
    """Log-probabilities of the first most_tokens of each text."""
    began = time.perf_counter()
    scores, tops = [], []
    prompts = [llm.tokenizer.encode(text)[:most_tokens] for text in texts]
    for at in range(0, len(prompts), _AT_ONCE):
        for answer in llm.generate(
            prompts[at : at + _AT_ONCE], temperature=0, max_tokens=1, prompt_logprobs=1
        ):
            found = answer.prompt_logprobs or ()
            scores.append(tuple(each.logprob for each in found))
            tops.append(tuple(each.top[0][0] for each in found))
    return Scores(texts=tuple(scores), tops=tuple(tops), seconds=time.perf_counter() - began)


def compare(scores: Scores, exact: Scores) -> dict[str, float]:
    """How far a mode is from the exact one. ``error_percent``: one standard error of
    ``worse_percent``, with texts as the independent draws."""
    lost = [sum(a) - sum(b) for a, b in zip(exact.texts, scores.texts, strict=True)]
    count = exact.num_tokens
    spread = statistics.stdev(lost) * math.sqrt(len(lost)) if len(lost) > 1 else math.nan
    same = sum(
        a == b
        for ours, theirs in zip(scores.tops, exact.tops, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    return {
        "worse_percent": round(100 * (scores.perplexity / exact.perplexity - 1), 3),
        "error_percent": round(100 * spread / count, 3),
        "same_top_percent": round(100 * same / count, 2),
    }


def _engine(mode: str, *, model: str, most_tokens: int) -> LLM:
    quantization, _, cached = mode.partition("/")
    options: dict[str, Any] = {
        "device": "cpu",
        "quantization": quantization,
        "kv_cache_dtype": cached or "auto",
        "max_model_len": most_tokens + 1,
        "max_num_seqs": _AT_ONCE,
        "num_gpu_blocks_override": _AT_ONCE * (most_tokens // 16 + 2),
        "enable_prefix_caching": False,
    }
    return LLM(model, **options)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL file of texts")
    parser.add_argument("--model", default="", help="as octavo serve takes it")
    parser.add_argument("--modes", default=MODES, help="with commas between")
    parser.add_argument("--most-tokens", type=int, default=512, help="of a text that count")
    parser.add_argument("--most-texts", type=int)
    parser.add_argument("--write", action="store_true", help="append rows to benchmarks/results")
    args = parser.parse_args(argv)
    texts = read_texts(args.prompts, most=args.most_texts)
    exact: Scores | None = None
    print(f"{'mode':<16} {'is':<20} {'K/V':<9} {'perplexity':>10}  worse by, %     same top, %")
    for mode in args.modes.split(","):
        llm = _engine(mode, model=args.model, most_tokens=args.most_tokens)
        info, scores = llm.info, score(llm, texts, most_tokens=args.most_tokens)
        del llm
        gc.collect()  # its parts know each other
        exact = exact or scores
        row = {
            **passport(),
            "model": Path(info.model).name,
            "texts": args.prompts.name,
            "num_texts": len(texts),
            "num_tokens": scores.num_tokens,
            "mode": mode,
            "quantization": info.quantization,
            "kv_cache_dtype": info.kv_cache_dtype,
            "perplexity": round(scores.perplexity, 5),
            **compare(scores, exact),
            "seconds": round(scores.seconds, 1),
        }
        print(
            f"{mode:<16} {row['quantization']:<20} {row['kv_cache_dtype']:<9} "
            f"{row['perplexity']:>10.4f}  {row['worse_percent']:>+7.3f} +- "
            f"{row['error_percent']:.3f} {row['same_top_percent']:>10.2f}",
            flush=True,
        )
        if args.write:
            keep_row("quality", row)


if __name__ == "__main__":
    main()
