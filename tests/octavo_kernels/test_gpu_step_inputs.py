"""The step's own kernels: nothing outside their tensors is touched, whatever the numbers say."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo_kernels.step_inputs import gpu
from octavo_kernels.step_inputs.reference import (
    build_step_inputs_reference,
    scatter_words_reference,
)
from octavo_kernels.testing import assert_canaries, gpu_device, guarded_empty

DEVICE = gpu_device()
OUTS = ("token_ids", "positions", "slots", "block_tables")
POISON = torch.iinfo(torch.int32).min


def ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Step:
    """Requests (row, new tokens, all tokens) over tables of 6 rows, outputs between canaries."""

    def __init__(
        self,
        requests: list[tuple[int, int, int]],
        *,
        block_size: int = 16,
        num_tokens: int | None = None,
        length: int = 70,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        starts = [0, *itertools.accumulate(new for _, new, _ in requests)]
        blocks = -(-length // block_size)
        # Columns of one arena: their rows need not lie side by side.
        arena = torch.randint(100, 10**6, (6, length + blocks + 5), generator=generator)
        arena[:, length + 3 : length + 3 + blocks] = torch.randperm(6 * blocks).view(6, blocks)
        arena = arena.to(DEVICE, torch.int32)
        self.num_tokens = starts[-1] if num_tokens is None else num_tokens
        self.arguments: dict[str, Any] = {
            "batch_rows": ints([row for row, _, _ in requests]),
            "query_start_loc": ints(starts),
            "seq_lens": ints([all_ for _, _, all_ in requests]),
            "token_table": arena[:, :length],
            "block_table": arena[:, length + 3 : length + 3 + blocks],
            "block_size": block_size,
            "num_tokens": self.num_tokens,
        }
        self.shapes = [(self.num_tokens,)] * 3 + [(len(requests), blocks + 1)]

    def run(self, **changes: Any) -> dict[str, Tensor]:
        guarded = [guarded_empty(shape, torch.int32, DEVICE) for shape in self.shapes]
        outs = {name: out for name, (out, _) in zip(OUTS, guarded, strict=True)}
        gpu.build_step_inputs(
            **{"max_query_len": self.num_tokens, **self.arguments, **outs, **changes}
        )
        for name, (_, store) in zip(OUTS, guarded, strict=True):
            assert_canaries(store, name)
        return outs

    def want(self) -> dict[str, Tensor]:
        outs = {
            name: torch.full(shape, POISON, dtype=torch.int32)
            for name, shape in zip(OUTS, self.shapes, strict=True)
        }
        arguments = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in self.arguments.items()}
        build_step_inputs_reference(**arguments, **outs)  # type: ignore[arg-type]
        return outs

    def check(self, **changes: Any) -> dict[str, Tensor]:
        got, want = self.run(**changes), self.want()
        for name in OUTS:
            assert torch.equal(got[name].cpu(), want[name]), name
        return got


def test_a_small_step_by_hand() -> None:
    step = Step([(2, 3, 18), (0, 1, 1)], num_tokens=6)
    got = step.run()
    tokens, blocks = step.arguments["token_table"], step.arguments["block_table"]
    assert torch.equal(got["token_ids"], torch.cat([tokens[2, 15:18], tokens[0, :1], ints([0, 0])]))
    assert got["positions"].tolist() == [15, 16, 17, 0, 0, 0]
    first, second = 16 * int(blocks[2, 0]), 16 * int(blocks[2, 1])
    want = [first + 15, second, second + 1, 16 * int(blocks[0, 0]), -1, -1]
    assert got["slots"].tolist() == want
    assert torch.equal(got["block_tables"][0, :2], blocks[2, :2])
    assert bool((got["block_tables"][0, 2:] == POISON).all())


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_requests_of_all_kinds_side_by_side(block_size: int) -> None:
    requests = [(5, 1, 64), (0, 0, 33), (3, 70, 70), (1, 2, 65), (4, 0, 0), (2, 16, 17)]
    step = Step(requests, block_size=block_size, num_tokens=100)
    step.check()


def test_padded_places_and_failed_rows_write_no_slot() -> None:
    requests = [(1, 2, 20), (-1, 3, 20), (6, 1, 5), (4, 1, 9), (-1, 0, 0), (-1, 0, 0)]
    got = Step(requests, num_tokens=9).check()
    assert (got["slots"] >= 0).tolist() == [True] * 2 + [False] * 4 + [True] + [False] * 2
    assert got["token_ids"][2:6].tolist() == got["positions"][2:6].tolist() == [0] * 4
    for place in (1, 2, 4, 5):
        assert bool((got["block_tables"][place] == POISON).all())


@pytest.mark.parametrize("max_query_len", [0, 1, 300, 10**6])
def test_the_bound_decides_no_result(max_query_len: int) -> None:
    Step([(1, 600, 1300), (0, 1, 1299)], length=1300).check(max_query_len=max_query_len)


def test_numbers_that_lead_outside_are_passed_over() -> None:
    requests = [(0, 4, 2), (1, 3, 72), (2, 2, 10**9), (3, 3, -5), (4, 1, 70)]
    got = Step(requests).check()
    assert got["positions"].tolist() == [0, 0, 0, 1, 69, 0, 0, 0, 0, 0, 0, 0, 69]
    step = Step([(0, 2, 2), (1, 2, 5)], num_tokens=3)  # fewer than the requests say
    step.check()
    step.arguments["query_start_loc"] = ints([-3, 2, 10**9])
    step.check()


def test_blocks_that_are_not_there_give_no_slot() -> None:
    step = Step([(3, 2, 34)])
    step.arguments["block_table"][3, 2] = -1
    assert step.check()["slots"].tolist() == [-1, -1]


def test_a_table_narrower_than_the_tokens_bounds_them() -> None:
    step = Step([(0, 40, 70)])
    step.arguments["block_table"] = step.arguments["block_table"][:, :3]
    assert (step.check()["slots"] < 0).sum() == 22


@pytest.mark.parametrize(
    "changes",
    [
        {"seq_lens": ints([1, 2]).long()},
        {"seq_lens": ints([1, 2, 3])},
        {"query_start_loc": ints([0, 1])},
        {"batch_rows": ints([0, 0, 0, 0])[::2]},
        {"token_ids": ints([0])},
        {"slots": ints([[0, 0], [0, 0]])},
        {"token_table": ints([[0, 0]] * 6).T},
        {"block_table": ints([[0, 0]] * 5)},
        {"block_tables": ints([[0, 0]])},
    ],
)
def test_inputs_of_bad_kinds_are_refused(changes: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="must be|got"):
        Step([(0, 1, 1), (1, 1, 1)]).run(**changes)


def scatter(ranges: list[list[int]], *, num_words: int = 40, size: int = 30) -> Tensor:
    """The arena, checked against the reference; ranges stand among the words."""
    words = ints([*range(1000, 1000 + num_words), *itertools.chain(*ranges)])
    rows = words[num_words:].view(-1, 3)
    arena, store = guarded_empty((size,), torch.int32, DEVICE)
    gpu.scatter_words(words, ranges=rows, arena=arena, max_len=num_words)
    assert_canaries(store, "arena")
    want = torch.full((size,), POISON, dtype=torch.int32)
    scatter_words_reference(words.cpu(), ranges=rows.cpu(), arena=want)
    assert torch.equal(arena.cpu(), want)
    return arena


def test_words_go_where_their_ranges_say() -> None:
    got = scatter([[0, 3, 4], [39, 0, 1], [5, 10, 0], [7, 29, 1]])
    assert got.tolist()[:8] == [1039, POISON, POISON, 1000, 1001, 1002, 1003, POISON]
    assert int(got[29]) == 1007


def test_ranges_that_lead_outside_are_cut_or_passed_over() -> None:
    least, most = -(2**31), 2**31 - 1
    got = scatter(
        [
            [0, 28, 9],  # past the arena's end
            [-1, 0, 5],
            [0, -1, 5],
            [0, 5, -5],
            [least, least, most],
            [most, most, most],
            [0, 30, 1],
            [3, most, 4],
            [99, 0, 4],
        ]
    )
    assert got.tolist()[28:] == [1000, 1001] and bool((got[:28] == POISON).all())
    scatter([[42, 0, most]])  # past the words' end


def test_a_bound_below_the_longest_range_loses_nothing() -> None:
    words = torch.arange(20_000, dtype=torch.int32, device=DEVICE)
    arena = torch.zeros_like(words)
    gpu.scatter_words(words, ranges=ints([[1, 0, 19_999]]), arena=arena, max_len=1)
    assert torch.equal(arena[:-1], words[1:]) and int(arena[-1]) == 0


def test_scatter_refuses_what_it_cannot_reach() -> None:
    words = ints([1, 2, 3])
    good = {"words": words, "ranges": ints([[0, 0, 1]]), "arena": words}
    for bad in (
        {"words": words.long()},
        {"ranges": ints([[0, 0]])},
        {"ranges": ints([0, 0, 1])},
        {"arena": ints([[1]])},
        {"arena": ints([1, 2, 3, 4])[::2]},
        {"arena": torch.empty(2**31, dtype=torch.int32, device="meta")},
    ):
        with pytest.raises(ValueError, match="must be"):
            gpu.scatter_words(**{**good, **bad}, max_len=1)


def test_padded_samples_are_greedy_and_neutral() -> None:
    table = gpu.SamplingColumns.create(3, device=DEVICE)
    for column in table.arguments().values():
        column.fill_(7)
    out = gpu.SamplingColumns.create(5, device=DEVICE)
    for column in out.arguments().values():
        column.fill_(-9)
    columns: dict[str, Any] = table.arguments() | {"positions": ints([11, 12, 13, 14])}
    gpu.gather_sampling(ints([2, -1, 3, 0]), out=out.first(4), **columns)
    assert out.temperature.tolist() == [7, 0, 0, 7, -9]
    assert out.top_k.tolist() == [7, 0, 0, 7, -9]
    assert out.top_p.tolist() == [7, 1, 1, 7, -9]
    assert out.min_p.tolist() == [7, 0, 0, 7, -9]
    assert out.seeds.tolist() == [7, 0, 0, 7, -9]
    assert out.positions.tolist() == [11, 0, 0, 14, -9]
    for bad in ({"rows": ints([1])}, {"seeds": ints([1, 2, 3])}, {"top_k": ints([1, 2])}):
        with pytest.raises(ValueError, match="must be"):
            gpu.gather_sampling(**{"rows": ints([0] * 5), "out": out, **columns, **bad})


def test_rows_are_gathered_exactly_from_any_place() -> None:
    hidden = torch.randn(4, 33, device=DEVICE)
    index = ints([9, 3, -1, 0, 2, 3, 50])[1:]  # does not start at 16 bytes
    out, store = guarded_empty((6, 33), torch.float32, DEVICE)
    assert gpu.gather_rows(hidden, index, out=out, use_pdl=True) is out
    assert_canaries(store, "rows")
    assert torch.equal(out, hidden[[3, 0, 0, 2, 3, 3]])
    good: dict[str, Any] = {"hidden": hidden, "index": index, "out": out}
    for bad in ({"hidden": hidden[:0]}, {"index": index.long()}, {"out": out.half()}):
        with pytest.raises(ValueError, match="must be"):
            gpu.gather_rows(**{**good, **bad})


COMPILE = """
from octavo_kernels import ModelShape, op_runs
from octavo_kernels.launch import collecting, compiling_for, resources

sizes = {"hidden": 4096, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "ffn": 14336}
scene = op_runs.Scene(ModelShape(**sizes, vocab=1000), op_runs.decode(8, 100), "meta")
with collecting() as found:
    op_runs.RUNS["step_inputs"](scene)
assert len(found) == 5, found
with compiling_for(90):
    for launch in found:
        compiled = launch.compile()
        assert resources(compiled).stack == 0, launch.name
        waits = compiled.asm["ptx"].count("griddepcontrol.wait")
        assert waits == bool(launch.options.get("PDL")), launch
"""


def test_all_compile_for_hopper_without_spills() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
