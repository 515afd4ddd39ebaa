"""``octavo bench throughput``: how fast the engine alone answers a whole data set, offline."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from octavo.bench.datasets import add_dataset_flags, load_dataset
from octavo.cli.options import add_engine_flags, engine_options
from octavo.flags import parse_int

HELP = "measure the engine's throughput, offline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=parse_int, default=1, help="answers per prompt; default 1")
    parser.add_argument("--num-warmups", type=parse_int, default=0, help="prompts not measured")
    parser.add_argument("--output-json", type=Path, help="file for the result")
    add_dataset_flags(parser)
    add_engine_flags(parser, skip=("seed",))


def run(args: argparse.Namespace) -> int:
    options = engine_options(args)
    # Lazy: torch; a wrong flag must be told at once.
    from octavo.llm import LLM

    llm = LLM(**options)
    prompts = load_dataset(args, llm.tokenizer)
    params = [
        {"n": args.n, "max_tokens": p.output_len, "ignore_eos": True, "temperature": 1.0, "seed": i}
        for i, p in enumerate(prompts)
    ]
    texts = [p.text for p in prompts]
    if args.num_warmups:
        llm.generate(texts[: args.num_warmups], params[: args.num_warmups])
    start = time.perf_counter()
    generations = llm.generate(texts, params, use_tqdm=sys.stderr.isatty())
    elapsed = time.perf_counter() - start
    failed = [o.error for g in generations for o in g.outputs if o.error is not None]
    num_prompt = sum(len(g.prompt_token_ids) for g in generations)
    num_output = sum(len(o.token_ids) for g in generations for o in g.outputs)
    total = num_prompt + num_output
    print(
        f"Throughput: {len(prompts) / elapsed:.2f} requests/s, "
        f"{total / elapsed:.2f} total tokens/s, "
        f"{num_output / elapsed:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {num_prompt}")
    print(f"Total num output tokens:  {num_output}")
    if failed:
        print(f"{len(failed)} failed: {failed[0]}", file=sys.stderr)
    if args.output_json is not None:
        result = {
            "elapsed_time": elapsed,
            "num_requests": len(prompts),
            "total_num_tokens": total,
            "requests_per_second": len(prompts) / elapsed,
            "tokens_per_second": total / elapsed,
        }
        args.output_json.write_text(json.dumps(result, indent=4))
    return 1 if failed else 0
