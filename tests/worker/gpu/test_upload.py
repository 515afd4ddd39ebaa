"""The arena's columns and what uploads write to them, one copy or many."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from octavo.worker.gpu.arena import Column, RequestArena
from octavo.worker.gpu.buffers import BatchWords, StepSizes
from octavo.worker.gpu.runtime import HostRuntime
from octavo.worker.gpu.upload import NUM_SLOTS, Upload, upload_words
from tests.worker.gpu.conftest import DEVICE, make_runtime

NUM_ROWS = 5
COLUMNS = (
    Column("tokens", torch.int32, 37),
    Column("weight", torch.float32),
    Column("seed", torch.int64),
    Column("blocks", torch.int32, 3),
    Column("wide", torch.int64, 2),
)


def make_sizes(**changed: Any) -> StepSizes:
    sizes: dict[str, Any] = {
        "max_num_seqs": NUM_ROWS,
        "max_num_tokens": 64,
        "max_model_len": 128,
        "block_size": 16,
        "num_blocks": 8,
        "hidden_size": 16,
        "vocab_size": 50,
        "dtype": torch.float32,
    }
    return StepSizes(**sizes | changed)


class Device:
    """Arena, words and upload; ``expected`` is the arena kept by plain indexing."""

    def __init__(self, *, num_words: int | None = None, runtime: Any = None) -> None:
        sizes = make_sizes()
        self.words = torch.full(
            (num_words or upload_words(sizes),), -7, dtype=torch.int32, device=DEVICE
        )
        self.arena = RequestArena(COLUMNS, num_rows=NUM_ROWS, device=DEVICE)
        self.arena.words.fill_(7)
        self.upload = Upload(
            runtime or make_runtime(), sizes=sizes, words=self.words, arena=self.arena
        )
        self.batch = BatchWords.of(self.words, max_num_seqs=NUM_ROWS)
        self.expected = {c.name: self.arena.view(c.name).cpu().clone() for c in COLUMNS}

    def fill(self, *, num_requests: int) -> None:
        rows = np.arange(num_requests)
        ends = 3 * (rows + 1)
        self.upload.batch.fill(
            rows=rows + 10,
            query_ends=ends,
            seq_lens=ends + 1,
            sample_tokens=ends[:-1],
            sample_rows=rows[:-1] + 20,
            sample_positions=rows[:-1] + 30,
        )

    def put(self, column: str, row: int, values: Any, start: int = 0) -> None:
        self.upload.put(column, row, values, start=start)
        target = self.expected[column]
        if target.dim() == 1:
            target[row] = values
        else:
            target[row, start : start + len(values)] = torch.tensor(values, dtype=target.dtype)

    def check(self) -> None:
        for name, values in self.expected.items():
            assert torch.equal(self.arena.view(name).cpu(), values), name


def test_columns_lie_apart_and_aligned() -> None:
    arena = RequestArena(COLUMNS, num_rows=NUM_ROWS, device=DEVICE)
    assert arena.words.shape[0] == RequestArena.num_words(COLUMNS, num_rows=NUM_ROWS)
    for value, column in enumerate(COLUMNS):
        view = arena.view(column.name)
        assert view.dtype == column.dtype
        assert view.shape == ((NUM_ROWS, column.width) if column.width else (NUM_ROWS,))
        assert view.data_ptr() % 16 == arena.words.data_ptr() % 16
        assert view.is_contiguous()
        assert arena.view(column.name).data_ptr() == view.data_ptr()
        view.fill_(value + 1)
    for value, column in enumerate(COLUMNS):
        assert (arena.view(column.name) == value + 1).all()
    tokens = arena.view("tokens")
    arena.words[arena.offset("tokens", 3, start=7)] = 99
    assert tokens[3, 7] == 99
    with pytest.raises(AssertionError):
        arena.offset("tokens", NUM_ROWS)


def test_values_of_every_type_reach_their_rows_and_no_others() -> None:
    device = Device()
    device.put("tokens", 1, [5, 6, 7], start=30)
    device.put("weight", 0, -0.75)
    device.put("seed", 4, -(2**63))
    device.put("seed", 3, 2**63 - 1)
    device.put("blocks", 4, [1, 2, 3])
    device.put("wide", 2, [2**40, -1])
    device.upload.send()
    device.check()
    device.upload.send()  # nothing staged: nothing changes
    device.check()


def test_the_batch_is_padded_to_its_bounds() -> None:
    device = Device()
    for num_requests in (5, 3, 1, 0):
        device.fill(num_requests=num_requests)
        device.upload.send()
        found = {name: getattr(device.batch, name).tolist() for name in BatchWords.__slots__}
        rest = NUM_ROWS - num_requests
        ends = [3 * (i + 1) for i in range(num_requests)]
        samples = range(max(num_requests - 1, 0))
        assert found == {
            "rows": [i + 10 for i in range(num_requests)] + [-1] * rest,
            "query_start_loc": [0, *ends] + [3 * num_requests] * rest,
            "seq_lens": [end + 1 for end in ends] + [0] * rest,
            "sample_tokens": ends[:-1] + [0] * (NUM_ROWS - len(samples)),
            "sample_rows": [i + 20 for i in samples] + [-1] * (NUM_ROWS - len(samples)),
            "sample_positions": [i + 30 for i in samples] + [0] * (NUM_ROWS - len(samples)),
        }


def test_many_rows_at_once_are_as_one_by_one() -> None:
    device = Device()
    rows, lengths, starts = np.array([4, 0, 2]), np.array([2, 1, 3]), np.array([1, 2, 0])
    values = np.arange(6, dtype=np.int32) + 40
    device.upload.put_many(
        "blocks",
        rows,
        starts=starts.astype(np.int32),
        lengths=lengths.astype(np.int32),
        values=values,
    )
    device.upload.send()
    device.expected["blocks"][4, 1:] = torch.tensor([40, 41])
    device.expected["blocks"][0, 2] = 42
    device.expected["blocks"][2] = torch.tensor([43, 44, 45])
    device.check()


def test_sections_are_aligned_and_stay_where_they_are() -> None:
    device = Device()
    device.put("tokens", 0, [1, 2, 3])
    first = device.upload.section(np.array([8, 9, 10], np.int32))
    second = device.upload.section(np.array([0.5], np.float32))
    device.upload.send()
    assert first.tolist() == [8, 9, 10]
    assert second.view(torch.float32).tolist() == [0.5]
    for part in (first, second):
        assert part.data_ptr() % 16 == device.words.data_ptr() % 16
    device.check()


@pytest.mark.parametrize("seed", range(4))
def test_what_exceeds_a_slot_goes_in_several_copies(seed: int) -> None:
    rng = random.Random(seed)
    sends: list[Any] = []

    class Runtime(HostRuntime):
        def event(self) -> Any:
            return SimpleNamespace(wait=lambda: None, record=lambda: sends.append(1))

    # Beside the batch, room for 190 words; a step here has up to 250 and 45 of ranges.
    device = Device(num_words=BatchWords.num_words(NUM_ROWS) + 190, runtime=Runtime())
    for step in range(3):
        for row in range(NUM_ROWS):
            device.put("seed", row, rng.randrange(-(2**63), 2**63))
            device.put("tokens", row, [rng.randrange(1000) for _ in range(rng.randint(1, 16))])
        rows = np.array(rng.sample(range(NUM_ROWS), 4))
        lengths = np.array([rng.randint(1, 3) for _ in rows], np.int32)
        flat = np.array([rng.randrange(99) for _ in range(int(lengths.sum()))], np.int32)
        device.upload.put_many(
            "blocks", rows, starts=np.zeros(4, np.int32), lengths=lengths, values=flat
        )
        at = 0
        for row, length in zip(rows, lengths, strict=True):
            device.expected["blocks"][row, :length] = torch.from_numpy(flat[at : at + length])
            at += length
        lists = [[rng.randrange(1000) for _ in range(rng.randint(13, 16))] for _ in range(5)]
        sections = [device.upload.section(np.array(listed, np.int32)) for listed in lists]
        for row in range(NUM_ROWS):  # with sections, what was staged before is kept apart
            device.put("tokens", row, [rng.randrange(1000) for _ in range(20)], start=17)
        device.fill(num_requests=step + 1)
        device.upload.send()
        device.check()
        assert [section.tolist() for section in sections] == lists
        assert device.batch.rows.tolist()[: step + 1] == [i + 10 for i in range(step + 1)]
    assert len(sends) > 3


class SlowEvent:
    """Not done until waited for; tells how often the host was held up."""

    def __init__(self, waits: list[int], name: int) -> None:
        self.waits, self.name, self.is_set = waits, name, False

    def record(self) -> None:
        self.is_set = True

    def wait(self) -> None:
        if self.is_set:
            self.waits.append(self.name)
        self.is_set = False

    def is_done(self) -> bool:
        return not self.is_set


def test_a_slot_is_written_again_only_once_its_copy_has_run() -> None:
    waits: list[int] = []
    made: list[SlowEvent] = []

    class Runtime(HostRuntime):
        def event(self) -> Any:
            made.append(SlowEvent(waits, len(made)))
            return made[-1]

    device = Device(runtime=Runtime())
    for step in range(NUM_SLOTS):
        device.put("tokens", 0, [step])
        device.upload.send()
    assert waits == []
    for step in range(4):
        assert all(event.is_set for event in made)
        device.put("tokens", 0, [step])
        assert waits == [i % NUM_SLOTS for i in range(step + 1)]
        device.upload.send()
    device.check()


def test_a_batch_is_not_left_behind_in_a_full_slot() -> None:
    device = Device(num_words=BatchWords.num_words(NUM_ROWS) + 190)
    device.fill(num_requests=2)
    with pytest.raises(AssertionError, match="filled last"):
        for row in range(NUM_ROWS):
            device.put("tokens", row, list(range(37)))


def test_the_staged_words_are_bounded_by_the_plan() -> None:
    small, large = make_sizes(), make_sizes(max_model_len=1 << 20, max_num_seqs=256)
    assert upload_words(small) * 4 < 600_000
    assert upload_words(large) * 4 < 5_000_000
