"""Attention: a token's bits do not depend on chunks, batch mates, blocks, threads or garbage."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from octavo_kernels import num_threads, set_num_threads
from octavo_kernels.paged_attention import (
    kv_cache_shapes,
    paged_attention,
    paged_attention_reference,
)
from octavo_kernels.rotary_kv_write import rotary_kv_write
from octavo_kernels.testing import same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@dataclasses.dataclass(frozen=True, slots=True)
class Stream:
    """One request's whole q, k, v by position, independent of any cache."""

    q: Tensor  # [P, N, H]
    k: Tensor  # [P, K, H]
    v: Tensor  # [P, K, H]


def make_stream(length: int, *, N: int, K: int, H: int, seed: int) -> Stream:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(length, heads, H, generator=generator) for heads in (N, K, K))
    return Stream(q=q * 2, k=k, v=v)


def attend(
    parts: list[tuple[Stream, int, int]],
    *,
    dtype: torch.dtype,
    block: int = 16,
    window: int = 0,
    seed: int = 0,
) -> list[Tensor]:
    """Outputs of positions [begin, end) of each stream, as one batch.

    The cache lies in shuffled blocks and holds NaN wherever no token up to `end` was written.
    """
    num_kv_heads, head_dim = parts[0][0].k.shape[1:]
    per_request = max(-(-end // block) for _, _, end in parts)
    num_blocks = len(parts) * per_request + 1
    shapes = kv_cache_shapes(
        num_blocks, block_size=block, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype
    )
    # -1 in all four bytes of a float32, as the scales of int8 are, is a NaN too
    garbage = math.nan if dtype.is_floating_point else -1
    k_cache = torch.full(shapes[0], garbage, dtype=dtype)
    v_cache = torch.full(shapes[1], garbage, dtype=dtype)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
    tables = order[:-1].reshape(len(parts), per_request)
    for table, (stream, _, end) in zip(tables, parts, strict=True):
        position = torch.arange(end)
        where, offset = table[position // block], position % block
        if dtype == torch.int8:
            write_codes(stream, where * block + offset, k_cache, v_cache)
            continue
        k_cache[where, :, :, offset] = stream.k[:end].to(dtype)
        v_cache[where, :, offset] = stream.v[:end].to(dtype)
    lengths = [end - begin for _, begin, end in parts]
    out = paged_attention(
        torch.cat([stream.q[begin:end] for stream, begin, end in parts]),
        k_cache,
        v_cache,
        block_tables=tables.to(torch.int32),
        query_start_loc=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        seq_lens=torch.tensor([end for _, _, end in parts], dtype=torch.int32),
        scale=head_dim**-0.5,
        sliding_window=window,
    )
    return list(torch.split(out, lengths))


def write_codes(stream: Stream, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """The only way into an int8 cache; turns nothing."""
    size, (num_heads, head_dim) = len(slots), stream.q.shape[1:]
    rotary_kv_write(
        torch.cat([stream.q[:size], stream.k[:size], stream.v[:size]], dim=1).flatten(1),
        num_heads=num_heads,
        num_kv_heads=stream.k.shape[1],
        head_dim=head_dim,
        positions=torch.arange(size),
        cos=torch.ones(size, 0),
        sin=torch.zeros(size, 0),
        slots=slots,
        k_cache=k_cache,
        v_cache=v_cache,
    )


def rounded(x: Tensor) -> Tensor:
    """What an int8 cache keeps of [P, K, H], in float64."""
    unit = x.double().abs().amax(dim=-1, keepdim=True) / 127
    return (x / unit).round().nan_to_num() * unit


def exact(stream: Stream, begin: int, end: int, window: int, *, is_coded: bool) -> Tensor:
    """[end - begin, N * H] of positions [begin, end) in float64."""
    k, v = (rounded(x) if is_coded else x.double() for x in (stream.k[:end], stream.v[:end]))
    q = stream.q[begin:end].double()
    group = q.shape[1] // k.shape[1]
    logits = torch.einsum("qnh,knh->nqk", q, k.repeat_interleave(group, 1)) * q.shape[2] ** -0.5
    key, position = torch.arange(end), torch.arange(begin, end)[:, None]
    is_seen = (key <= position) & (key > position - (window or end))
    weights = logits.masked_fill(~is_seen, -math.inf).softmax(-1)
    return torch.einsum("nqk,knh->qnh", weights, v.repeat_interleave(group, 1)).flatten(1)


@pytest.mark.parametrize("window", [0, 37, 600])
@pytest.mark.parametrize(
    ("N", "K", "H", "block"), [(9, 3, 64, 16), (14, 1, 80, 128), (2, 2, 256, 64), (2, 1, 16, 32)]
)
def test_int8_agrees_with_float64(N: int, K: int, H: int, block: int, window: int) -> None:
    sizes = ((1, 70), (65, 65), (7, 129), (1, 1), (33, 400), (2, 1030))
    parts = [(make_stream(end, N=N, K=K, H=H, seed=end), end - query, end) for query, end in sizes]
    for got, part in zip(
        attend(parts, dtype=torch.int8, block=block, window=window), parts, strict=True
    ):
        want = exact(*part, window, is_coded=True)
        torch.testing.assert_close(got.double(), want, atol=1e-3, rtol=1e-3)
        # and codes of 8 bits are near enough to what they stand for
        whole = exact(*part, window, is_coded=False)
        assert float((got - whole).norm() / whole.norm()) < 0.02


def test_int8_takes_zeros_and_extremes() -> None:
    stream = make_stream(40, N=2, K=1, H=16, seed=1)
    for k, v in ((0.0, 0.0), (1e-38, 1e-38), (1e18, 1e18)):
        tried = dataclasses.replace(stream, k=stream.k * k, v=stream.v * v)
        tried.v[3] = 0.0
        [got] = attend([(tried, 0, 40)], dtype=torch.int8)
        want = exact(tried, 0, 40, 0, is_coded=True)
        assert bool(got.isfinite().all())
        torch.testing.assert_close(got.double(), want, atol=1e-30, rtol=2e-2)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = num_threads()
    yield
    set_num_threads(before)


@pytest.mark.parametrize("window", [0, 45])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_chunks_and_single_tokens_give_the_same_bits(
    dtype: torch.dtype, window: int
) -> None:
    stream = make_stream(150, N=6, K=2, H=32, seed=1)
    [whole] = attend([(stream, 0, 150)], dtype=dtype, window=window)
    assert bool(whole.isfinite().all())
    for size in (1, 7, 16, 64, 100):
        for begin in range(0, 150, size):
            end = min(150, begin + size)
            [part] = attend([(stream, begin, end)], dtype=dtype, window=window, seed=size)
            assert same_bits(part, whole[begin:end]), (size, begin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize(("N", "K", "H"), [(9, 3, 64), (2, 2, 16), (8, 1, 80), (7, 1, 256)])
def test_chunks_across_partitions_give_the_same_bits(
    N: int, K: int, H: int, dtype: torch.dtype
) -> None:
    stream = make_stream(1100, N=N, K=K, H=H, seed=2)
    for window in (0, 530):
        [whole] = attend([(stream, 0, 1100)], dtype=dtype, window=window)
        for begin, end in (
            (0, 512),
            (500, 530),
            (511, 512),
            (512, 513),
            (1023, 1025),
            (1099, 1100),
        ):
            [part] = attend([(stream, begin, end)], dtype=dtype, window=window, seed=end)
            assert same_bits(part, whole[begin:end]), (begin, end, window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("window", [0, 100])
def test_batch_mates_do_not_change_bits(window: int, dtype: torch.dtype) -> None:
    streams = [make_stream(40 + 17 * i, N=9, K=3, H=64, seed=i) for i in range(32)]
    parts = [
        (stream, [0, len(stream.q) - 1, len(stream.q) // 2][i % 3], len(stream.q))
        for i, stream in enumerate(streams)
    ]
    together = attend(parts, dtype=dtype, window=window)
    for part, mine in zip(parts, together, strict=True):
        [alone] = attend([part], dtype=dtype, window=window, seed=9)
        assert same_bits(alone, mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_block_size_and_threads_do_not_change_bits(
    restore_threads: None, dtype: torch.dtype
) -> None:
    parts = [
        (make_stream(1300, N=4, K=2, H=32, seed=3), 1299, 1300),
        (make_stream(90, N=4, K=2, H=32, seed=4), 0, 90),
    ]
    expected = attend(parts, dtype=dtype)
    for threads in (1, 2, 3, 8):  # 8: few items for many threads, so partitions are split
        set_num_threads(threads)
        for block in (16, 32, 64, 128):
            got = attend(parts, dtype=dtype, block=block, seed=block)
            assert all(map(same_bits, got, expected)), (threads, block)
            [alone] = attend(parts[:1], dtype=dtype, block=block)
            assert same_bits(alone, expected[0]), (threads, block)


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("window", [0, 600])
def test_split_partitions_agree_with_float64(
    restore_threads: None, threads: int, window: int
) -> None:
    set_num_threads(threads)
    stream = make_stream(2100, N=6, K=2, H=64, seed=5)
    [got] = attend([(stream, 2095, 2100)], dtype=torch.float32, window=window)
    shapes = kv_cache_shapes(17, block_size=128, num_kv_heads=2, head_dim=64)
    k = torch.zeros(17 * 128, 2, 64, dtype=torch.float64)
    v = torch.zeros_like(k)
    k[:2100], v[:2100] = stream.k.double(), stream.v.double()
    want = paged_attention_reference(
        stream.q[2095:].double(),
        k.view(17, 128, 2, 64).permute(0, 2, 3, 1).reshape(shapes[0]),
        v.view(17, 128, 2, 64).transpose(1, 2).reshape(shapes[1]),
        block_tables=torch.arange(17, dtype=torch.int32)[None],
        query_start_loc=torch.tensor([0, 5], dtype=torch.int32),
        seq_lens=torch.tensor([2100], dtype=torch.int32),
        scale=64**-0.5,
        sliding_window=window,
    )
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("field", ["k", "v"])
def test_a_request_of_nans_stays_alone(field: str, dtype: torch.dtype) -> None:
    good, bad = (make_stream(70, N=2, K=1, H=16, seed=s) for s in (6, 7))
    poison = getattr(bad, field).clone()
    poison[40] = math.nan
    poisoned = dataclasses.replace(bad, **{field: poison})
    mine, theirs = attend([(good, 0, 70), (poisoned, 0, 70)], dtype=dtype)
    assert same_bits(mine, attend([(good, 0, 70)], dtype=dtype)[0])
    # and within a request, later keys never reach earlier tokens
    assert same_bits(theirs[:40], attend([(bad, 0, 40)], dtype=dtype)[0])
    assert bool(theirs[40:].isnan().all())


def test_extreme_scores_agree_with_float64() -> None:
    stream = make_stream(130, N=2, K=1, H=16, seed=8)
    stream = dataclasses.replace(stream, q=stream.q * 300)
    [got] = attend([(stream, 0, 130)], dtype=torch.float32)
    visible = torch.ones(130, 130, dtype=torch.bool).tril()
    logits = torch.einsum("qnh,kh->nqk", stream.q.double(), stream.k[:, 0].double()) / 4
    weights = logits.masked_fill(~visible, -math.inf).softmax(-1)
    want = torch.einsum("nqk,kh->qnh", weights, stream.v[:, 0].double()).flatten(1)
    # a float32 score near 5,000 is known to 3e-4 only
    torch.testing.assert_close(got.double(), want, atol=5e-3, rtol=5e-3)


def test_q_may_be_a_view_of_qkv() -> None:
    stream = make_stream(20, N=4, K=2, H=32, seed=9)
    cos, sin = torch.ones(20, 16), torch.zeros(20, 16)
    k_shape, v_shape = kv_cache_shapes(2, block_size=16, num_kv_heads=2, head_dim=32)
    k_cache, v_cache = torch.full(k_shape, math.nan), torch.full(v_shape, math.nan)
    qkv = torch.cat([stream.q, stream.k, stream.v], dim=1).flatten(1)
    q = rotary_kv_write(
        qkv,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        positions=torch.arange(20),
        cos=cos,
        sin=sin,
        slots=torch.arange(20),
        k_cache=k_cache,
        v_cache=v_cache,
    )
    assert q.data_ptr() == qkv.data_ptr() and q.stride(0) == 8 * 32
    out = paged_attention(
        q,
        k_cache,
        v_cache,
        block_tables=torch.tensor([[0, 1]], dtype=torch.int32),
        query_start_loc=torch.tensor([0, 20], dtype=torch.int32),
        seq_lens=torch.tensor([20], dtype=torch.int32),
        scale=32**-0.5,
    )
    assert same_bits(out, attend([(stream, 0, 20)], dtype=torch.float32)[0])


def refused(**changes: object) -> None:
    shapes = kv_cache_shapes(4, block_size=16, num_kv_heads=1, head_dim=16)
    given: dict[str, object] = {
        "q": torch.zeros(2, 2, 16),
        "k_cache": torch.zeros(shapes[0]),
        "v_cache": torch.zeros(shapes[1]),
        "block_tables": torch.zeros(1, 2, dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 2], dtype=torch.int32),
        "seq_lens": torch.tensor([9], dtype=torch.int32),
        "scale": 1.0,
    }
    paged_attention(**(given | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_lens": torch.tensor([33], dtype=torch.int32)}, "at most 32, got 33"),
        ({"seq_lens": torch.tensor([1], dtype=torch.int32)}, "at least its query length"),
        ({"query_start_loc": torch.tensor([0, 1], dtype=torch.int32)}, "ascend from 0 to 2"),
        ({"block_tables": torch.full((1, 2), 4, dtype=torch.int32)}, "names block 4"),
        ({"block_tables": torch.full((1, 2), -1, dtype=torch.int32)}, "names block -1"),
        ({"block_tables": torch.zeros(1, 2, dtype=torch.int64)}, "int32"),
        ({"k_cache": torch.zeros(4, 1, 16, 16, dtype=torch.float64)}, "float64"),
        ({"q": torch.zeros(2, 2, 24)}, "head_dim 24|multiple of 16"),
        ({"q": torch.zeros(2, 2, 16, dtype=torch.bfloat16)}, "bfloat16"),
        ({"sliding_window": -1}, "got -1"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    refused()
    with pytest.raises(ValueError, match=message):
        refused(**changes)


def test_cache_shapes_refuse_other_sizes() -> None:
    with pytest.raises(ValueError, match="block_size must be one of .* got 24"):
        kv_cache_shapes(1, block_size=24, num_kv_heads=1, head_dim=16)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 16 .* got 272"):
        kv_cache_shapes(1, block_size=16, num_kv_heads=1, head_dim=272)
