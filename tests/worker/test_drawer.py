"""Drafts are drawn as the target's own tokens are: by the request's parameters and keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from octavo.sampling import Sampler
from octavo.types import NewRequest, SamplingParams, SchedulerOutput
from octavo.worker.drafting.base import Guesses, Job
from octavo.worker.drafting.drawer import Drawer
from octavo.worker.request_table import RequestTable
from octavo.worker.sampling_rows import sampling_batch

VOCAB_SIZE = 400


def table_of(params: SamplingParams, *, count: int) -> RequestTable:
    table = RequestTable(max_num_seqs=count, max_model_len=64, block_size=16)
    new = tuple(
        NewRequest(
            request_id=f"r{i}",
            token_ids=(3, 5, 7, i),
            num_prompt_tokens=3,
            num_computed_tokens=0,
            block_ids=(),
            params=params,
        )
        for i in range(count)
    )
    table.apply(SchedulerOutput(step=0, new_requests=new))
    for i in range(count):
        table.seeds[table.row(f"r{i}")] = 1000 + i
    return table


def jobs_of(table: RequestTable, count: int) -> list[Job]:
    return [
        Job(request_id=f"r{i}", row=table.row(f"r{i}"), num_known=4, depth=3) for i in range(count)
    ]


def logits_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2


def own_draws(table: RequestTable, logits: torch.Tensor, jobs: list[Job]) -> list[int]:
    rows = np.asarray([job.row for job in jobs], np.int64)
    depths = np.asarray([len(job.drafts) for job in jobs], np.int32)
    batch = sampling_batch(table, rows, depths=depths, has_drafts=True)
    return Sampler(VOCAB_SIZE).sample(logits.clone(), batch).token_ids


PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9},
    "filtered": {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "penalties": {"temperature": 0.0, "presence_penalty": 2.0, "repetition_penalty": 1.7},
    "bias": {"temperature": 0.7, "logit_bias": ((7, 9.0),), "frequency_penalty": 1.0},
}


@pytest.mark.parametrize("kind", PARAMS)
def test_equal_logits_give_the_token_that_will_be_drawn(kind: str) -> None:
    table = table_of(SamplingParams(**PARAMS[kind]), count=8)
    jobs = jobs_of(table, 8)
    drawer = Drawer(table, vocab_size=VOCAB_SIZE)
    for depth in range(3):
        logits = logits_of(8, seed=depth)
        want = own_draws(table, logits, jobs)
        table.write_drafts({job.request_id: job.drafts for job in jobs})
        assert drawer.draw(Guesses(all_logits=logits.clone()), jobs) == [True] * 8
        assert [job.drafts[-1] for job in jobs] == want
        table.write_drafts({job.request_id: job.drafts for job in jobs})
        probs = (logits / (table.temperature[0].item() or 1.0)).softmax(dim=1)
        if kind in ("greedy", "sampled"):
            for row, job in enumerate(jobs):
                assert job.probs[-1] == pytest.approx(float(probs[row, job.drafts[-1]]), rel=1e-4)
        assert all(0.0 <= job.probs[-1] <= 1.0 for job in jobs)


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_columns_stand_for_the_tokens_that_they_are_said_to(kind: str) -> None:
    token_ids = torch.arange(0, VOCAB_SIZE, 3)
    table = table_of(SamplingParams(**PARAMS[kind]), count=8)
    jobs, logits = jobs_of(table, 8), logits_of(8)
    narrow = torch.full_like(logits, -torch.inf)
    narrow[:, token_ids] = logits[:, token_ids]
    want = own_draws(table, narrow, jobs)
    drawer = Drawer(table, vocab_size=VOCAB_SIZE, token_ids=token_ids)
    assert all(drawer.draw(Guesses(all_logits=logits[:, token_ids].contiguous()), jobs))
    assert [job.drafts[-1] for job in jobs] == want and all(job.drafts[-1] % 3 == 0 for job in jobs)


def test_logits_nearly_the_targets_give_its_draw_far_more_often_than_the_likeliest_token() -> None:
    count, rounds = 16, 40
    table = table_of(SamplingParams(temperature=1.0), count=count)
    drawer = Drawer(table, vocab_size=VOCAB_SIZE)
    same = likeliest = 0
    for turn in range(rounds):
        target = logits_of(count, seed=turn)
        near = target + 0.3 * torch.randn_like(target)
        jobs = jobs_of(table, count)
        want = own_draws(table, target, jobs)
        drawer.draw(Guesses(all_logits=near.clone()), jobs)
        same += sum(job.drafts[0] == token for job, token in zip(jobs, want, strict=True))
        best = near.argmax(dim=1).tolist()
        likeliest += sum(a == b for a, b in zip(best, want, strict=True))
        table.seeds[:] += 1
    assert same > 0.6 * count * rounds and likeliest < 0.3 * count * rounds


def test_rows_that_no_token_can_be_drawn_from_have_no_draft() -> None:
    for kind in ("greedy", "sampled"):
        table = table_of(SamplingParams(**PARAMS[kind]), count=2)
        jobs, logits = jobs_of(table, 2), logits_of(2)
        logits[1, 5] = float("nan")
        assert Drawer(table, vocab_size=VOCAB_SIZE).draw(Guesses(all_logits=logits), jobs) == [
            True,
            False,
        ]
        assert len(jobs[0].drafts) == 1 and not jobs[1].drafts
