"""The Hopper decode kernel: compiled here, compared with float64 and bit for bit on a Hopper."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo_kernels.paged_attention.decode_hopper import (
    FP8,
    attend_decode_hopper,
    decode_hopper_candidates,
    supports,
)
from octavo_kernels.paged_attention.gpu import attend_decode
from octavo_kernels.paged_attention.gpu_plan import AttentionPlan, make_plan
from octavo_kernels.paged_attention.prefill_hopper import is_hopper
from octavo_kernels.testing import same_bits
from octavo_kernels.tuning import Choice

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LENGTHS = (
    ((1, 128),),
    ((1, 1), (3, 37), (0, 5), (2, 1500), (1, 5000), (4, 2700)),
    ((1, 2049), (1, 3000)) * 40,
)
COMPILE = """
import sys, torch
from octavo_kernels.launch import collecting, compiling_for, resources
from octavo_kernels.paged_attention.decode_hopper import attend_decode_hopper
from octavo_kernels.paged_attention.gpu_plan import make_plan

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

head_dim, block, itemsize, window = map(int, sys.argv[1:])
dtype = torch.bfloat16 if itemsize == 2 else torch.float8_e4m3fn
scales = None if itemsize == 2 else empty(8, dtype=torch.float32)
starts, lengths, tables = (empty(*s, dtype=torch.int32) for s in ((3,), (2,), (2, 256)))
with collecting() as found:
    plan = make_plan(
        starts, lengths, num_tokens=2, max_query_len=1, max_seq_len=4000, num_heads=32,
        num_kv_heads=8, head_dim=head_dim, cache_dtype=dtype, sliding_window=window,
    )
    q, cache = empty(2, 32, head_dim), empty(512, 8, block, head_dim, dtype=dtype)
    attend_decode_hopper(
        q, cache, cache, torch.empty_like(q), plan=plan, block_tables=tables, scale=0.1,
        k_scale=scales, v_scale=scales,
    )
with compiling_for(90):
    taken = resources(next(one for one in found if one.name == "decode_hopper").compile())
assert taken.wgmma >= 24 and taken.mma == 0, taken
assert taken.stack == 0, taken
assert taken.shared <= 232448, taken
"""


@pytest.mark.parametrize(
    ("head_dim", "block", "itemsize", "window"),
    [(128, 16, 2, 0), (64, 64, 2, 300), (128, 32, 1, 0)],
)
def test_compiles_for_hopper_within_its_registers(
    head_dim: int, block: int, itemsize: int, window: int
) -> None:
    # a process of its own: in this one Triton's functions may be the interpreter's
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    numbers = [str(n) for n in (head_dim, block, itemsize, window)]
    command = [sys.executable, "-c", COMPILE, *numbers]
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
        is_fp8: bool = False,
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
        order = torch.randperm(number, device="cuda", generator=g)[: per * len(lengths)]
        self.tables = order.reshape(len(lengths), per).to(torch.int32)
        shape = (number, self.num_kv_heads, block, head_dim)
        written = torch.zeros(number, block, dtype=torch.bool, device="cuda")
        for row, (_, keys) in enumerate(lengths):
            for i in range(-(-keys // block)):
                written[self.tables[row, i], : min(block, keys - i * block)] = True
            self.tables[row, -(-keys // block) :] = -1
        unwritten = ~written[:, None, :, None].expand(shape)
        self.caches = []
        for _ in range(2):
            cache = torch.randn(shape, device="cuda", generator=g, dtype=dtype)
            if is_fp8:
                codes = cache.to(FP8).view(torch.uint8)
                cache = codes.masked_fill(unwritten, 0x7F).view(FP8)
            else:
                cache = cache.masked_fill(unwritten, float("nan"))
            self.caches.append(cache)
        pairs = torch.tensor([(0, 0), *lengths], dtype=torch.int32, device="cuda")
        self.starts = pairs[:, 0].cumsum(0).to(torch.int32)
        self.seq_lens = pairs[1:, 1].contiguous()

    def plan(self, per_sm: int | None = None) -> AttentionPlan:
        return make_plan(
            self.starts,
            self.seq_lens,
            num_tokens=self.q.shape[0],
            max_query_len=max(queries for queries, _ in self.lengths),
            max_seq_len=max(keys for _, keys in self.lengths),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.q.shape[2],
            cache_dtype=self.caches[0].dtype,
            sliding_window=self.window,
            per_sm=per_sm,
        )

    def attend(
        self,
        options: dict[str, Any],
        *,
        plain: bool = False,
        plan: AttentionPlan | None = None,
        choice: Choice | None = None,
    ) -> Tensor:
        out = torch.full_like(self.q, 7.0)
        function = attend_decode if plain else attend_decode_hopper
        k_cache, v_cache = self.caches
        function(
            self.q, k_cache, v_cache, out, plan=plan or self.plan(), block_tables=self.tables,
            scale=self.q.shape[2] ** -0.5, choice=choice, **options,
        )  # fmt: skip
        return out

    def reference(self, row: int, options: dict[str, Any]) -> Tensor:
        """Request row's output [queries, N, H] in float64."""
        queries, keys = self.lengths[row]
        blocks = self.tables[row, : -(-keys // self.block)].long()
        k, v = (
            c.double()[blocks].transpose(1, 2).flatten(0, 1)[:keys]
            * (1.0 if options.get(name) is None else options[name].double()[:, None])
            for c, name in zip(self.caches, ("k_scale", "v_scale"), strict=True)
        )
        group = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        start = int(self.starts[row])
        q = self.q[start : start + queries].double()
        s = torch.einsum("tnh,snh->nts", q, k) * q.shape[2] ** -0.5
        if options["is_causal"]:
            position = keys - queries + torch.arange(queries, device="cuda")
            distance = position[:, None] - torch.arange(keys, device="cuda")
            unseen = (distance < 0) | (distance >= (self.window or keys))
            s = s.masked_fill(unseen, float("-inf"))
        if options.get("sinks") is not None:
            sinks = options["sinks"].double()[:, None, None]
            s = torch.cat([s, sinks.expand(-1, queries, 1)], 2)
        return torch.einsum("nts,snh->tnh", s.softmax(2)[..., :keys], v)


@pytest.mark.gpu
@pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("head_dim", "block", "heads", "causal", "window", "dtype", "is_fp8"),
    [
        (128, 64, (8, 2), True, 0, torch.bfloat16, False),
        (128, 16, (6, 2), True, 0, torch.float16, False),
        (128, 128, (16, 1), False, 0, torch.bfloat16, False),
        (128, 32, (2, 2), True, 700, torch.bfloat16, False),
        (128, 16, (8, 2), True, 0, torch.bfloat16, True),
        (64, 64, (6, 2), False, 0, torch.float16, False),
        (64, 16, (8, 2), True, 0, torch.bfloat16, False),
        (64, 32, (16, 1), True, 130, torch.float16, True),
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
    is_fp8: bool,
) -> None:
    problem = Problem(
        lengths, heads=heads, head_dim=head_dim, block=block, dtype=dtype, is_fp8=is_fp8,
        window=window,
    )  # fmt: skip
    options: dict[str, Any] = {"is_causal": causal}
    if causal:
        options["sinks"] = torch.randn(heads[0], device="cuda")
    if is_fp8:
        options["k_scale"] = torch.rand(heads[1], device="cuda") + 0.5
        options["v_scale"] = torch.rand(heads[1], device="cuda") + 0.5
    assert supports(problem.q, problem.caches[0], plan=problem.plan(), is_causal=causal)
    got = problem.attend(options)
    assert same_bits(got, problem.attend(options, plain=True))
    for row, (queries, _) in enumerate(lengths):
        start = int(problem.starts[row])
        part = got[start : start + queries].double()
        tol = TOLERANCE[dtype]
        torch.testing.assert_close(part, problem.reference(row, options), rtol=tol, atol=tol)


@pytest.mark.gpu
@pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bits_depend_on_no_launch_choice(head_dim: int, is_fp8: bool) -> None:
    problem = Problem(
        ((1, 9000), (1, 40), (2, 3000), (1, 2000)), heads=(32, 8), head_dim=head_dim, block=16,
        dtype=torch.bfloat16, is_fp8=is_fp8,
    )  # fmt: skip
    options = {"is_causal": True}
    first = problem.attend(options)
    for choice in decode_hopper_candidates(head_dim, 1 if is_fp8 else 2):
        assert same_bits(problem.attend(options, choice=choice), first)
    many_rows = dataclasses.replace(problem.plan(), max_query_len=16)
    assert same_bits(problem.attend(options, plan=many_rows), first)
    for per_sm in (1, 2, 3):
        assert same_bits(problem.attend(options, plan=problem.plan(per_sm)), first)


@pytest.mark.gpu
@pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")
def test_a_plan_serves_many_launches() -> None:
    problem = Problem(
        ((1, 5000),) * 40, heads=(32, 8), head_dim=128, block=16, dtype=torch.bfloat16
    )
    plan, options = problem.plan(), {"is_causal": True}
    first = problem.attend(options, plan=plan)
    for _ in range(20):
        assert same_bits(problem.attend(options, plan=plan), first)
