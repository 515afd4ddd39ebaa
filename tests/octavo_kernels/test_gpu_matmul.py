"""linear on the GPU: one order of summation on every path, refusals, compile keys; embedding."""

import itertools
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo_kernels import embedding as embedding_op
from octavo_kernels.embedding.gpu import embedding
from octavo_kernels.launch import collecting
from octavo_kernels.matmul import cublas, gpu
from octavo_kernels.matmul.gpu import (
    BUCKETS,
    SHARED_BYTES,
    bucket_of,
    by_tile,
    default_tile,
    finish,
    linear,
    make_tile,
    shared_bytes,
    tile_for,
)
from octavo_kernels.matmul.gpu_spec import SHAPES_8B
from octavo_kernels.silu_mul.gpu import silu_mul
from octavo_kernels.testing import assert_canaries, gpu_device, guarded_empty, same_bits

DEVICE = gpu_device()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES_SMALL = {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024)}
# Each way of multiplying once: mma and wgmma, weights as either operand, short and long steps.
TILES = (
    make_tile(8, 16, 256, warps=1, stages=4, swap=1),
    make_tile(8, 64, 128, warps=4, stages=4, swap=1),
    make_tile(16, 16, 128, warps=2, stages=6),
    make_tile(16, 32, 512, warps=4, stages=3),
    make_tile(16, 32, 256, warps=2, stages=4, swap=1),
    make_tile(16, 64, 128, warps=4, stages=4, swap=1),
    make_tile(32, 32, 64, warps=4, stages=4),
    make_tile(64, 64, 64, warps=4, stages=4),
    make_tile(64, 128, 128, warps=4, stages=3),
    make_tile(128, 128, 64, warps=8, stages=3, group=4),
    make_tile(128, 256, 64, warps=8, stages=3),
    make_tile(64, 128, 64, warps=4, stages=4, tma=1),
    make_tile(128, 128, 64, warps=8, stages=4, tma=1),
    make_tile(128, 256, 64, warps=8, stages=3, tma=1),
)
ROWS = (1, 2, 16, 17, 64, 128, 129, 512, 2048)


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype)


def _eighths(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values whose products sum exactly in float32: the interpreter's order does not matter."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randint(-9, 10, shape, generator=generator) / 8).to(DEVICE, dtype)


def _product(x: Tensor, weight: Tensor, tile: Any) -> Tensor:
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=x.dtype, device=x.device)
    return by_tile(x, weight, tile, out=out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [70, 72])  # rows that the copy engine cannot take, and that it can
@pytest.mark.parametrize("index", [0, 2, 4, 11])
def test_a_tile_changes_no_bit_of_an_exact_product(index: int, k: int, dtype: torch.dtype) -> None:
    tile = TILES[index]
    x, weight = _eighths(19, k, dtype=dtype), _eighths(37, k, dtype=dtype, seed=1)
    # Not rounded: the interpreter rounds a tie in bfloat16 otherwise than a GPU.
    out = torch.full((19, 37), torch.nan, device=DEVICE)
    want = (x.double() @ weight.double().T).float()
    assert same_bits(by_tile(x, weight, tile, out=out), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("activation", "has_bias", "has_residual"),
    [
        (None, True, False),
        (None, False, True),
        (None, True, True),
        ("silu_mul", False, False),
        ("silu_mul", True, False),
        ("gelu_tanh_mul", True, False),
    ],
)
def test_fused_extras_are_those_that_follow_a_product_in_memory(
    activation: Any, has_bias: bool, has_residual: bool, dtype: torch.dtype
) -> None:
    n, k = 44, 40
    weight, bias = _eighths(n, k, dtype=dtype), _normal(n, dtype=dtype)
    for num_rows in (1, 33, 260) if dtype == torch.bfloat16 else (17,):
        x = _eighths(num_rows, k, dtype=dtype, seed=2)
        residual = _normal(num_rows, n, dtype=dtype, seed=3) if has_residual else None
        extras: dict[str, Any] = {"bias": bias if has_bias else None, "residual": residual}
        fused = linear(x, weight, activation=activation, **extras)
        out = torch.full_like(fused, torch.nan)
        apart = finish(linear(x, weight), activation=activation, out=out, **extras)
        assert same_bits(fused, apart), num_rows
        if activation and not has_bias:
            assert same_bits(fused, silu_mul(linear(x, weight))), num_rows


def test_float32_logits_are_not_rounded() -> None:
    x, weight = _eighths(5, 64, dtype=torch.bfloat16), _eighths(33, 64, dtype=torch.bfloat16)
    got = linear(x, weight, out_dtype=torch.float32)
    assert same_bits(got, (x.double() @ weight.double().T).float())


def test_out_may_be_the_residual_and_nothing_beside_it_is_written() -> None:
    x, weight = _eighths(6, 24, dtype=torch.float32), _eighths(9, 24, dtype=torch.float32)
    residual, store = guarded_empty((6, 9), torch.float32, DEVICE)
    residual.copy_(_normal(6, 9, dtype=torch.float32))
    want = linear(x, weight, residual=residual.clone())
    assert linear(x, weight, residual=residual, out=residual) is residual
    assert same_bits(residual, want)
    assert_canaries(store, "residual")


def test_rows_beyond_the_last_are_not_read() -> None:
    store = _eighths(20, 40, dtype=torch.bfloat16)
    weight = _eighths(18, 40, dtype=torch.bfloat16)
    want = linear(store[:3].clone(), weight)
    store[3:] = torch.nan
    assert same_bits(linear(store[:3], weight), want)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.empty(2, 8, dtype=torch.float64)}, "needs x"),
        ({"x": torch.empty(2, 16)[:, ::2]}, "needs x"),
        ({"weight": torch.empty(6, 7)}, "needs weight"),
        ({"weight": torch.empty(6, 8, dtype=torch.float16)}, "needs weight"),
        ({"bias": torch.empty(5)}, "needs bias"),
        ({"residual": torch.empty(2, 5)}, "needs residual"),
        ({"out": torch.empty(3, 6)}, "needs out"),
        ({"out_dtype": torch.float16}, "needs out"),
        ({"activation": "relu"}, "silu_mul"),
        ({"activation": "silu_mul", "residual": torch.empty(2, 6)}, "no residual"),
        ({"activation": "silu_mul", "weight": torch.empty(5, 8)}, "even number"),
    ],
)
def test_what_there_is_no_kernel_for_is_refused(change: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"x": torch.empty(2, 8), "weight": torch.empty(6, 8)}
    with pytest.raises(ValueError, match=says):
        linear(**{**arguments, **change})


def test_compile_keys_are_one_a_bucket() -> None:
    keys: set[Any] = set()
    weight = torch.empty(512, 256, dtype=torch.bfloat16, device="meta")
    with collecting() as found:
        for num_rows in (*range(0, 70), 127, 300, 511, 513, 5000, 100_000):
            linear(torch.empty(num_rows, 256, dtype=torch.bfloat16, device="meta"), weight)
    keys = {launch.key for launch in found}
    tiles = {str(tile_for(512, 256, torch.bfloat16, b, gated=False)) for b in BUCKETS}
    assert len(keys) == len(tiles)
    assert [bucket_of(t) for t in (1, 8, 9, 64, 65, 513, 10**6)] == [8, 8, 16, 64, 128, 512, 512]


@pytest.mark.parametrize("dtype", DTYPES)
def test_default_tiles_are_in_bounds_of_the_hardware(dtype: torch.dtype) -> None:
    for (n, k), bucket, gated in itertools.product(
        [(64, 64), (4096, 1024), (128256, 4096)], BUCKETS, (False, True)
    ):
        tile = default_tile(n, k, dtype, bucket, gated)
        assert shared_bytes(tile, gated) * dtype.itemsize <= 2 * SHARED_BYTES


@pytest.mark.parametrize(("n", "k"), [(500, 128), (128256, 4096), (151936, 1024)])
def test_tiles_of_logits_leave_room_for_them(n: int, k: int) -> None:
    for bucket in BUCKETS:
        for dtype in DTYPES:
            tile = tile_for(n, k, dtype, bucket, gated=False, out_dtype=torch.float32)
            assert shared_bytes(tile, False, is_widened=dtype.itemsize < 4) <= SHARED_BYTES
        tile = tile_for(n, k, torch.bfloat16, bucket, gated=False)
        assert shared_bytes(tile, False) <= SHARED_BYTES  # whose outputs are of 16 bits


_LOGITS = """
import torch
from octavo_kernels import device
from octavo_kernels.launch import collecting, compiling_for
from octavo_kernels.matmul.gpu import BUCKETS, linear

with device.pretending((9, 0)), collecting() as found:
    for n, k in ((500, 128), (128256, 4096)):
        head = torch.empty(n, k, dtype=torch.bfloat16, device="meta")
        for rows in BUCKETS[-3:]:
            x = torch.empty(rows, k, dtype=torch.bfloat16, device="meta")
            linear(x, head, out_dtype=torch.float32)
with compiling_for(90):
    for launch in {launch.key: launch for launch in found}.values():
        taken = launch.compile().metadata.shared
        assert taken <= device.shared_bytes_of((9, 0)), (launch, taken)
"""


def test_kernels_of_logits_fit_a_hopper() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", _LOGITS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_cublas_is_refused_once_it_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cublas.ENVIRONMENT:
        monkeypatch.setenv(name, "something else")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="before CUDA is first used"):
        cublas.hold_to_same_bits()


def test_cublas_runs_only_what_was_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = (torch.empty(rows, 256, dtype=torch.float16) for rows in (300, 96))
    monkeypatch.setattr(gpu, "_CUBLAS_ALIGNMENT", 1)
    monkeypatch.setattr(gpu, "_is_faster_by_cublas", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    def takes(x: Tensor = x, dtype: torch.dtype = torch.float16) -> bool:
        return gpu._takes_cublas(x, weight, torch.empty(len(x), 96, dtype=dtype), False)

    assert not takes()
    monkeypatch.setattr(gpu, "_proven", {(x.device, 96, 256, torch.float16): {300}})
    assert takes()
    assert not takes(x[:299]), "another number of rows"
    assert not takes(dtype=torch.float32)
    elsewhere = {(torch.device("cuda", 1), 96, 256, torch.float16): {300}}
    monkeypatch.setattr(gpu, "_proven", elsewhere)
    assert not takes(), "another device"


def test_what_is_assumed_of_cublas_holds_for_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start plans memory in one thread while another lists the kernels to be compiled."""
    monkeypatch.setattr(gpu, "_is_faster_by_cublas", lambda *_: True)
    x, weight, out = (
        torch.empty(sizes, dtype=torch.float16, device="meta")
        for sizes in ((128, 256), (96, 256), (128, 96))
    )

    def takes() -> bool:
        return gpu._takes_cublas(x, weight, out, False)

    found: list[bool] = []
    with gpu.assuming_cublas([(96, 256)], torch.float16, rows=128):
        other = threading.Thread(target=lambda: found.append(takes()))
        other.start()
        other.join()
        assert takes() and found == [False]
    assert not takes()


def test_embedding_dispatches_by_device_and_refuses() -> None:
    weight = torch.empty(4, 3)
    with pytest.raises(ValueError, match="no kernel"):
        embedding_op.embedding(torch.tensor([1]), weight)
    with pytest.raises(ValueError, match="needs ids"):
        embedding(torch.tensor([1.0]), weight)
    with pytest.raises(ValueError, match="needs weight"):
        embedding(torch.tensor([1]), weight[:, ::2])
    with pytest.raises(ValueError, match="needs out"):
        embedding(torch.tensor([1]), weight, out=torch.empty(2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*SHAPES_8B, *(f"small_{name}" for name in SHAPES_SMALL)])
def test_every_tile_and_every_batch_has_the_same_bits(name: str, dtype: torch.dtype) -> None:
    n, k = SHAPES_SMALL[name[6:]] if name.startswith("small_") else SHAPES_8B[name]
    x, weight = _normal(max(ROWS), k, dtype=dtype), _normal(n, k, dtype=dtype, seed=1)
    whole = _product(x[:512], weight, TILES[9])
    for tile in TILES:
        got = _product(x[:129], weight, tile)
        assert same_bits(got, whole[:129]), f"{name} {dict(tile)}"
    for num_rows in ROWS:
        if num_rows > 512 and n > 100_000:
            continue  # 0.5 GB of logits that nobody asks for
        got = linear(x[:num_rows], weight)
        assert same_bits(got[:512], whole[:num_rows]), f"{name} T={num_rows}"


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["silu_mul", "gelu_tanh_mul"])
def test_a_fused_gate_has_the_bits_of_product_and_gate(activation: Any) -> None:
    n, k = SHAPES_8B["gate_up"]
    x, weight = _normal(2048, k), _normal(n, k, seed=1) / 64
    bias = _normal(n, seed=2)
    for num_rows in ROWS:
        for extras in ({}, {"bias": bias}):
            fused = linear(x[:num_rows], weight, activation=activation, **extras)
            apart = finish(
                linear(x[:num_rows], weight),
                activation=activation,
                out=torch.empty_like(fused),
                **extras,
            )
            assert same_bits(fused, apart), f"T={num_rows}"


@pytest.mark.parametrize(
    ("num_rows", "k", "times"), [(3, 128, 1), pytest.param(16, 4096, 20, marks=pytest.mark.gpu)]
)
def test_a_chain_of_early_launches_has_the_same_bits(num_rows: int, k: int, times: int) -> None:
    x, first, second = _normal(num_rows, k), _normal(k, k, seed=1), _normal(k, k, seed=2)
    want = linear(linear(x, first / 64), second)
    for _ in range(times):
        got = linear(linear(x, first / 64, use_pdl=True), second, use_pdl=True)
        assert same_bits(got, want)


_CUBLAS = """
import torch
from octavo_kernels.matmul import cublas
from octavo_kernels.matmul.gpu import by_cublas, linear, prove_cublas
from octavo_kernels.matmul.gpu_spec import SHAPES_8B
from octavo_kernels.testing import same_bits

cublas.hold_to_same_bits()
small = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]
rows = (1, 2, 16, 17, 64, 128, 129, 512, 2048)
shapes = [*SHAPES_8B.values(), *small]
for dtype in (torch.bfloat16, torch.float16):
    for n, k, count in prove_cublas(shapes, dtype, rows=rows):
        print(f"{dtype} {n}x{k} T={count} differs")
x, weight = torch.randn(300, 256, device="cuda").half(), torch.randn(96, 256, device="cuda").half()
bias, residual = weight[:, 0].contiguous(), torch.randn(300, 96, device="cuda").half()
assert not prove_cublas([(96, 256)], torch.float16, rows=(300,))
want = linear(x, weight, bias=bias, residual=residual)
got = by_cublas(x, weight, bias=bias, residual=residual, out=torch.empty_like(residual))
assert same_bits(got, want), "fused extras"
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = linear(x, weight, bias=bias, residual=residual)
graph.replay()
assert same_bits(captured, want), "in a graph"
"""


@pytest.mark.gpu
def test_cublas_held_to_it_has_the_bits_of_the_tiles() -> None:
    # In a process of its own: cuBLAS reads its environment once.
    done = subprocess.run(
        [sys.executable, "-c", _CUBLAS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)  # shapes that linear leaves to the tiles
    assert "bfloat16" not in done.stdout
