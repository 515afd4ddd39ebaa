"""Drafts on a GPU: what the CPU's prompt lookup proposes, within bounds whatever numbers say."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.speculative.ngram import NgramProposer
from octavo_kernels.drafting import gpu
from octavo_kernels.drafting.reference import propose_reference
from octavo_kernels.testing import assert_canaries, gpu_device, guarded_empty

DEVICE = gpu_device()


def ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def propose(
    rows: list[list[int]], *, drafts: int, lengths: tuple[int, int] = (2, 5), room: int = 64
) -> tuple[Tensor, list[int]]:
    """The table with drafts behind each row's tokens, and how many of them were looked up."""
    size = max(map(len, rows)) + room
    table, store = guarded_empty((len(rows), size), torch.int32, DEVICE)
    table.fill_(-1)
    for place, tokens in enumerate(rows):
        table[place, : len(tokens)] = ints(tokens)
    places = ints(range(len(rows)))
    words, found = ints([~drafts] * len(rows)), torch.full_like(places, -7)
    num_tokens = ints([len(tokens) for tokens in rows])
    gpu.propose(
        places,
        words,
        sample_rows=places,
        sample_positions=ints([-1] * len(rows)),
        token_table=table,
        num_tokens=num_tokens,
        num_found=found,
        min_length=lengths[0],
        max_length=lengths[1],
    )
    assert_canaries(store, "token_table")
    assert torch.equal(words, num_tokens + drafts)
    return table, found.tolist()


def latest(tokens: list[int], *, most: int) -> list[int]:
    """What follows the latest place that shares most last tokens, `most` at most."""

    def shared(end: int) -> int:
        pairs = zip(reversed(tokens[:end]), reversed(tokens), strict=False)
        return min(most, next((i for i, (a, b) in enumerate(pairs) if a != b), end))

    end = max(range(1, len(tokens)), key=lambda end: (shared(end), end), default=0)
    return tokens[end:] if end and shared(end) else []


@pytest.mark.parametrize("lengths", [(1, 1), (2, 5), (3, 3), (1, 8)])
def test_drafts_follow_the_latest_of_the_longest_matches(lengths: tuple[int, int]) -> None:
    rng = random.Random(lengths[1])
    rows = [
        [rng.randrange(vocab) for _ in range(size)]
        for vocab in (2, 5, 40)
        for size in (1, 2, 3, 17, 60)
    ]
    table, found = propose(rows, drafts=9, lengths=lengths)
    assert 0 in found and 9 in found
    for place, tokens in enumerate(rows):
        proposer = NgramProposer(min_length=lengths[0], max_length=lengths[1])
        proposer.begin("r", tokens, num_prompt_tokens=len(tokens), salt=None)
        on_cpu = proposer.propose("r", np.asarray(tokens, np.int32), max_drafts=9)
        assert found[place] == (9 if on_cpu.token_ids else 0)
        got = table[place, len(tokens) : len(tokens) + 9].tolist()
        # What the request has no continuation for goes round, from where it was found.
        period = latest(tokens, most=lengths[1]) or tokens[-1:]
        assert got == [period[i % len(period)] for i in range(9)]
        assert (table[place, : len(tokens)].cpu() == torch.tensor(tokens)).all()
        assert (table[place, len(tokens) + 9 :] == -1).all()


def test_an_occurrence_is_found_in_whatever_chunk() -> None:
    """The latest of two equally long ones, then a longer one before it; a short one is no find."""
    tokens = list(range(100, 3000))
    tokens[1500:1502] = tokens[2500:2502] = tokens[-2:] = [7, 8]
    table, found = propose([tokens], drafts=3)
    assert found == [3] and table[0, 2900:2903].tolist() == tokens[2502:2505]
    tokens[1499] = tokens[-3] = 6
    table, _ = propose([tokens], drafts=3)
    assert table[0, 2900:2903].tolist() == tokens[1502:1505]
    table, found = propose([tokens], drafts=3, lengths=(4, 5))
    assert found == [0] and table[0, 2900:2903].tolist() == tokens[1502:1505]


def test_rows_without_room_or_tokens_get_no_drafts() -> None:
    table, found = propose([[1, 2, 1, 2], [1, 2]], drafts=8, room=5)
    assert found == [0, 0]
    assert (table[0, 4:] == -1).all() and (table[1, 2:] == -1).all()
    table, found = propose([[], [1, 1, 1]], drafts=2)
    assert found == [0, 2]
    assert (table[0] == -1).all()


def test_numbers_of_the_host_and_of_padding_stay() -> None:
    rows, words = ints([1, -1, 9, 0]), ints([7, 0, -2, -1])
    positions = ints([3, 0, -2, -3])
    table, num_tokens = ints([[4] * 9] * 2), ints([5, 6])
    before = table.clone()
    gpu.propose(
        rows,
        words,
        sample_rows=rows,
        sample_positions=positions,
        token_table=table,
        num_tokens=num_tokens,
        num_found=torch.empty_like(rows),
        min_length=2,
        max_length=3,
    )
    assert words.tolist() == [7, 0, -2, 5]
    assert positions.tolist() == [3, 0, -2, 7]
    assert torch.equal(table, before)


def test_what_has_no_kernel_is_refused() -> None:
    rows = ints([0])
    given: dict[str, Any] = {
        "batch_rows": rows,
        "seq_lens": rows,
        "sample_rows": rows,
        "sample_positions": rows,
        "token_table": ints([[0]]),
        "num_tokens": rows,
        "num_found": rows,
        "min_length": 2,
        "max_length": 5,
    }
    for change, match in (
        ({"seq_lens": rows.long()}, "seq_lens must be contiguous torch.int32"),
        ({"num_tokens": ints([0, 1])}, "num_tokens must be contiguous torch.int32 \\[1\\]"),
        ({"token_table": ints([0])}, "token_table must be int32 \\[N, L\\]"),
        ({"min_length": 6}, "min_length must be 1 to max_length=5, got 6"),
    ):
        with pytest.raises(ValueError, match=match):
            gpu.propose(**given | change)
    with pytest.raises(ValueError, match="counts must be of 1 rows"):
        gpu.accept(
            rows,
            rows.long(),
            token_table=ints([[0]]),
            num_tokens=rows,
            counts=ints([[0], [0]]),
            num_drawn=rows,
            max_drafts=1,
        )


COMPILE = """
from octavo_kernels import op_runs
from octavo_kernels.launch import collecting, compiling_for, resources
from octavo_kernels.op_runs import Scene
from octavo_kernels.shape import ModelShape

shape = ModelShape(hidden=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn=64, vocab=128256)
with collecting() as found:
    op_runs.RUNS["drafting"](Scene(shape, op_runs.decode(3, 20), "meta"))
assert [launch.name for launch in found] == ["propose_rows", "accept_runs"]
with compiling_for(90):
    for launch in found:
        used = resources(launch.compile())
        assert used.stack == 0 and used.registers <= 64, (launch.name, used)
"""


def test_kernels_compile_for_a_hopper_without_spills() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_long_rows_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(2)
    table = torch.randint(0, 50, (64, 40_000), generator=generator, dtype=torch.int32)
    num_tokens = torch.randint(1, 39_000, (64,), generator=generator, dtype=torch.int32)
    rows = torch.arange(64, dtype=torch.int32)
    results = []
    for device in ("cpu", DEVICE):
        given = {
            "batch_rows": rows.to(device),
            "seq_lens": torch.full((64,), -8, dtype=torch.int32, device=device),
            "sample_rows": rows.to(device),
            "sample_positions": torch.full((64,), -1, dtype=torch.int32, device=device),
            "token_table": table.to(device, copy=True),
            "num_tokens": num_tokens.to(device),
            "num_found": torch.zeros(64, dtype=torch.int32, device=device),
        }
        run = propose_reference if device == "cpu" else gpu.propose
        run(**given, min_length=2, max_length=5)  # type: ignore[arg-type]
        results.append([tensor.cpu() for tensor in given.values()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
