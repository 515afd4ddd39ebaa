"""The Hopper prefill kernel: compiled here, compared with float64 and bit for bit on a Hopper."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from octavo_kernels.paged_attention.gpu_plan import AttentionPlan, make_plan
from octavo_kernels.paged_attention.prefill import attend_prefill
from octavo_kernels.paged_attention.prefill_hopper import (
    attend_prefill_hopper,
    is_hopper,
    supports,
)
from octavo_kernels.testing import same_bits

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LENGTHS = (
    ((128, 128),),
    ((100, 100), (0, 7), (300, 1500), (1, 1), (140, 2700)),
    ((1030, 1030), (77, 3333), (129, 1024)),
)
COMPILE = """
import sys, torch
from octavo_kernels.launch import collecting, compiling_for, resources
from octavo_kernels.paged_attention.gpu_plan import make_plan
from octavo_kernels.paged_attention.prefill_hopper import attend_prefill_hopper

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

starts, lengths, tables = (empty(*s, dtype=torch.int32) for s in ((3,), (2,), (2, 64)))
with collecting() as found:
    plan = make_plan(
        starts, lengths, num_tokens=1000, max_query_len=600, max_seq_len=4000, num_heads=32,
        num_kv_heads=8, head_dim=int(sys.argv[1]), cache_dtype=torch.bfloat16,
    )
    q, cache = empty(1000, 32, plan.head_dim), empty(64, 8, int(sys.argv[2]), plan.head_dim)
    attend_prefill_hopper(
        q, cache, cache, torch.empty_like(q), plan=plan, block_tables=tables,
        query_start_loc=starts, seq_lens=lengths, scale=0.1,
    )
with compiling_for(90):
    taken = resources(found[-1].compile())
assert taken.wgmma >= 48 and taken.mma == 0, taken
# A few words of the producer, none of the consumers' tiles (136 bytes with Triton 3.9).
assert taken.stack <= 160, taken
assert taken.shared <= 232448, taken
"""


@pytest.mark.parametrize(("head_dim", "block"), [(128, 64), (64, 16)])
def test_compiles_for_hopper_within_its_registers(head_dim: int, block: int) -> None:
    # a process of its own: in this one Triton's functions may be the interpreter's
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", COMPILE, str(head_dim), str(block)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


class Problem:
    """Paged requests on the GPU: NaN in every slot nobody wrote, -1 for every block not there."""

    def __init__(
        self,
        lengths: tuple[tuple[int, int], ...],
        *,
        heads: tuple[int, int],
        head_dim: int,
        block: int,
        dtype: torch.dtype,
        window: int = 0,
    ) -> None:
        g = torch.Generator(device="cuda").manual_seed(0)
        self.lengths, self.block, self.window = lengths, block, window
        self.num_heads, self.num_kv_heads = heads
        tokens = sum(queries for queries, _ in lengths)
        self.q = torch.randn(
            tokens, self.num_heads, head_dim, device="cuda", generator=g, dtype=dtype
        )
        per = max(-(-keys // block) for _, keys in lengths)
        number = per * len(lengths) + 2
        shape = (number, self.num_kv_heads, block, head_dim)
        order = torch.randperm(number, device="cuda", generator=g)[: per * len(lengths)]
        self.tables = order.reshape(len(lengths), per).to(torch.int32)
        self.caches = []
        for _ in range(2):
            whole = torch.randn(shape, device="cuda", generator=g, dtype=dtype)
            cache = torch.full_like(whole, float("nan"))
            for row, (_, keys) in enumerate(lengths):
                for i in range(-(-keys // block)):
                    at, here = int(self.tables[row, i]), min(block, keys - i * block)
                    cache[at, :, :here] = whole[at, :, :here]
            self.caches.append(cache)
        for row, (_, keys) in enumerate(lengths):
            self.tables[row, -(-keys // block) :] = -1
        pairs = torch.tensor([(0, 0), *lengths], dtype=torch.int32, device="cuda")
        self.starts = pairs[:, 0].cumsum(0).to(torch.int32)
        self.seq_lens = pairs[1:, 1].contiguous()

    def plan(self) -> AttentionPlan:
        """All requests as prefill tiles: a plan without room for decoding."""
        return make_plan(
            self.starts,
            self.seq_lens,
            num_tokens=self.q.shape[0],
            max_query_len=max(queries for queries, _ in self.lengths),
            max_seq_len=max(keys for _, keys in self.lengths),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.q.shape[2],
            cache_dtype=self.q.dtype,
            sliding_window=self.window,
        )

    def attend(self, hopper: bool, causal: bool, sinks: Tensor | None) -> Tensor:
        out = torch.full_like(self.q, 7.0)  # rows of requests that are decoded stay as they are
        function = attend_prefill_hopper if hopper else attend_prefill
        k_cache, v_cache = self.caches
        function(
            self.q, k_cache, v_cache, out, plan=self.plan(), block_tables=self.tables,
            query_start_loc=self.starts, seq_lens=self.seq_lens, scale=self.q.shape[2] ** -0.5,
            sinks=sinks, is_causal=causal,
        )  # fmt: skip
        return out

    def reference(self, row: int, causal: bool, sinks: Tensor | None) -> Tensor:
        """Request row's output [queries, N, H] in float64."""
        queries, keys = self.lengths[row]
        blocks = self.tables[row, : -(-keys // self.block)].long()
        group = self.num_heads // self.num_kv_heads
        k, v = (
            c[blocks].transpose(1, 2).flatten(0, 1)[:keys].double().repeat_interleave(group, 1)
            for c in self.caches
        )
        start = int(self.starts[row])
        q = self.q[start : start + queries].double()
        s = torch.einsum("tnh,snh->nts", q, k) * q.shape[2] ** -0.5
        if causal:
            position = keys - queries + torch.arange(queries, device="cuda")
            distance = position[:, None] - torch.arange(keys, device="cuda")
            unseen = (distance < 0) | (distance >= (self.window or keys))
            s = s.masked_fill(unseen, float("-inf"))
        if sinks is not None:
            s = torch.cat([s, sinks.double()[:, None, None].expand(-1, queries, 1)], 2)
        return torch.einsum("nts,snh->tnh", s.softmax(2)[..., :keys], v)


@pytest.mark.gpu
@pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("head_dim", "block", "heads", "causal", "window", "dtype"),
    [
        (128, 64, (8, 2), True, 0, torch.bfloat16),
        (128, 16, (6, 2), True, 0, torch.float16),
        (128, 128, (16, 1), False, 0, torch.bfloat16),
        (128, 32, (2, 2), True, 700, torch.bfloat16),
        (64, 64, (6, 2), False, 0, torch.float16),
        (64, 16, (8, 2), True, 0, torch.bfloat16),
        (64, 128, (2, 2), True, 130, torch.bfloat16),
        (64, 32, (16, 1), True, 0, torch.float16),
    ],
)
def test_agrees_with_float64_and_with_the_plain_kernel(
    lengths: tuple[tuple[int, int], ...],
    head_dim: int,
    block: int,
    heads: tuple[int, int],
    causal: bool,
    window: int,
    dtype: torch.dtype,
) -> None:
    problem = Problem(
        lengths, heads=heads, head_dim=head_dim, block=block, dtype=dtype, window=window
    )
    sinks = torch.randn(heads[0], device="cuda") if causal else None
    assert supports(problem.q, problem.caches[0], plan=problem.plan())
    got = problem.attend(True, causal, sinks)
    assert same_bits(got, problem.attend(False, causal, sinks))
    for row, (queries, _) in enumerate(lengths):
        if queries * heads[0] // heads[1] > 64:  # not decoded
            start = int(problem.starts[row])
            part = got[start : start + queries].double()
            want = problem.reference(row, causal, sinks)
            tol = TOLERANCE[dtype]
            torch.testing.assert_close(part, want, rtol=tol, atol=tol)


@pytest.mark.gpu
@pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")
def test_repeated_runs_have_the_same_bits() -> None:
    problem = Problem(((2000, 3000),), heads=(32, 8), head_dim=128, block=64, dtype=torch.bfloat16)
    first = problem.attend(True, True, None)
    for _ in range(20):
        assert same_bits(problem.attend(True, True, None), first)
