"""The packed batch against a plain loop over requests and tokens."""

from __future__ import annotations

import random

import pytest

from octavo.types import NewRequest, SamplingParams, SchedulerOutput
from octavo.worker.input_batch import StepBuffers, build_input_batch
from octavo.worker.request_table import RequestTable


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("seed", range(5))
def test_batch_is_what_a_loop_would_build(block_size: int, seed: int) -> None:
    rng = random.Random(seed)
    table = RequestTable(max_num_seqs=12, max_model_len=300, block_size=block_size)
    blocks = list(range(400))
    rng.shuffle(blocks)
    requests, work = [], {}
    for number in range(rng.randint(1, 12)):
        num_tokens = rng.randint(1, 300)
        num_computed = rng.randrange(num_tokens)
        count = rng.choice(
            [1, num_tokens - num_computed, rng.randint(1, num_tokens - num_computed)]
        )
        num_blocks = -(-(num_computed + count) // block_size)
        requests.append(
            NewRequest(
                request_id=f"r{number}",
                token_ids=tuple(rng.randrange(1000) for _ in range(num_tokens)),
                num_prompt_tokens=num_tokens,
                num_computed_tokens=num_computed,
                block_ids=tuple(blocks.pop() for _ in range(num_blocks)),
                params=SamplingParams(),
            )
        )
        work[f"r{number}"] = count
    table.apply(SchedulerOutput(step=0, new_requests=tuple(requests)))
    order = sorted(work, key=lambda _: rng.random())
    batch = build_input_batch(
        table,
        buffers=StepBuffers(table, max_num_tokens=12 * 300),
        request_ids=order,
        num_scheduled_tokens=[work[name] for name in order],
    )
    by_id = {r.request_id: r for r in requests}
    tokens, positions, slots, starts, lens, samples, last = [], [], [], [0], [], [], []
    for index, name in enumerate(order):
        request = by_id[name]
        end = request.num_computed_tokens + work[name]
        for position in range(request.num_computed_tokens, end):
            tokens.append(request.token_ids[position])
            positions.append(position)
            block = request.block_ids[position // block_size]
            slots.append(block * block_size + position % block_size)
        starts.append(len(tokens))
        lens.append(end)
        if end == len(request.token_ids):
            samples.append(index)
            last.append(len(tokens) - 1)
    assert batch.token_ids.tolist() == tokens
    assert batch.attn.positions.tolist() == positions
    assert batch.attn.slots.tolist() == slots
    assert batch.attn.query_start_loc.tolist() == starts
    assert batch.attn.seq_lens.tolist() == lens
    assert batch.samples.tolist() == samples
    assert batch.sample_tokens.tolist() == last
    for index, name in enumerate(order):
        held = by_id[name].block_ids
        assert tuple(batch.attn.block_tables[index, : len(held)].tolist()) == held
    tensors = (batch.token_ids, *[getattr(batch.attn, n) for n in ("positions", "slots")])
    assert all(str(t.dtype) == "torch.int32" and t.is_contiguous() for t in tensors)


def test_tokens_that_are_not_known_cannot_be_scheduled() -> None:
    table = RequestTable(max_num_seqs=1, max_model_len=64, block_size=16)
    new = NewRequest(
        request_id="a",
        token_ids=(1, 2),
        num_prompt_tokens=2,
        num_computed_tokens=0,
        block_ids=(0,),
        params=SamplingParams(),
    )
    table.apply(SchedulerOutput(step=0, new_requests=(new,)))
    buffers = StepBuffers(table, max_num_tokens=8)
    with pytest.raises(AssertionError, match="past the known tokens"):
        build_input_batch(table, buffers=buffers, request_ids=["a"], num_scheduled_tokens=[3])
