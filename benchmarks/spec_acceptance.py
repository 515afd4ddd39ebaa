"""How far drafts without a model get on real text: recorded answers, replayed without the model.

``record`` generates greedy answers to prompts once; ``replay`` lets proposers draft along them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

SETS = ("prompts_sum", "prompts_humaneval", "prompts_mt_bench")


def record(args: argparse.Namespace) -> None:
    """One line for each answer: its set, the prompt's tokens and the answer's."""
    # Lazy: a replay needs no torch.
    from octavo.llm import LLM

    llm = LLM(args.model, max_model_len=4096, max_num_seqs=32)
    with Path(args.answers).open("w") as file:
        for name in SETS:
            lines = (Path(args.data) / f"{name}.jsonl").read_text().splitlines()[: args.prompts]
            talks = [[{"role": "user", "content": json.loads(line)["turns"][0]}] for line in lines]
            found = llm.chat(talks, temperature=args.temperature, seed=1, max_tokens=args.tokens)
            for each in found:
                row = {
                    "set": name,
                    "prompt": list(each.prompt_token_ids),
                    "output": list(each.token_ids),
                }
                file.write(json.dumps(row) + "\n")
            print(f"{name}: {len(found)} answers, {sum(len(g.token_ids) for g in found)} tokens")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    recorder = commands.add_parser("record")
    recorder.add_argument("answers", help="JSONL to write")
    recorder.add_argument("--data", required=True, help="folder of prompts_*.jsonl")
    recorder.add_argument("--model", default="")
    recorder.add_argument("--prompts", type=int, default=20, help="of each set")
    recorder.add_argument("--tokens", type=int, default=128)
    recorder.add_argument("--temperature", type=float, default=0.0)
    recorder.set_defaults(run=record)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
