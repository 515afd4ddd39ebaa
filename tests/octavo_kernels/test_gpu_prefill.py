"""The plain prefill kernel over paged keys: against float64, and a row's bits in every setting."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo_kernels.packed_attention.reference import packed_attention_reference
from octavo_kernels.paged_attention.gpu_plan import AttentionPlan
from octavo_kernels.paged_attention.prefill import attend_prefill, candidates, default
from octavo_kernels.testing import gpu_device, same_bits

DEVICE = gpu_device()
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences:
    """Requests with q [T, N, H] and whole key histories [S, K, H], in float64 values of dtype."""

    lengths: tuple[tuple[int, int], ...]  # (query tokens, keys)
    q: Tensor
    k: Tensor
    v: Tensor
    dtype: torch.dtype
    cache_dtype: torch.dtype

    def starts(self, which: int) -> Tensor:
        ends = torch.tensor([0] + [pair[which] for pair in self.lengths]).cumsum(0)
        return ends.to(torch.int32)

    def paged(self, block: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Caches [B, K, block, H] with NaN in every slot nobody wrote, and the block tables."""
        _, num_heads, dim = self.k.shape
        per_request = max([-(-keys // block) for _, keys in self.lengths], default=0)
        num_blocks = per_request * len(self.lengths) + 1
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
        tables = order[: num_blocks - 1].reshape(len(self.lengths), per_request).to(torch.int32)
        caches = []
        key_starts = self.starts(1).tolist()
        for source in (self.k, self.v):
            cache = torch.full((num_blocks, num_heads, block, dim), float("nan"))
            for row, (_, keys) in enumerate(self.lengths):
                for slot in range(keys):
                    cache[tables[row, slot // block], :, slot % block] = source[
                        key_starts[row] + slot
                    ]
            caches.append(cache.to(self.cache_dtype).to(DEVICE))
        for row, (_, keys) in enumerate(self.lengths):
            tables[row, -(-keys // block) :] = -1
        return caches[0], caches[1], tables.to(DEVICE)


def make(
    lengths: tuple[tuple[int, int], ...],
    *,
    N: int,
    K: int,
    H: int,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    kind = cache_dtype or dtype

    def normal(rows: int, heads: int, kind: torch.dtype) -> Tensor:
        return torch.randn(rows, heads, H, generator=generator).to(kind).to(torch.float64)

    queries, keys = (sum(pair[i] for pair in lengths) for i in (0, 1))
    return Sequences(
        lengths=lengths,
        q=normal(queries, N, dtype),
        k=normal(keys, K, kind),
        v=normal(keys, K, kind),
        dtype=dtype,
        cache_dtype=kind,
    )


def plan_of(sequences: Sequences, *, partition: int, window: int = 0) -> AttentionPlan:
    """Every request of at least one token as prefill tiles, in an order of no meaning."""
    num_heads, dim = sequences.q.shape[1:]
    num_kv_heads = sequences.k.shape[1]
    block_q = 128 // (num_heads // num_kv_heads)
    tiles = [
        (request, token)
        for request, (queries, _) in enumerate(sequences.lengths)
        for token in range(0, queries, block_q)
    ][::-1]
    tiles_tensor = torch.full((len(tiles) + 2, 2), 1 << 20, dtype=torch.int32)
    tiles_tensor[: len(tiles)] = torch.tensor(tiles, dtype=torch.int32).reshape(-1, 2)
    nothing = torch.empty(0, device=DEVICE)
    return AttentionPlan(
        num_requests=len(sequences.lengths),
        num_tokens=sequences.q.shape[0],
        max_query_len=max([pair[0] for pair in sequences.lengths], default=0),
        max_seq_len=max([pair[1] for pair in sequences.lengths], default=0),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=dim,
        cache_dtype=sequences.cache_dtype,
        sliding_window=window,
        partition=partition,
        block_q=block_q,
        tiles=tiles_tensor.to(DEVICE),
        num_tiles=torch.tensor([len(tiles)], dtype=torch.int32, device=DEVICE),
        **dict.fromkeys(
            ("requests", "num_decoded", "programs", "arrivals")
            + ("partials_m", "partials_l", "partials"),
            nothing,
        ),
    )


def attend(
    sequences: Sequences,
    *,
    block: int = 16,
    partition: int = 128,
    sliding_window: int = 0,
    choice: dict[str, int] | None = None,
    **options: Any,
) -> Tensor:
    k_cache, v_cache, tables = sequences.paged(block)
    # rows of a wider matrix, as views of qkv are
    num_tokens, num_heads, dim = sequences.q.shape
    wide = torch.full((num_tokens, num_heads + 2, dim), float("nan"), dtype=sequences.dtype)
    wide[:, :num_heads] = sequences.q.to(sequences.dtype)
    q = wide.to(DEVICE)[:, :num_heads]
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=DEVICE)
    attend_prefill(
        q,
        k_cache,
        v_cache,
        out,
        plan=plan_of(sequences, partition=partition, window=sliding_window),
        block_tables=tables,
        query_start_loc=sequences.starts(0).to(DEVICE),
        seq_lens=torch.tensor([k for _, k in sequences.lengths], dtype=torch.int32).to(DEVICE),
        scale=dim**-0.5,
        choice=choice,
        **{key: x.to(DEVICE) if isinstance(x, Tensor) else x for key, x in options.items()},
    )
    return out.cpu()


def reference(sequences: Sequences, **options: Any) -> Tensor:
    return packed_attention_reference(
        sequences.q,
        sequences.k,
        sequences.v,
        query_start_loc=sequences.starts(0),
        key_start_loc=sequences.starts(1),
        max_query_len=1 << 30,
        scale=sequences.q.shape[2] ** -0.5,
        **{"is_causal": True, **options},
    )


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    error = TOLERANCE[dtype]
    torch.testing.assert_close(got.to(torch.float64), want, atol=error, rtol=error)


def _rel_bias(num_heads: int, span: int) -> Tensor:
    return torch.randn(num_heads, 2 * span - 1, generator=torch.Generator().manual_seed(7))


MIXED = ((0, 0), (40, 40), (1, 1), (0, 9), (33, 300))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 50},
    "window_of_one": {"sliding_window": 1},
    "wide_window": {"sliding_window": 200},
    "soft_cap": {"soft_cap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0, 1.0, -2.0])},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03, 0.01])},
    "rel_bias": {"rel_bias": _rel_bias(6, 20)},
    "full": {"is_causal": False},
    "full_window": {"is_causal": False, "sliding_window": 30},
    "all": {
        "sliding_window": 60,
        "soft_cap": 3.0,
        "sinks": torch.tensor([0.5, -1.0, 3.0, 0.0, 1.0, -2.0]),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03, 0.01]),
        "rel_bias": _rel_bias(6, 8),
    },
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("plain", dtype) for dtype in TOLERANCE]
    + [(name, torch.float32) for name in OPTIONS if name != "plain"],
)
def test_options_agree_with_the_reference(name: str, dtype: torch.dtype) -> None:
    sequences = make(MIXED, N=6, K=2, H=64, dtype=dtype)
    got = attend(sequences, **OPTIONS[name])
    assert_close(got, reference(sequences, **OPTIONS[name]), dtype)


@pytest.mark.parametrize(
    ("N", "K", "H", "block"),
    [(2, 2, 16, 16), (4, 4, 80, 32), (7, 1, 96, 64), (8, 1, 128, 128), (2, 1, 256, 128)]
    + [(40, 2, 32, 16), (64, 1, 48, 64)],
)
def test_sizes_agree_with_the_reference(N: int, K: int, H: int, block: int) -> None:
    sequences = make(((5, 150), (20, 20)), N=N, K=K, H=H, dtype=torch.bfloat16)
    assert_close(attend(sequences, block=block), reference(sequences), torch.bfloat16)


def test_fp8_keys_and_values() -> None:
    dtype = torch.bfloat16
    sequences = make(
        ((9, 140), (30, 30)), N=4, K=2, H=64, dtype=dtype, cache_dtype=torch.float8_e4m3fn
    )
    scales = {"k_scale": torch.tensor([0.5, 1.5]), "v_scale": torch.tensor([2.0, 0.25])}
    assert_close(attend(sequences, **scales), reference(sequences, **scales), dtype)


def test_no_request_and_no_token() -> None:
    assert attend(make((), N=4, K=2, H=64)).shape == (0, 4, 64)
    assert attend(make(((0, 0), (0, 70)), N=4, K=2, H=64)).shape == (0, 4, 64)


# ---- same bits ----------------------------------------------------------------------------------


def _chunks(sequences: Sequences, sizes: tuple[int, ...], **options: Any) -> Tensor:
    """One request's rows, computed chunk by chunk as its keys arrive."""
    begin, parts = 0, []
    ((_, keys),) = sequences.lengths
    queries = sequences.q.shape[0]
    for size in sizes:
        end = begin + size
        present = keys - queries + end
        part = dataclasses.replace(
            sequences,
            lengths=((size, present),),
            q=sequences.q[begin:end],
            k=sequences.k[:present],
            v=sequences.v[:present],
        )
        parts.append(attend(part, **options))
        begin = end
    return torch.cat(parts)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_every_chunking_gives_the_same_bits(name: str) -> None:
    sequences = make(((70, 270),), N=6, K=2, H=64, dtype=torch.bfloat16)
    whole = attend(sequences, **OPTIONS[name])
    for sizes in ((1, 69), (20, 10, 40)):
        assert same_bits(_chunks(sequences, sizes, **OPTIONS[name]), whole), sizes


def test_tiles_and_block_sizes_give_the_same_bits() -> None:
    sequences = make(((30, 270), (5, 5)), N=5, K=1, H=64, dtype=torch.bfloat16)
    want = attend(sequences, choice=dict(default(64, torch.bfloat16)))
    for choice in candidates(64, torch.bfloat16):
        assert same_bits(attend(sequences, choice=dict(choice)), want), choice
    for block in (32, 64, 128):
        assert same_bits(attend(sequences, block=block), want), block


def test_alone_and_in_a_batch_give_the_same_bits() -> None:
    together = make(MIXED, N=6, K=2, H=64, dtype=torch.bfloat16)
    whole = attend(together)
    starts, key_starts = together.starts(0).tolist(), together.starts(1).tolist()
    for row, pair in enumerate(together.lengths):
        rows = slice(starts[row], starts[row + 1])
        keys = slice(key_starts[row], key_starts[row + 1])
        alone = dataclasses.replace(
            together,
            lengths=(pair,),
            q=together.q[rows],
            k=together.k[keys],
            v=together.v[keys],
        )
        assert same_bits(attend(alone), whole[rows]), pair


@pytest.mark.gpu
@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_prompts_on_a_gpu(H: int, dtype: torch.dtype) -> None:
    sequences = make(((1300, 3300), (2100, 2100), (700, 900)), N=8, K=2, H=H, dtype=dtype)
    whole = attend(sequences, partition=1024)
    assert_close(whole, reference(sequences), dtype)
    for choice in candidates(H, dtype):
        assert same_bits(attend(sequences, partition=1024, choice=dict(choice)), whole), choice
    one = dataclasses.replace(
        sequences,
        lengths=((1300, 3300),),
        q=sequences.q[:1300],
        k=sequences.k[:3300],
        v=sequences.v[:3300],
    )
    chunked = _chunks(one, (1, 130, 512, 657), partition=1024, block=64)
    assert same_bits(chunked, whole[:1300])


# In a process of its own: what the interpreter runs cannot be compiled.
COMPILE = """
import re
import torch
from octavo_kernels.launch import collecting, compiling_for, resources
from octavo_kernels.packed_attention import packed_attention
from octavo_kernels.paged_attention.gpu import make_plan
from octavo_kernels.paged_attention.shared_prefix import attend_shared_prefix, group_prefixes
from octavo_kernels.paged_attention.prefill import attend_prefill

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def ints(*shape):
    return empty(*shape, dtype=torch.int32)

with collecting() as found:
    cache = empty(8, 2, 16, 64)
    q = empty(400, 8, 64)
    plan = make_plan(
        ints(5), ints(4), num_tokens=400, max_query_len=200, max_seq_len=3000, num_heads=8,
        num_kv_heads=2, head_dim=64, cache_dtype=torch.bfloat16, shared_partitions=ints(4),
    )
    common = {"plan": plan, "block_tables": ints(4, 200), "scale": 1.0}
    attend_prefill(q, cache, cache, q, query_start_loc=ints(5), seq_lens=ints(4), **common)
    groups = group_prefixes(
        plan, group_start_loc=ints(2), members=ints(4), group_partitions=ints(1), max_partitions=2
    )
    attend_shared_prefix(q, cache, cache, groups=groups, **common)
    packed_attention(
        q, empty(400, 2, 64), empty(400, 2, 64), query_start_loc=ints(5), key_start_loc=ints(5),
        max_query_len=200, scale=1.0,
    )
names = [launch.name for launch in found]
assert names == ["divide", "attend", "list_tiles", "attend_shared", "attend"], names
with compiling_for(90):
    for launch in found:
        compiled = launch.compile()
        used = resources(compiled)
        assert used.stack == 0, (launch.name, used)
        if launch.name.startswith("attend"):
            assert used.wgmma > 0, used
            ptx = compiled.asm["ptx"]
            assert "cp.async.cg" in ptx, "the loop is not pipelined"
            narrow = re.findall(r"ld\\.global\\.[bu](?:8|16) ", ptx)
            assert not narrow, (launch.name, narrow[:3])
"""


def test_kernels_compile_for_hopper_pipelined_and_without_spills() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
