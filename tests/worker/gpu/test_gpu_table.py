"""The host's account of rows: the batches it makes are those of the CPU's table."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from octavo.types import NewRequest, SamplingParams, SchedulerOutput
from octavo.worker.gpu.arena import RequestArena, request_columns
from octavo.worker.gpu.buffers import StepSizes
from octavo.worker.gpu.table import GpuRequestTable
from octavo.worker.gpu.upload import Upload, upload_words
from octavo.worker.input_batch import StepBuffers, build_input_batch
from octavo.worker.request_table import RequestTable
from tests.worker.gpu.conftest import DEVICE, make_runtime
from tests.worker.gpu.test_upload import make_sizes

BLOCK_SIZE, NUM_ROWS, MAX_MODEL_LEN = 16, 5, 128


class NoParams:
    """Nobody's sampling parameters are kept; some cannot be."""

    def __init__(self) -> None:
        self.rows: set[int] = set()

    def set_row(self, row: int, params: SamplingParams, upload: Upload) -> None:
        self.rows.add(row)
        if params.temperature < 0:
            raise ValueError("colder than zero")

    def clear_row(self, row: int) -> None:
        self.rows.discard(row)


@dataclass
class Rig:
    """A table, what it stages for, and the CPU's table beside it."""

    sizes: StepSizes = field(default_factory=make_sizes)

    def __post_init__(self) -> None:
        self.arena = RequestArena(request_columns(self.sizes), num_rows=NUM_ROWS, device=DEVICE)
        words = torch.zeros(upload_words(self.sizes), dtype=torch.int32, device=DEVICE)
        self.upload = Upload(make_runtime(), sizes=self.sizes, words=words, arena=self.arena)
        self.params = NoParams()
        self.table = GpuRequestTable(sizes=self.sizes, params=self.params)
        self.cpu = RequestTable(
            max_num_seqs=NUM_ROWS, max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE
        )


def new(name: str, num_tokens: int, **changed: Any) -> NewRequest:
    given: dict[str, Any] = {
        "token_ids": tuple(range(100, 100 + num_tokens)),
        "num_prompt_tokens": num_tokens,
        "num_computed_tokens": 0,
        "block_ids": (),
        "params": SamplingParams(),
    }
    return NewRequest(request_id=name, **given | changed)


@pytest.mark.parametrize("seed", range(5))
def test_batches_are_those_of_the_table_of_the_cpu(seed: int) -> None:
    rng, rig = random.Random(seed), Rig()
    tokens: dict[str, list[int]] = {}  # of live requests
    computed: dict[str, int] = {}
    blocks: dict[str, list[int]] = {}
    for number in range(30):
        ended = [name for name in tokens if rng.random() < 0.2 or len(tokens[name]) > 100]
        for name in ended:
            del tokens[name]
        arrivals = []
        while len(tokens) < NUM_ROWS and rng.random() < 0.6:
            name = f"r{number}-{len(tokens)}"
            size, found = rng.randint(2, 60), 0
            if rng.random() < 0.4:
                found = rng.randrange(size)
            tokens[name], computed[name] = [rng.randrange(999) for _ in range(size)], found
            blocks[name] = [rng.randrange(99) for _ in range(-(-found // BLOCK_SIZE))]
            arrivals.append(name)
        counts, fresh = {}, {}
        for name in rng.sample(sorted(tokens), len(tokens)):
            left = len(tokens[name]) - computed[name]
            counts[name] = rng.randint(1, left)
            lacking = -(-(computed[name] + counts[name]) // BLOCK_SIZE) - len(blocks[name])
            more = tuple(rng.randrange(99) for _ in range(lacking))
            blocks[name] += more
            if name not in arrivals and more:
                fresh[name] = more
        step = SchedulerOutput(
            step=number,
            finished_request_ids=tuple(ended),
            new_requests=tuple(
                new(
                    name,
                    len(tokens[name]),
                    token_ids=tuple(tokens[name]),
                    num_computed_tokens=computed[name],
                    block_ids=tuple(blocks[name]),
                )
                for name in arrivals
            ),
            num_scheduled_tokens=counts,
            new_block_ids=fresh,
        )
        rig.table.apply(step, rig.upload)
        found_batch = rig.table.batch(step)
        rig.upload.send()
        rig.cpu.apply(step)
        if not counts:
            assert found_batch.num_tokens == found_batch.num_samples == 0
            continue
        want = build_input_batch(
            rig.cpu,
            buffers=StepBuffers(rig.cpu, max_num_tokens=9999),
            request_ids=list(counts),
            num_scheduled_tokens=list(counts.values()),
        )
        assert found_batch.request_ids == list(want.request_ids)
        assert found_batch.query_ends.tolist() == want.attn.query_start_loc[1:].tolist()
        assert found_batch.seq_lens.tolist() == want.attn.seq_lens.tolist()
        assert found_batch.num_tokens == len(want.token_ids)
        assert found_batch.max_query_len == max(counts.values())
        assert found_batch.samples.tolist() == want.samples.tolist()
        assert found_batch.sample_tokens.tolist() == want.sample_tokens.tolist()
        known = rig.cpu.num_tokens[want.rows[want.samples]]
        assert found_batch.sample_positions.tolist() == known.tolist()
        assert found_batch.sample_ids == [want.request_ids[i] for i in want.samples]
        # As the runner does once results are in; the device would have appended the token.
        rig.cpu.num_computed_tokens[want.rows] += want.num_scheduled
        for name in found_batch.sample_ids:
            tokens[name].append(rng.randrange(999))
            rig.cpu.append_tokens([rig.cpu.row(name)], [tokens[name][-1]])
            row = rig.table.row(name)
            rig.arena.view("token_ids")[row, len(tokens[name]) - 1] = tokens[name][-1]
            rig.arena.view("num_tokens")[row] += 1
        for name, count in counts.items():
            computed[name] += count
        check_arena(rig, tokens, blocks)


def check_arena(rig: Rig, tokens: dict[str, list[int]], blocks: dict[str, list[int]]) -> None:
    assert len(rig.table) == len(rig.params.rows) == len(tokens)
    for name in tokens:
        row = rig.table.row(name)
        size, held = len(tokens[name]), len(blocks[name])
        assert rig.arena.view("num_tokens")[row] == rig.table.num_tokens[row] == size
        assert rig.arena.view("token_ids")[row, :size].tolist() == tokens[name]
        assert rig.arena.view("block_tables")[row, :held].tolist() == blocks[name]
        assert rig.table.block_tables[row, :held].tolist() == blocks[name]
        prompt = rig.arena.view("num_prompt_tokens")[row]
        assert prompt == rig.table.num_prompt_tokens[row] <= size


def test_a_request_that_comes_again_starts_anew() -> None:
    rig = Rig()
    first = new("a", 20, block_ids=(1, 2))
    rig.table.apply(
        SchedulerOutput(step=0, new_requests=(first,), num_scheduled_tokens={"a": 20}), rig.upload
    )
    serial = rig.table.serials[rig.table.row("a")]
    rig.upload.send()
    again = new("a", 9, block_ids=(4,), num_computed_tokens=3)
    step = SchedulerOutput(
        step=1,
        finished_request_ids=("a", "unknown"),
        new_requests=(again,),
        num_scheduled_tokens={"a": 6},
    )
    rig.table.apply(step, rig.upload)
    batch = rig.table.batch(step)
    assert (batch.starts.tolist(), batch.seq_lens.tolist()) == ([3], [9])
    assert len(rig.table) == 1
    assert batch.serials[0] != serial


def drafting(step: int, rooms: dict[str, int], **more: Any) -> SchedulerOutput:
    counts = {name: 1 + room for name, room in rooms.items()}
    max_drafts = {name: room for name, room in rooms.items() if room}
    return SchedulerOutput(step=step, num_scheduled_tokens=counts, max_drafts=max_drafts, **more)


def test_drafts_count_as_accepted_until_they_are_settled() -> None:
    """Two steps in flight: a's drafts are all accepted, of b's one is, c has none, d is read."""
    rig = Rig()
    arrivals = tuple(new(name, 20, block_ids=(i, 10 + i)) for i, name in enumerate("abcd"))
    first = SchedulerOutput(
        step=0, new_requests=arrivals, num_scheduled_tokens={"a": 20, "b": 20, "c": 20, "d": 3}
    )
    rig.table.apply(first, rig.upload)
    plain = rig.table.batch(first)
    assert plain.drafts is None and plain.depths is None
    assert plain.first_samples.tolist() == [0, 1, 2]
    step = drafting(1, {"a": 3, "d": 2, "b": 3, "c": 3})
    step = replace(step, max_drafts=dict.fromkeys("abc", 3))  # d reads three more
    batch = rig.table.batch(step, {"a": 3, "b": 2})
    assert batch.num_tokens == 4 + 3 + 3 + 1 and batch.max_query_len == 4
    assert batch.seq_lens.tolist() == [24, 6, 23, 21]
    assert batch.query_ends.tolist() == [4, 7, 10, 11]
    assert batch.sample_ids == ["a", "b", "c"]
    assert batch.drafts is not None and batch.drafts.tolist() == [3, 2, 0]
    assert batch.depths is not None and batch.depths.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert batch.sample_tokens.tolist() == [0, 1, 2, 3, 7, 8, 9, 10]
    assert batch.sample_positions.tolist() == [21, 22, 23, 24, 21, 22, 23, 21]
    assert batch.first_samples.tolist() == [0, 4, 7]
    row_a, row_b, row_c, row_d = (rig.table.row(name) for name in "abcd")
    assert batch.sample_rows.tolist() == [row_a] * 4 + [row_b] * 3 + [row_c]
    assert batch.least_lens.tolist() == batch.seq_lens.tolist()

    second = drafting(2, {"b": 1, "a": 0})
    later = rig.table.batch(second, {"b": 1})
    assert later.seq_lens.tolist() == [25, 25] and later.starts.tolist() == [23, 24]
    assert later.least_lens.tolist() == [23, 22]
    rig.table.settle(batch, np.array([4, 2, 1], np.int32))
    rows = [row_a, row_b, row_c, row_d]
    assert rig.table.num_tokens[rows].tolist() == [26, 25, 22, 20]
    assert rig.table.num_computed[rows].tolist() == [25, 24, 21, 6]
    assert rig.table.num_unsure[rows].tolist() == [0, 1, 0, 0]
    rig.table.settle(later, np.array([0, 1], np.int32))  # b failed
    assert rig.table.num_tokens[rows].tolist() == [26, 24, 22, 20]
    assert not rig.table.num_unsure.any()


def test_drafts_of_a_row_given_on_concern_nobody() -> None:
    rig = Rig()
    first = SchedulerOutput(
        step=0, new_requests=(new("a", 20, block_ids=(1, 2)),), num_scheduled_tokens={"a": 20}
    )
    rig.table.apply(first, rig.upload)
    rig.table.batch(first)
    batch = rig.table.batch(drafting(1, {"a": 3}), {"a": 3})
    rig.upload.send()
    again = new("a", 9, block_ids=(4,), num_computed_tokens=3)
    step = SchedulerOutput(
        step=2,
        finished_request_ids=("a",),
        new_requests=(again,),
        num_scheduled_tokens={"a": 6},
    )
    rig.table.apply(step, rig.upload)
    row = rig.table.row("a")
    assert rig.table.num_unsure[row] == 0
    rig.table.batch(step)
    rig.table.settle(batch, np.array([1], np.int32))
    assert (rig.table.num_tokens[row], rig.table.num_computed[row]) == (10, 9)
    assert rig.table.num_unsure[row] == 0


def test_parameters_that_cannot_be_kept_fail_their_request() -> None:
    rig = Rig()
    cold = new("cold", 4, block_ids=(1,), params=SamplingParams(temperature=-1.0))
    warm = new("warm", 4, block_ids=(2,))
    step = SchedulerOutput(
        step=0, new_requests=(cold, warm), num_scheduled_tokens={"cold": 4, "warm": 4}
    )
    rig.table.apply(step, rig.upload)
    batch = rig.table.batch(step)
    assert list(rig.table.failed) == [batch.serials[0]]
    assert rig.params.rows == {rig.table.row("warm")}


def test_tokens_that_nobody_knows_or_has_no_block_for_are_refused() -> None:
    rig = Rig()
    request = new("a", 20, block_ids=(1,))
    step = SchedulerOutput(step=0, new_requests=(request,), num_scheduled_tokens={"a": 20})
    rig.table.apply(step, rig.upload)
    with pytest.raises(AssertionError, match="without a block"):
        rig.table.batch(step)
    beyond = SchedulerOutput(step=1, num_scheduled_tokens={"a": 21}, new_block_ids={"a": (5, 6)})
    rig.table.apply(beyond, rig.upload)
    with pytest.raises(AssertionError, match="past the known tokens"):
        rig.table.batch(beyond)
    assert rig.table.num_computed[rig.table.row("a")] == 0
    assert np.array_equal(rig.table.block_tables[rig.table.row("a"), :3], [1, 5, 6])
