"""What a step of one request takes by its rows (a token and its drafts) and its context.

    python -m benchmarks.spec_costs [--contexts 128,900] [--rows 9]

Prints it as `spec_acceptance replay --cost` takes it. The drafts are wrong ones: what a row costs
does not depend on that. Rows of all numbers are timed in turns, so what disturbs one disturbs all.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from unittest import mock

from octavo.config import EngineConfig, ModelConfig, SchedulerConfig
from octavo.engine.protocols import Executor
from octavo.speculative import NoDrafts, Outlook
from octavo.types import NewRequest, SamplingParams, SchedulerOutput
from octavo.worker import startup
from octavo.worker.worker import build_worker

_UNTIMED = 2  # turns at first: recordings are made, memory is touched
_CHUNK = 256  # of a prompt
_NAME = "r"


class GivenDrafts(NoDrafts):
    """`Drafter` of as many tokens as it was told, which keeps what the step took."""

    def __init__(self) -> None:
        self.num_drafts = 0
        self.seconds = 0.0

    def draft(self, outlooks: Sequence[Outlook], *, num_tokens: int) -> Mapping[str, Sequence[int]]:
        last = int(outlooks[0].token_ids[-1])
        return {_NAME: [(last + 1000 * i) % 40_000 for i in range(self.num_drafts)]}

    def learn(
        self,
        drafts: Mapping[str, Sequence[int]],
        tokens: Mapping[str, Sequence[int]],
        *,
        num_tokens: int,
        seconds: float,
    ) -> None:
        self.seconds = seconds


def execute(executor: Executor, step: SchedulerOutput) -> None:
    executor.submit(step)
    failed = executor.collect().errors
    assert not failed, failed


def measure(
    executor: Executor, drafter: GivenDrafts, *, context: int, most: int, reps: int, block_size: int
) -> list[float]:
    """Median milliseconds of steps of 1 to ``most`` rows, behind so many tokens and a few more."""
    room = context + (reps + _UNTIMED) * most * (most + 1)
    request = NewRequest(
        request_id=_NAME,
        token_ids=tuple(7 * i % 40_000 + 10 for i in range(context)),
        num_prompt_tokens=context,
        num_computed_tokens=0,
        block_ids=tuple(range(-(-room // block_size))),
        params=SamplingParams(temperature=0.0, ignore_eos=True),
    )
    for start in range(0, context, _CHUNK):
        count = {_NAME: min(_CHUNK, context - start)}
        new = () if start else (request,)
        execute(executor, SchedulerOutput(step=0, new_requests=new, num_scheduled_tokens=count))
    found: list[list[float]] = [[] for _ in range(most)]
    for turn in range(reps + _UNTIMED):
        for rows in range(1, most + 1) if turn % 2 else range(most, 0, -1):
            drafter.num_drafts = rows - 1
            drafts = {_NAME: rows - 1} if rows > 1 else {}
            count = {_NAME: rows}
            execute(
                executor, SchedulerOutput(step=0, num_scheduled_tokens=count, max_drafts=drafts)
            )
            if turn >= _UNTIMED:
                found[rows - 1].append(drafter.seconds * 1e3)
    execute(executor, SchedulerOutput(step=0, finished_request_ids=(_NAME,)))
    return [statistics.median(each) for each in found]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="the default model without")
    parser.add_argument("--contexts", default="128,400,900,1300")
    parser.add_argument("--rows", type=int, default=9)
    parser.add_argument("--reps", type=int, default=16)
    args = parser.parse_args(argv)
    drafter = GivenDrafts()
    config = EngineConfig(
        model=ModelConfig(model=args.model), scheduler=SchedulerConfig(async_scheduling=False)
    )
    startup.set_threads(None)
    with mock.patch.object(startup, "make_drafter", lambda *_, **__: drafter):
        executor, info = build_worker(config)
    found = []
    for context in map(int, args.contexts.split(",")):
        costs = measure(
            executor,
            drafter,
            context=context,
            most=args.rows,
            reps=args.reps,
            block_size=info.block_size,
        )
        points = ",".join(f"{rows}:{cost:.2f}" for rows, cost in enumerate(costs, 1))
        found.append(f"{context}={points}")
        print(found[-1], flush=True)
    executor.close()
    print(";".join(found))


if __name__ == "__main__":
    main()
