"""Recorded launches against the same code run as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from octavo_kernels import memory, set_num_threads
from octavo_kernels.parallel import kernel
from octavo_kernels.recording import Arena, Recording, UnrecordableError, recording
from octavo_kernels.simd import get_f32, get_i64, put_f32, put_i64


@kernel
def _axpy(part: int, num_parts: int, x: int, y: int, out: int, n: int, a: float) -> None:
    for i in range(part * n // num_parts, (part + 1) * n // num_parts):
        put_f32(out + 4 * i, get_f32(x + 4 * i) * a + get_f32(y + 4 * i))


@kernel
def _count(part: int, num_parts: int, counts: int) -> None:
    put_i64(counts + 8 * part, get_i64(counts + 8 * part) + 1)


@kernel
def _decide(part: int, num_parts: int, wanted: int, cell: int) -> None:
    put_i64(cell, get_i64(wanted))


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    set_num_threads(request.param)
    yield
    set_num_threads(2)


def _chain(x: Tensor, *, steps: int) -> Tensor:
    """Allocates as ops do, and lets go of what it no longer needs."""
    for step in range(steps):
        out = memory.empty(x.shape)
        _axpy(2, x.data_ptr(), x.data_ptr(), out.data_ptr(), x.numel(), float(step) * 0.25)
        x = out.view(-1, 4).view(-1)
    return x


@pytest.mark.usefixtures("threads")
def test_a_replay_computes_what_the_code_does_from_what_lies_there_now() -> None:
    arena, x = Arena(1 << 20), torch.randn(512)
    with recording(arena) as found:
        result = _chain(x, steps=40)
    for _ in range(3):
        x.copy_(torch.randn(512))
        found.replay()
        assert torch.equal(result, _chain(x, steps=40))
    assert found.num_launches == 40


def test_recordings_share_memory_and_each_uses_its_places_again() -> None:
    arena, x = Arena(3 * 4096), torch.randn(1024)
    recordings: list[tuple[Recording, Tensor, int]] = []
    for steps in (40, 7):  # 40 tensors in room for three
        with recording(arena) as found:
            recordings.append((found, _chain(x, steps=steps), steps))
    for found, result, steps in [*recordings, *recordings]:
        x.copy_(torch.randn(1024))
        found.replay()
        assert torch.equal(result, _chain(x, steps=steps))
    with pytest.raises(UnrecordableError, match="do not fit"), recording(arena):
        pinned = [memory.empty((1024,)) for _ in range(4)]
        del pinned


def test_places_come_back_whole_whatever_the_order() -> None:
    arena = Arena(64 * 8)
    arena.begin()
    pieces = [arena.empty((16,), torch.float32) for _ in range(8)]
    for index in (3, 1, 6, 0, 7, 2, 5, 4):
        pieces[index] = torch.empty(0)
    whole = arena.empty((128,), torch.float32)
    view = whole[5:]
    del whole
    with pytest.raises(UnrecordableError):  # a view alone keeps the place
        arena.empty((1,), torch.float32)
    del view
    assert arena.empty((64, 2), torch.int32).shape == (64, 2)
    assert arena.empty((0, 3), torch.float32).shape == (0, 3)


@pytest.mark.usefixtures("threads")
def test_a_number_of_parts_that_a_kernel_decides_is_read_at_every_replay() -> None:
    wanted, counts = torch.tensor([2]), torch.zeros(8, dtype=torch.int64)
    with recording(Arena(1 << 16)) as found:
        cell = memory.hold(torch.frombuffer(bytearray(8), dtype=torch.int64))
        _decide(1, wanted.data_ptr(), cell.data_ptr())
        _count.launch_at(cell.data_ptr(), counts.data_ptr())
    assert counts.count_nonzero() == 0
    for number, expected in ((2, [1, 1, 0, 0]), (0, [1, 1, 0, 0]), (4, [2, 2, 1, 1])):
        wanted[0] = number
        found.replay()
        assert counts.tolist()[:4] == expected
    assert found.num_launches == 2 and found.num_bytes > 8


def test_what_torch_computes_is_refused_and_nothing_stays_switched_on() -> None:
    arena, x = Arena(1 << 16), torch.randn(16)
    for compute in (lambda: x + 1, lambda: torch.empty(3), lambda: x.clone()):
        with pytest.raises(UnrecordableError, match="torch computes"), recording(arena):
            compute()
    counts = torch.zeros(2, dtype=torch.int64)
    with recording(arena) as found:
        pass
    _count(2, counts.data_ptr())  # after the block: not recorded
    assert found.num_launches == 0 and memory.empty((2,)).add(1).shape == (2,)
    found.replay()
    assert counts.tolist() == [1, 1]


def test_other_threads_are_not_recorded() -> None:
    counts, places = torch.zeros(2, dtype=torch.int64), []

    def elsewhere() -> None:
        _count(1, counts.data_ptr())
        places.append(memory.empty((4,)))

    with recording(Arena(1 << 16)) as found:
        _count(1, counts.data_ptr())
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert found.num_launches == 1 and counts.tolist() == [1, 0]
    assert places[0].fill_(1.0).sum() == 4


def test_launches_can_be_run_one_by_one() -> None:
    counts, calls = torch.zeros(2, dtype=torch.int64), []
    with recording(Arena(1 << 16)) as found:
        _count(2, counts.data_ptr())
        _count(1, counts.data_ptr())
    found.replay_each(calls.append, lambda task: calls.append(-task))
    assert counts.tolist() == [2, 1]
    assert calls == [_count.address, -_count.address] * 2


def test_recording_does_not_import_torchs_compiler() -> None:
    code = """
import sys
import torch
from octavo_kernels import memory
from octavo_kernels.recording import Arena, recording
with recording(Arena(1 << 16)):
    memory.empty((2, 2), torch.float32).view(4)
assert "torch._dynamo" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
