"""The server's own drafters leave every token as it is without them, and draft something."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from octavo.config import SpeculativeConfig
from octavo.speculative import NoDrafts, make_drafter
from octavo.types import NewRequest, SamplingParams, SchedulerOutput
from octavo.worker.model_runner import ModelRunner

Make = Callable[..., ModelRunner]
ROOM, LENGTH, BLOCKS = 5, 60, 8


def generate(runner: ModelRunner, requests: list[NewRequest]) -> dict[str, list[int]]:
    """All tokens of each request, which come one step after the other; one is preempted."""
    tokens: dict[str, list[int]] = {}
    live: list[str] = []
    wanted = number = 0
    finished: list[str] = []
    waiting = list(requests)
    while waiting or live:
        new = [waiting.pop(0)] if waiting else []
        if number == 12:  # preempted and resumed at once: its blocks are computed anew
            name = live[0]
            old = next(each for each in requests if each.request_id == name)
            known = (*old.token_ids, *tokens[name])
            finished.append(name)
            live.remove(name)
            new = [
                NewRequest(
                    request_id=name,
                    token_ids=known,
                    num_prompt_tokens=len(old.token_ids),
                    num_computed_tokens=0,
                    block_ids=old.block_ids,
                    params=old.params,
                )
            ]
        room = {name: min(wanted, ROOM) for name in live if wanted}
        counts = {name: 1 + room.get(name, 0) for name in live}
        counts |= {each.request_id: len(each.token_ids) for each in new}
        found = runner.execute(
            SchedulerOutput(
                step=number,
                new_requests=tuple(new),
                num_scheduled_tokens=counts,
                max_drafts=room,
                finished_request_ids=tuple(finished),
            )
        )
        assert not found.errors
        wanted, finished, number = found.num_drafts_wanted, [], number + 1
        live += [each.request_id for each in new]
        for name in list(live):
            tokens.setdefault(name, []).extend(found.sampled_token_ids[name])
            if len(tokens[name]) >= LENGTH:
                live.remove(name)
                finished.append(name)
    return {name: each[:LENGTH] for name, each in tokens.items()}


def prompts(temperature: float) -> list[NewRequest]:
    rng = random.Random(8)
    made = []
    for i in range(4):
        tokens = [rng.randrange(2, 300) for _ in range(12)] * 3
        made.append(
            NewRequest(
                request_id=f"r{i}",
                token_ids=tuple(tokens[: 20 + 4 * i]),
                num_prompt_tokens=20 + 4 * i,
                num_computed_tokens=0,
                block_ids=tuple(range(i * BLOCKS, (i + 1) * BLOCKS)),
                params=SamplingParams(temperature=temperature, top_k=3, seed=i),
                cache_salt="s" if i % 2 else None,
            )
        )
    return made


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("method", ["ngram", "suffix", "auto"])
def test_tokens_are_those_without_drafts(
    method: str, temperature: float, make_runner: Make
) -> None:
    requests = prompts(temperature)
    want = generate(make_runner(), requests)
    drafter = make_drafter(SpeculativeConfig(method=method, num_speculative_tokens=ROOM))
    assert not isinstance(drafter, NoDrafts)
    assert generate(make_runner(drafter=drafter), requests) == want
    if method != "auto":  # which follows the clock
        assert drafter.counts.num_draft_tokens > 0
    if method != "auto" and temperature == 0.0:
        assert drafter.counts.num_accepted_tokens > 0
