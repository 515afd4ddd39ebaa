"""``octavo generate``: answers to prompts on the command line, without a server."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from octavo.cli.options import (
    add_engine_flags,
    add_sampling_flags,
    engine_options,
    sampling_options,
)

if TYPE_CHECKING:
    from octavo.llm import LLM

HELP = "generate from prompts, offline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts", metavar="PROMPT", nargs="+", help="a text; - reads one line each"
    )
    parser.add_argument("--chat", action="store_true", help="a prompt is a message to the model")
    parser.add_argument("--system", help="system message, with --chat")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt")
    add_sampling_flags(parser)
    add_engine_flags(parser, skip=("seed",))


def run(args: argparse.Namespace) -> int:
    prompts = [text for prompt in args.prompts for text in _expand(prompt)]
    options = sampling_options(args)
    # Lazy: torch; a wrong flag must be told at once.
    from octavo.llm import LLM

    llm = LLM(**engine_options(args))
    encoded = [_encode(llm, prompt, args) for prompt in prompts]
    if args.chat:
        options.setdefault("max_tokens", None)
    if len(encoded) == 1 and options.get("n", 1) == 1 and not args.json:
        for delta in llm.stream(encoded[0], options):
            print(delta.text, end="", flush=True)
        print()
        return 0
    generations = llm.generate(encoded, options, use_tqdm=sys.stderr.isatty())
    for prompt, generation in zip(prompts, generations, strict=True):
        if args.json:
            print(
                json.dumps(
                    {
                        "prompt": prompt,
                        "outputs": [
                            {
                                "text": output.text,
                                "token_ids": output.token_ids,
                                "finish_reason": output.finish_reason,
                                "error": output.error,
                            }
                            for output in generation.outputs
                        ],
                    }
                )
            )
            continue
        for output in generation.outputs:
            print(f"--- {prompt}\n{output.text if output.error is None else output.error}")
    failed = any(output.error for g in generations for output in g.outputs)
    return 1 if failed else 0


def _expand(prompt: str) -> list[str]:
    if prompt != "-":
        return [prompt]
    return [line for line in sys.stdin.read().splitlines() if line]


def _encode(llm: LLM, prompt: str, args: argparse.Namespace) -> tuple[int, ...]:
    if not args.chat:
        return tuple(llm.tokenizer.encode(prompt))
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return llm.render_chat([*system, {"role": "user", "content": prompt}])
