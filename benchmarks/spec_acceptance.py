"""How far drafts without a model get on real text: recorded answers, replayed without the model.

``record`` generates answers to prompts once; ``peer`` has a running server with speculation of its
own generate them (vLLM with ``--speculative-config``), and tells what it counted. ``replay`` lets
proposers draft along such answers, and the controller on a device that takes given times (see
`spec_costs`), which knows no noise but the proposers' own; beside it `known`: what the same drafts
would bring if each were cut where it goes wrong. Mean accepted lengths are vLLM's: 1 + accepted
tokens / drafts, of the steps that had any.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.machine import keep_row, passport
from benchmarks.spec_serve import counters
from octavo.config import SpeculativeConfig
from octavo.speculative import Outlook, make_drafter
from octavo.speculative.ngram import NgramProposer
from octavo.speculative.proposer import Proposal, Proposer
from octavo.speculative.suffix import SuffixProposer
from octavo.types import NewRequest, SamplingParams, SchedulerOutput

SETS = ("prompts_sum", "prompts_humaneval", "prompts_mt_bench", "prompts_gsm8k")


class DeviceLookup:
    """`Proposer` of what a GPU drafts, which the device looks up and the host does not see."""

    def begin(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        num_prompt_tokens: int,
        salt: str | None,
    ) -> None:
        return

    def extend(self, request_id: str, token_ids: Sequence[int]) -> None:
        return

    def end(self, request_id: str) -> None:
        return

    def propose(
        self, request_id: str, token_ids: npt.NDArray[np.int32], *, max_drafts: int
    ) -> Proposal:
        from octavo_kernels.drafting.reference import lookup  # here: it imports torch

        tokens = token_ids.tolist()
        _, begin = lookup(tokens, max_length=5)
        for place in range(begin, begin + max_drafts):
            tokens.append(tokens[place])
        return Proposal(tokens[-max_drafts:])


METHODS: dict[str, Callable[[], Proposer]] = {
    # The first as vLLM has it by default.
    "ngram 5-5": lambda: NgramProposer(min_length=5, max_length=5),
    "ngram 2-5": lambda: NgramProposer(min_length=2, max_length=5),
    "ngram on a GPU": DeviceLookup,
    "suffix": SuffixProposer,
    "suffix, spec factor 4": lambda: SuffixProposer(spec_factor=4.0, min_token_prob=0.05),
}
# Milliseconds of a step by its context and its tokens: SmolLM2-135M, int8, two cores.
CPU_COST = (
    "128=1:3.0,2:3.3,3:3.5,4:3.7,6:4.1,8:4.6,12:5.7,16:8,32:16,64:32,512:256;"
    "900=1:3.5,2:4.0,3:4.5,4:4.8,6:5.5,8:6.3,12:8.2,16:11,32:21,64:42,512:330"
)
Cost = Callable[[int, float], float]  # tokens, mean context -> seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Prompt and answer in one; ``start``: where the answer begins."""

    tokens: npt.NDArray[np.int32]
    start: int


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


def peer(args: argparse.Namespace) -> None:
    """Answers as `record` writes them, and a row for each set of what the server counted."""
    about = passport()
    with Path(args.answers).open("w") as file:
        for name in SETS:
            lines = (Path(args.data) / f"{name}.jsonl").read_text().splitlines()[: args.prompts]
            talks = [json.loads(line)["turns"][0] for line in lines]
            before = counters(args.base_url)
            with ThreadPoolExecutor(args.concurrency) as pool:
                answers = list(pool.map(lambda talk: ask(args, talk), talks))
            after = counters(args.base_url)
            drafts, proposed, accepted = (int(after[key] - before[key]) for key in before)
            for answer in answers:
                file.write(json.dumps({"set": name, **answer}) + "\n")
            out = sum(len(answer["output"]) for answer in answers) - len(answers)  # after prompts
            row = {
                "set": name,
                "method": args.label,
                "k": args.k,
                "mean_accepted_length": round(1 + accepted / max(1, drafts), 3),
                "accepted": round(accepted / max(1, proposed), 3),
                "drafts": drafts,
                "tokens_per_step": round(out / max(1, out - accepted), 3),
            }
            show(row, about, is_kept=args.write)


def ask(args: argparse.Namespace, talk: str) -> dict[str, list[int]]:
    """One greedy answer, in tokens."""
    body = {
        "model": args.model,
        "messages": [{"role": "user", "content": talk}],
        "max_tokens": args.tokens,
        "temperature": 0,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{args.base_url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        answer = json.loads(response.read())
    return {"prompt": answer["prompt_token_ids"], "output": answer["choices"][0]["token_ids"]}


def read(path: str) -> dict[str, list[Answer]]:
    found: dict[str, list[Answer]] = {}
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        tokens = np.asarray(row["prompt"] + row["output"], np.int32)
        found.setdefault(row["set"], []).append(Answer(tokens=tokens, start=len(row["prompt"])))
    return found


def num_right(answer: Answer, at: int, draft: Sequence[int]) -> int:
    number = 0
    for token in draft:
        if answer.tokens[at + number] != token:
            break
        number += 1
    return number


def replay_proposer(make: Callable[[], Proposer], answers: Sequence[Answer], k: int) -> Any:
    """What drafts of up to ``k`` tokens in every step would have come to, one answer at a time."""
    proposer = make()
    steps = drawn = drafts = proposed = accepted = 0
    took = 0.0
    clock = time.perf_counter
    for number, answer in enumerate(answers):
        name, tokens, at = str(number), answer.tokens, answer.start + 1
        prompt = tokens[: answer.start].tolist()
        began = clock()
        proposer.begin(name, prompt, num_prompt_tokens=answer.start, salt=None)
        proposer.extend(name, [int(tokens[answer.start])])
        while at < len(tokens):
            room = min(k, len(tokens) - at - 1)
            draft: Sequence[int] = ()
            if room:
                draft = proposer.propose(name, tokens[:at], max_drafts=room).token_ids
            took += clock() - began
            right = num_right(answer, at, draft)
            drafts += bool(len(draft))
            proposed, accepted = proposed + len(draft), accepted + right
            steps, drawn = steps + 1, drawn + right + 1
            new = tokens[at : at + right + 1].tolist()
            at += right + 1
            began = clock()
            proposer.extend(name, new)
        proposer.end(name)
        took += clock() - began
    return {
        "mean_accepted_length": round(1 + accepted / max(1, drafts), 3),
        "accepted": round(accepted / max(1, proposed), 3),
        "drafts": drafts,
        "tokens_per_step": round(drawn / steps, 3),
        "us_per_call": round(took / steps * 1e6, 1),
    }


def arrivals(answers: Sequence[Answer]) -> Iterator[tuple[str, Answer]]:
    return ((f"r{i}", each) for i, each in enumerate(answers) if len(each.tokens) > each.start + 1)


def replay_known(answers: Sequence[Answer], *, cost: Cost, k: int) -> Any:
    """How much faster one request at a time were if each draft of `auto`'s proposer ended before
    its first wrong token: no choice of their number can do better."""
    proposer = METHODS["suffix, spec factor 4"]()
    without = spent = 0.0
    drawn = steps = 0
    for name, answer in arrivals(answers):
        at, tokens = answer.start + 1, answer.tokens
        prompt = tokens[: answer.start].tolist()
        proposer.begin(name, prompt, num_prompt_tokens=answer.start, salt=None)
        proposer.extend(name, [int(tokens[answer.start])])
        while at < len(tokens):
            room = min(k, len(tokens) - at - 1)
            draft = proposer.propose(name, tokens[:at], max_drafts=room).token_ids if room else ()
            number = 1 + num_right(answer, at, draft)
            spent += cost(number, at)
            without += cost(1, at) * number
            steps, drawn = steps + 1, drawn + number
            proposer.extend(name, tokens[at : at + number].tolist())
            at += number
        proposer.end(name)
    return {"speedup": round(without / spent, 3), "tokens_per_step": round(drawn / steps, 3)}


def replay_auto(answers: Sequence[Answer], *, requests: int, cost: Cost, k: int) -> Any:
    """The controller with so many requests at a time: how much faster than without drafts.

    Drafting takes what it takes here and now, steps what ``cost`` says.
    """
    spent, clock = 0.0, time.perf_counter
    drafter = make_drafter(SpeculativeConfig(method="auto", num_speculative_tokens=k))
    source = arrivals(answers)
    live: dict[str, tuple[Answer, int]] = {}
    finished: list[str] = []
    without = computed = drawn = steps = 0.0
    while True:
        new = [each for _, each in zip(range(requests - len(live)), source, strict=False)]
        live |= {name: (answer, answer.start + 1) for name, answer in new}
        if not live:
            break
        wanted = drafter.num_wanted
        room = {n: min(wanted, len(a.tokens) - at - 1) for n, (a, at) in live.items()}
        room = {name: most for name, most in room.items() if most > 0}
        step = SchedulerOutput(
            step=0,
            new_requests=tuple(new_request(name, answer) for name, answer in new),
            num_scheduled_tokens={name: 1 + room.get(name, 0) for name in live},
            max_drafts=room,
            finished_request_ids=tuple(finished),
        )
        began = clock()
        drafter.begin(step)
        outlooks = [Outlook(n, live[n][0].tokens[: live[n][1]], room[n]) for n in room]
        drafts = drafter.draft(outlooks, num_tokens=len(live)) if room else {}
        spent += clock() - began
        number = len(live) + sum(map(len, drafts.values()))
        context = sum(at for _, at in live.values()) / len(live)
        took = cost(number, context)
        found = {}
        for name, (answer, at) in live.items():
            end = at + num_right(answer, at, drafts.get(name, ())) + 1
            found[name] = answer.tokens[at:end].tolist()
            live[name] = (answer, end)
        began = clock()
        drafter.learn(drafts, found, num_tokens=number, seconds=took)
        spent += clock() - began + took
        new_tokens = sum(map(len, found.values()))
        without += cost(len(live), context) * new_tokens / len(live)
        computed, drawn, steps = computed + number, drawn + new_tokens, steps + len(live)
        finished = [name for name, (answer, at) in live.items() if at >= len(answer.tokens)]
        for name in finished:
            del live[name]
    return {
        "speedup": round(without / spent, 3),
        "tokens_per_step": round(drawn / steps, 3),
        "computed_per_token": round(computed / drawn, 2),
    }


def new_request(name: str, answer: Answer) -> NewRequest:
    return NewRequest(
        request_id=name,
        token_ids=tuple(answer.tokens[: answer.start + 1].tolist()),
        num_prompt_tokens=answer.start,
        num_computed_tokens=0,
        block_ids=(),
        params=SamplingParams(),
    )


def cost_of(text: str) -> Cost:
    """Of `context=tokens:milliseconds,...;context=...`, or of one such list for all contexts."""
    contexts, curves = [], []
    for part in text.split(";"):
        context, _, points = part.rpartition("=")
        contexts.append(float(context or 0))
        pairs = [point.split(":") for point in points.split(",")]
        curves.append(([float(x) for x, _ in pairs], [float(y) * 1e-3 for _, y in pairs]))

    def cost(num_tokens: int, context: float) -> float:
        costs = [float(np.interp(num_tokens, xs, ys)) for xs, ys in curves]
        return float(np.interp(context, contexts, costs))

    return cost


def show(row: Mapping[str, Any], about: Mapping[str, Any], *, is_kept: bool) -> None:
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if is_kept:
        keep_row("spec_acceptance", {"name": "spec_acceptance", **row, **about})


def replay(args: argparse.Namespace) -> None:
    about = {"answers": args.label, **passport()}
    sets = read(args.answers)
    for name, answers in sets.items():
        for method, make in METHODS.items():
            for k in args.k:
                found = replay_proposer(make, answers, k)
                row = {"set": name, "method": method, "k": k, **found}
                show(row, about, is_kept=args.write)
    cost = cost_of(args.cost)
    for name, answers in sets.items():
        found = replay_known(answers, cost=cost, k=max(args.k))
        row = {"set": name, "method": "known", "requests": 1, "cost": args.cost, **found}
        show(row, about, is_kept=args.write)
        for requests in args.requests:
            found = replay_auto(answers, requests=requests, cost=cost, k=max(args.k))
            row = {"set": name, "method": "auto", "requests": requests, "cost": args.cost, **found}
            show(row, about, is_kept=args.write)


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
    asker = commands.add_parser("peer")
    asker.add_argument("answers", help="JSONL to write")
    asker.add_argument("--data", required=True, help="folder of prompts_*.jsonl")
    asker.add_argument("--base-url", required=True, help="http://host:port/v1")
    asker.add_argument("--model", default="m", help="its name there")
    asker.add_argument("--label", required=True, help="server, version and method, for the rows")
    asker.add_argument("--k", type=int, required=True, help="drafts it was told to make")
    asker.add_argument("--prompts", type=int, default=20, help="of each set")
    asker.add_argument("--tokens", type=int, default=128)
    asker.add_argument("--concurrency", type=int, default=4)
    asker.add_argument("--write", action="store_true", help="append rows to benchmarks/results")
    asker.set_defaults(run=peer)
    player = commands.add_parser("replay")
    player.add_argument("answers", help="JSONL that `record` or `peer` wrote")
    player.add_argument("--label", default="Octavo's", help="whose answers they are")
    player.add_argument("--k", type=int, nargs="+", default=[3, 5, 8])
    player.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16])
    player.add_argument("--cost", default=CPU_COST, help="of steps, as spec_costs prints it")
    player.add_argument("--write", action="store_true", help="append rows to benchmarks/results")
    player.set_defaults(run=replay)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
