"""``octavo bench latency``: how long the engine alone takes for one batch, offline."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

from octavo.cli.options import add_engine_flags, engine_options
from octavo.flags import parse_int

HELP = "measure the latency of one batch, offline"
_PERCENTILES = (10, 25, 50, 75, 90, 99)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input-len", type=parse_int, default=32, help="prompt tokens; default 32")
    add("--output-len", type=parse_int, default=128, help="tokens to generate; default 128")
    add("--batch-size", type=parse_int, default=8, help="prompts at once; default 8")
    add("--n", type=parse_int, default=1, help="answers per prompt; default 1")
    add("--num-iters-warmup", type=parse_int, default=10, help="runs not measured; default 10")
    add("--num-iters", type=parse_int, default=30, help="runs; default 30")
    add("--output-json", type=Path, help="file for the result")
    add_engine_flags(parser, skip=("seed",))
    # Every run has the same prompts: from the second on their K/V would be there already.
    parser.set_defaults(enable_prefix_caching=False)


def run(args: argparse.Namespace) -> int:
    for name in ("input_len", "output_len", "batch_size", "num_iters"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    options = engine_options(args)
    # Lazy: torch and numpy; a wrong flag must be told at once.
    import numpy as np
    from tqdm import tqdm

    from octavo.llm import LLM

    llm = LLM(**options)
    rng = random.Random(0)
    prompts = [
        [rng.randrange(llm.info.vocab_size) for _ in range(args.input_len)]
        for _ in range(args.batch_size)
    ]
    params = {"n": args.n, "max_tokens": args.output_len, "ignore_eos": True, "temperature": 1.0}

    def once() -> float:
        start = time.perf_counter()
        generations = llm.generate(prompts, params, seed=0)
        seconds = time.perf_counter() - start
        for error in (o.error for g in generations for o in g.outputs if o.error is not None):
            raise ValueError(error)
        return seconds

    is_quiet = not sys.stderr.isatty()
    for _ in tqdm(range(args.num_iters_warmup), desc="Warmup iterations", disable=is_quiet):
        once()
    latencies = [
        once() for _ in tqdm(range(args.num_iters), desc="Bench iterations", disable=is_quiet)
    ]
    percentiles = {p: float(np.percentile(latencies, p)) for p in _PERCENTILES}
    average = float(np.mean(latencies))
    print(f"Avg latency: {average} seconds")
    for p, value in percentiles.items():
        print(f"{p}% percentile latency: {value} seconds")
    if args.output_json is not None:
        result = {
            "avg_latency": average,
            "latencies": latencies,
            "percentiles": {str(p): value for p, value in percentiles.items()},
        }
        args.output_json.write_text(json.dumps(result, indent=4))
    return 0
